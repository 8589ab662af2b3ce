"""Convert an ms-swift configuration to recipe settings."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.convert.external_config import PARTS, FamilySettings
from finesight.convert.trainer_converter import DatasetSource, TrainerConverter
from finesight.files.bounded_files import read_text

_FREEZE_KEYS = {"vision": "freeze_vit", "merger": "freeze_aligner", "language": "freeze_llm"}
_RATE_KEYS = {"vision": "vit_lr", "merger": "aligner_lr"}


class MsSwiftConverter(TrainerConverter):
    """Conversion of an ms-swift configuration."""

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        config, draft = self.config, self.draft
        uses_hf = config.get_bool("use_hf") or config.get_bool("USE_HF")
        self.hub = "hf" if uses_hf else "modelscope"
        self.set_objective("rlhf_type", config.get_str("rlhf_type") or "sft")
        method = self.require_method("tuner_type", ("lora", "full"))
        if config.has("task_type"):
            self.require_method("task_type", ("causal_lm",))
        model = config.get_str("model") or ""
        hints = config.get_str("model_type"), config.get_str("template")
        family = self.set_model(model, hints, "adapters")
        self._set_data(family)
        self._set_image(family)
        self._set_tune(family, method)
        # As ms-swift by default: at least 16 samples per step of all GPUs, or a batch of responses.
        samples = (config.get_int("per_device_train_batch_size") or 0) * self.count_gpus(0)[0]
        accumulation = -(-16 // max(1, samples))
        if "responses" in self.objective_rules:
            accumulation = 1
        self.set_trainer_settings(default_accumulation=accumulation)
        learning_rate = config.get_float("learning_rate") or (1e-5 if method == "full" else 1e-4)
        comment = config.default_comment("learning_rate")
        draft.set("train.learning_rate.default", learning_rate, comment)
        for part, key in _RATE_KEYS.items():
            if config.has(key):
                draft.set(f"train.learning_rate.{part}", config.get_float(key))
        dtype_name = (config.get_str("torch_dtype") or "").removeprefix("torch.")
        is_half = dtype_name in ("float16", "float32")
        bf16 = config.get_bool("bf16") if config.has("bf16") else not is_half
        fp16 = config.get_bool("fp16") if config.has("fp16") else is_half
        precision = "fp32"
        if bf16:
            precision = "bf16"
        elif fp16:
            precision = "fp16"
        draft.set("train.precision", precision)
        self.set_output_dir(f"output/{model.rstrip('/').rpartition('/')[2]}")

    def _set_data(self, family: FamilySettings) -> None:
        config, draft = self.config, self.draft
        sources = [self._build_source(item) for item in config.get_list("dataset")]
        if not sources:
            raise config.build_error("dataset", "datasets")
        eval_sources = [self._build_source(item) for item in config.get_list("val_dataset")]
        fraction = config.get_float("split_dataset_ratio") or 0.0
        split: dict[str, object] = {}
        if not eval_sources and fraction:
            if not 0 < fraction < 1:
                raise config.build_error("split_dataset_ratio", "a fraction from 0 to 1")
            split = {"train_fraction": round(1 - fraction, 6)}
            draft.note("split_dataset_ratio", f"{fraction:g}", "split by image, not by row")
        self.set_data_files(sources, eval_sources, split)
        if system_prompt := config.get_str("system"):
            # The value is a .txt file, or text with escaped newlines.
            if system_prompt.endswith(".txt"):
                system_prompt = read_text(Path(system_prompt), expected="the file of `system`")
            draft.set("data.system_prompt", system_prompt.replace("\\n", "\n"))
        # The default of ms-swift is the maximum length of the model.
        max_length = config.get_int("max_length") or family.max_length
        draft.set("data.max_length", max_length, config.default_comment("max_length"))

    def _build_source(self, item: str) -> DatasetSource:
        """Parse an item of the `dataset` setting: `path#count` or `OWNER/NAME:subset#count`."""
        name, _, count = item.partition("#")
        limit = int(count) if count.isdecimal() and len(count) < 10 and int(count) else None
        if limit:
            text = "the first ones are used; ms-swift draws random ones, also with repetition"
            self.draft.note("dataset", item, text, differs=True)
        if os.path.exists(name) or Path(name).suffix or name.startswith(("/", ".", "~")):
            return DatasetSource(name, limit)
        hub = {"HF::": "hf", "MS::": "modelscope"}.get(name[:4], self.hub)
        name, _, subset = (name[4:] if name[2:4] == "::" else name).partition(":")
        if subset == "all" or "/" in subset:
            text = "import each subset, and list them in data.train"
            self.draft.note("dataset", item, text, differs=True)
        elif subset and subset != "default":
            return DatasetSource(f"{hub}:{name}:{subset}/train", limit)
        return DatasetSource(f"{hub}:{name}", limit)

    def _set_image(self, family: FamilySettings) -> None:
        """Set the pixel limits of images from IMAGE_MAX_TOKEN_NUM or MAX_PIXELS and their minimums.

        The default of ms-swift is 4 to 16,384 tokens per image. `max_pixels` is applied before.
        """
        if not family.token_size:
            return
        config, limits, is_default = self.config, list[int](), False
        for bound, default in (("MIN", 4), ("MAX", 16_384)):
            num_tokens = config.get_int(f"IMAGE_{bound}_TOKEN_NUM")
            pixels = config.get_int(f"{bound}_PIXELS")
            is_default = not num_tokens and not pixels
            count = num_tokens or (pixels // family.token_size**2 if pixels else default)
            limits.append(count * family.token_size**2)
        min_pixels, max_pixels = limits
        if config.is_recorded and is_default:
            text = "args.json contains no environment variables: set image.max_pixels of the run"
            self.draft.note("MAX_PIXELS", "not recorded", text)
        max_pixels = min(max_pixels, config.get_int("max_pixels") or max_pixels)
        self.draft.set("image.min_pixels", min_pixels)
        comment = ""
        if is_default and not config.has("max_pixels"):
            comment = "ms-swift's default"
        self.draft.set("image.max_pixels", max(max_pixels, min_pixels), comment)

    def _set_tune(self, family: FamilySettings, method: str) -> None:
        config = self.config
        parts = {part for part, key in _FREEZE_KEYS.items() if not config.get_bool(key)}
        if method == "full":
            self.set_parts(parts, "full")
            return
        # ms-swift searches names in the whole model, including frozen parts.
        items = config.get_list("target_modules")
        targets = tuple(target for item in items for target in item.split())
        if "all-linear" in targets or not targets:
            self.set_parts(parts, "lora")
        else:
            self.set_lora_targets(family, {*PARTS}, "target_modules", targets)
        self.set_lora_config(config.get_float("lora_alpha") or 0.0, "modules_to_save")
        self.set_quantization(["language"], "quant_bits", config.get_str("quant_bits"))
