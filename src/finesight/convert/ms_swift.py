"""Convert an ms-swift configuration to recipe settings."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.convert.model_detection import PARTS, FamilySettings
from finesight.convert.trainer_converter import (
    NOTE_UNKNOWN_PROCESSES,
    DatasetSource,
    TrainerConverter,
)

_METHODS = ("lora", "full", "lora_llm")
_METHOD_REASONS = dict.fromkeys(
    ("longlora", "adalora", "llamapro", "adapter", "vera", "boft", "fourierft", "reft", "bone"),
    "an adapter type that finesight does not support",
)
_TASK_REASONS = dict.fromkeys(
    ("seq_cls", "embedding", "reranker", "generative_reranker", "decision"),
    "a model without text generation",
)
_PART_NAMES = ("visual", "merger", "deepstack_merger_list", "language_model", "lm_head")


class MsSwiftConverter(TrainerConverter):
    """Conversion of an ms-swift configuration."""

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        config, draft = self.config, self.draft
        method = self.require_method("tuner_type", _METHODS, _METHOD_REASONS)
        if config.has("task_type"):
            self.require_method("task_type", ("causal_lm",), _TASK_REASONS)
        model = config.get_str("model") or ""
        hints = config.get_str("model_type"), config.get_str("template")
        hub_comment = "the default hub of ms-swift"
        family = self.set_model(model, hints, self._get_default_hub(), hub_comment, "adapters")
        self._set_data(family)
        self._set_image(family)
        self._set_tune(family, method)
        if epochs := config.get_float("max_epochs"):
            draft.add_note("max_epochs", f"{epochs:g}", "replaces num_train_epochs, as in ms-swift")
            self.config = replace(config, values={**config.values, "num_train_epochs": epochs})
        self.set_trainer_settings()
        self._set_batch_size()
        self._set_learning_rates(method)
        draft.set("train.precision", self._get_precision())
        self.set_output_dir(f"output/{model.rstrip('/').rpartition('/')[2]}")

    def _get_default_hub(self) -> str:
        uses_hf = self.config.get_bool("use_hf") or self.config.is_env_enabled("USE_HF")
        return "hf" if uses_hf else "modelscope"

    def _set_data(self, family: FamilySettings) -> None:
        config, draft = self.config, self.draft
        sources = [self._build_source(item) for item in config.get_list("dataset")]
        if not sources:
            raise config.build_error("dataset", "datasets")
        eval_sources = [self._build_source(item) for item in config.get_list("val_dataset")]
        fraction = config.get_float("split_dataset_ratio") or 0.0
        options: tuple[str, ...] = ()
        if not eval_sources and fraction:
            if not 0 < fraction < 1:
                raise config.build_error("split_dataset_ratio", "a fraction from 0 to 1")
            options = "--train-fraction", f"{round(1 - fraction, 6):g}"
            draft.add_note("split_dataset_ratio", f"{fraction:g}", "split by image, not by row")
        self.set_data_files(sources, eval_sources, options)
        if system_prompt := config.get_str("system"):
            # The value is a .txt file, or text with escaped newlines.
            if system_prompt.endswith(".txt"):
                try:
                    system_prompt = Path(system_prompt).read_text(encoding="utf-8")
                except (OSError, ValueError) as error:
                    raise config.build_error("system", "text, or a readable text file") from error
            draft.set("data.system_prompt", system_prompt.replace("\\n", "\n"))
        max_length = config.get_int("max_length")
        comment = "" if max_length else "the maximum length of the model, ms-swift's default"
        draft.set("data.max_length", max_length or family.max_length, comment)
        if config.get_bool("strict"):
            draft.set("data.on_invalid_sample", "fail")

    def _build_source(self, item: str) -> DatasetSource:
        """Parse an item of the `dataset` setting: `path#count` or `OWNER/NAME:subset#count`."""
        name, _, count = item.partition("#")
        limit = int(count) if count.isdecimal() and len(count) < 10 and int(count) else None
        if limit:
            text = (
                "the first ones are used; ms-swift draws random ones (with repetition if there"
                " are fewer)"
            )
            self.draft.add_difference("dataset", item, text)
        if os.path.exists(name) or Path(name).suffix or name.startswith(("/", ".", "~")):
            return DatasetSource(name, limit)
        hub = self._get_default_hub()
        if name.startswith(("HF::", "MS::")):
            hub = "hf" if name.startswith("HF") else "modelscope"
            name = name[4:]
        name, _, subset = name.partition(":")
        if subset == "all" or "/" in subset:
            text = "import each subset, and list them in data.train"
            self.draft.add_difference("dataset", item, text)
        elif subset and subset != "default":
            return DatasetSource(f"{hub}:{name}:{subset}/train", limit)
        return DatasetSource(f"{hub}:{name}", limit)

    def _set_image(self, family: FamilySettings) -> None:
        """Set the pixel limits of images from IMAGE_MAX_TOKEN_NUM or MAX_PIXELS and their minimums.

        The default of ms-swift is 4 to 16,384 tokens per image.
        """
        if not family.token_size:
            return
        config, draft = self.config, self.draft
        token_pixels = family.token_size**2
        limits, is_default = [], False
        for bound, default in (("MIN", 4), ("MAX", 16_384)):
            num_tokens = self._get_image_variable(f"IMAGE_{bound}_TOKEN_NUM")
            pixels = self._get_image_variable(f"{bound}_PIXELS")
            is_default = not num_tokens and not pixels
            count = num_tokens or (pixels // token_pixels if pixels else default)
            limits.append(count * token_pixels)
        min_pixels, max_pixels = limits
        comment = "ms-swift's default, 16,384 tokens" if is_default else ""
        if config.is_recorded and is_default:
            text = (
                "args.json contains no environment variables: set image.max_pixels to the"
                " value of the run"
            )
            draft.add_note("MAX_PIXELS", "not recorded", text)
        if max_pixels_argument := config.get_int("max_pixels"):
            max_pixels = min(max_pixels, max(max_pixels_argument, min_pixels))
            comment = "max_pixels: applied before the image processor in ms-swift"
        draft.set("image.min_pixels", min_pixels)
        draft.set("image.max_pixels", max(max_pixels, min_pixels), comment)

    def _get_image_variable(self, name: str) -> int | None:
        """Return an image variable such as MAX_PIXELS as an integer, None if it is not set.

        ms-swift reads these variables from the environment and, with precedence, from
        `model_kwargs`.
        """
        model_kwargs = self.config.get_value("model_kwargs")
        if isinstance(model_kwargs, str):
            try:
                model_kwargs = parse_json(model_kwargs)
            except ValueError as error:
                raise self.config.build_error("model_kwargs", "JSON") from error
        variables = {**self.config.environment}
        if isinstance(model_kwargs, dict):
            variables |= {str(key).upper(): str(value) for key, value in model_kwargs.items()}
        environment = {key.upper(): value for key, value in variables.items()}
        return replace(self.config, environment=environment).get_env_int(name)

    def _set_tune(self, family: FamilySettings, method: str) -> None:
        config, draft = self.config, self.draft
        keys = {"vision": "freeze_vit", "merger": "freeze_aligner", "language": "freeze_llm"}
        parts = {part for part, key in keys.items() if not config.get_bool(key)}
        self._note_frozen_parameters()
        if method == "full":
            self.set_parts(parts, "full")
            return
        if method == "lora_llm":
            # LoRA in the decoder, full fine-tuning of the other parts. ms-swift uses only rank and
            # alpha here.
            draft.set("tune.vision", "full", "lora_llm")
            draft.set("tune.merger", "full", "lora_llm")
            draft.set("tune.language", "lora")
            unused = {"use_rslora": False, "lora_dropout": 0.0, "modules_to_save": None}
            for key in unused:
                if config.has(key):
                    draft.add_note(key, config.get_str(key), "`lora_llm` uses only rank and alpha")
            self.config = replace(config, values={**config.values, **unused})
        else:
            # ms-swift searches names in the whole model, including frozen parts.
            items = config.get_list("target_modules")
            targets = tuple(target for item in items for target in item.split())
            if "all-linear" in targets or not targets:
                self.set_parts(parts, "lora")
            else:
                self.set_lora_targets(family, {*PARTS}, "target_modules", targets, True)
        self.set_lora_config(config.get_float("lora_alpha") or 0.0, "modules_to_save")
        self.config = config
        quant = ("quant_method", "quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
        self.set_quantization(["language"], *quant)

    def _note_frozen_parameters(self) -> None:
        """Add notes about settings that freeze parameters by name, which recipes do not support.

        In the args.json of a run, names of whole parts come from `freeze_vit` and similar settings,
        and are not noted.
        """
        for key in ("freeze_parameters", "trainable_parameters"):
            names = [name for item in self.config.get_list(key) for name in item.split()]
            if self.config.is_recorded:
                names = [name for name in names if not name.endswith(_PART_NAMES)]
            if names:
                text = "only whole parts can be frozen: tune.vision, tune.merger, tune.language"
                self.draft.add_difference(key, ", ".join(names), text)

    def _set_batch_size(self) -> None:
        config = self.config
        num_gpus, suffix = self.count_processes()
        if config.has("global_world_size"):
            num_gpus, suffix = config.get_int("global_world_size"), ""
        if num_gpus is None:
            num_gpus = 1 if suffix else config.get_env_int("NNODES") or 1
            suffix = suffix or " (NPROC_PER_NODE is not set: one process)"
        context_parallel_size = max(1, config.get_int("sequence_parallel_size") or 1)
        data_parallel_size = max(1, num_gpus // context_parallel_size)
        accumulation = config.get_int("gradient_accumulation_steps")
        if accumulation is None:
            # Accumulate up to 16 samples per step. The total does not depend on the number of GPUs.
            per_device = config.get_int("per_device_train_batch_size") or 0
            accumulation = max(1, math.ceil(16 / max(per_device, 1) / data_parallel_size))
            suffix = suffix.replace(NOTE_UNKNOWN_PROCESSES, "")
            suffix += "; accumulation to 16 samples, ms-swift's default"
        self.set_batch_size(accumulation, data_parallel_size, suffix)

    def _set_learning_rates(self, method: str) -> None:
        learning_rate = self.config.get_float("learning_rate")
        comment = "" if learning_rate else f"ms-swift's default for {method}"
        learning_rate = learning_rate or (1e-5 if method == "full" else 1e-4)
        learning_rates = {part: self.config.get_float(key) for part, key in _RATE_KEYS.items()}
        has_parts = any(learning_rates.values())
        name = "train.learning_rate.default" if has_parts else "train.learning_rate"
        self.draft.set(name, learning_rate, comment)
        for part, part_rate in learning_rates.items():
            if part_rate:
                self.draft.set(f"train.learning_rate.{part}", part_rate)

    def _get_precision(self) -> str:
        config = self.config
        dtype_name = (config.get_str("torch_dtype") or "").removeprefix("torch.")
        is_half = dtype_name in ("float16", "float32")
        bf16 = config.get_bool("bf16") if config.has("bf16") else not is_half
        fp16 = config.get_bool("fp16") if config.has("fp16") else is_half
        return "bf16" if bf16 else "fp16" if fp16 else "fp32"


_RATE_KEYS = {"vision": "vit_lr", "merger": "aligner_lr"}
