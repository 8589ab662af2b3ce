"""Convert a LLaMA-Factory configuration to recipe settings."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.bounded_files import read_json_object
from finesight.convert.model_detection import PARTS, FamilySettings
from finesight.convert.trainer_converter import (
    NOTE_UNKNOWN_PROCESSES,
    DatasetSource,
    TrainerConverter,
)
from finesight.errors import UserError

DATASET_INFO_FILE = "dataset_info.json"

_STAGE_REASONS = {
    "pt": "pretraining on plain text",
    "rm": "a reward model",
    "ppo": "reinforcement learning",
    "dpo": "preference learning",
    "kto": "preference learning",
}
_METHOD_REASONS = {
    "freeze": "trains some layers of a part; finesight trains whole parts with `full`",
    "oft": "an adapter type that finesight does not support",
}
_FREEZE_KEYS = {
    "vision": "freeze_vision_tower",
    "merger": "freeze_multi_modal_projector",
    "language": "freeze_language_model",
}
_STANDARD_COLUMNS = {
    "messages": ("conversations", "messages"),
    "images": ("images",),
    "prompt": ("instruction",),
    "query": ("input",),
    "response": ("output",),
    "system": ("system",),
    "history": ("history",),
}
"""Column names that `finesight import` detects without `--map`, by LLaMA-Factory role."""


class LlamaFactoryConverter(TrainerConverter):
    """Conversion of a LLaMA-Factory configuration."""

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        config, draft = self.config, self.draft
        is_training = config.get_bool("do_train") or (
            not config.has("do_train", "export_dir") and config.has("dataset")
        )
        if not is_training:
            raise UserError(
                "is not a training: do_train is not set",
                where=config.where,
                expected="a configuration with `do_train: true` and a dataset",
                remedy="to merge, predict or evaluate: finesight merge, predict or eval",
            )
        self.require_method("stage", ("sft",), _STAGE_REASONS)
        method = self.require_method("finetuning_type", ("lora", "full"), _METHOD_REASONS)
        self.uses_modelscope = config.is_env_enabled("USE_MODELSCOPE_HUB")
        model = config.get_str("model_name_or_path") or ""
        hub = "modelscope" if self.uses_modelscope else "hf"
        hints = (config.get_str("template"),)
        family = self.set_model(model, hints, hub, "", "adapter_name_or_path")
        self._set_data()
        self._set_image(family)
        self._set_tune(family, method)
        self.set_trainer_settings()
        self._set_batch_size()
        self.copy_setting("train.learning_rate", "learning_rate")
        if config.get_bool("use_muon"):
            draft.set("train.optimizer", "muon", "use_muon; matrices only, as in LLaMA-Factory")
        self._set_precision()
        self.set_output_dir("trainer_output")

    def _set_data(self) -> None:
        config, draft = self.config, self.draft
        sources = self._read_sources("dataset")
        if not sources:
            raise config.build_error("dataset", "dataset names")
        eval_sources = self._read_sources("eval_dataset")
        val_size = config.get_float("val_size") or 0.0
        options: tuple[str, ...] = ()
        if val_size and not eval_sources:
            if val_size < 0 or (val_size >= 1 and not val_size.is_integer()):
                raise config.build_error("val_size", "a fraction below 1, or a count")
            options = "--eval-last", str(int(val_size))
            text = "the last rows of each dataset are the validation split"
            if val_size < 1:
                options = "--train-fraction", f"{round(1 - val_size, 6):g}"
                text = "split by image"
            draft.add_note("val_size", f"{val_size:g}", f"{text}; LLaMA-Factory draws random rows")
        self.set_data_files(sources, eval_sources, options)
        if system_prompt := config.get_str("default_system"):
            draft.set("data.system_prompt", system_prompt)
        max_length = config.get_int("cutoff_len")
        text = "longer samples are skipped; LLaMA-Factory truncates them"
        draft.set("data.max_length", max_length, text)
        text = "longer samples are skipped and counted; LLaMA-Factory truncates them, including"
        draft.add_note("cutoff_len", max_length, f"{text} images")

    def _read_sources(self, key: str) -> list[DatasetSource]:
        """Return the datasets that a setting lists, with their files or hub addresses.

        Raises UserError for a name that dataset_info.json does not contain.
        """
        config = self.config
        names = config.get_list(key)
        folder = config.get_str("dataset_dir") or "data"
        max_samples = config.get_int("max_samples")
        if max_samples is not None and max_samples < 1:
            raise config.build_error("max_samples", "an integer above 0")
        if folder == "ONLINE":
            hub = "modelscope" if self.uses_modelscope else "hf"
            return [DatasetSource(f"{hub}:{name}", max_samples) for name in names]
        info_folder = self._find_dataset_info(folder) if names else None
        if info_folder is None:
            text = (
                f"{folder}/{DATASET_INFO_FILE} does not exist: correct the commands below, or run"
                " this command in its folder"
            )
            if names:
                self.draft.add_note("dataset_dir", folder, text)
            return [DatasetSource(f"{folder}/{name}.json", max_samples) for name in names]
        entries = read_json_object(
            info_folder / DATASET_INFO_FILE,
            expected="descriptions of datasets by name",
            remedy="correct the file",
        )
        return [self._build_source(info_folder, name, entries, max_samples) for name in names]

    def _find_dataset_info(self, folder: str) -> Path | None:
        """Find dataset_info.json in a folder relative to the working directory, the configuration
        and its parents."""
        config_folder = Path(self.config.where).parent
        parents = (config_folder, *config_folder.resolve().parents[:3])
        candidates = (Path(folder), *(parent / folder for parent in parents))
        return next((one for one in candidates if os.path.exists(one / DATASET_INFO_FILE)), None)

    def _build_source(
        self, folder: Path, name: str, entries: dict[str, object], max_samples: int | None
    ) -> DatasetSource:
        entry = entries.get(name)
        where = str(folder / DATASET_INFO_FILE)
        if not isinstance(entry, dict):
            raise UserError(
                f"does not contain {name}",
                where=where,
                expected=f"one of {', '.join(list(entries)[:8])}",
                remedy=f"add {name}, or correct the name in {self.config.where}",
            )
        source, file = self._get_hub_address(entry), entry.get("file_name")
        if entry.get("ranking") or (source is None and not isinstance(file, str)):
            is_ranking = bool(entry.get("ranking"))
            raise UserError(
                f"{name} {'is for preference learning' if is_ranking else 'has no file_name'}",
                where=where,
                expected="supervised fine-tuning data: a file, or the name of a dataset on a hub",
                remedy="correct the file",
            )
        columns = entry.get("columns")
        renamed = [
            f"{role}={column}"
            for role, column in (columns.items() if isinstance(columns, dict) else ())
            if column not in _STANDARD_COLUMNS.get(str(role), ()) and column is not None
        ]
        if renamed:
            text = "nonstandard column names: rename them, or map them with --map in the command"
            self.draft.add_note(f"{name}: columns", ", ".join(renamed), f"{text} below")
        limits = [max_samples] if max_samples is not None else []
        num_samples = entry.get("num_samples")
        if isinstance(num_samples, int) and num_samples > 0:
            text = "the first ones are used; LLaMA-Factory draws random ones"
            self.draft.add_difference(f"{name}: num_samples", num_samples, text)
            limits.append(num_samples)
        if source is None:
            source = str(folder / str(file))
            media = self.config.get_str("media_dir")
            if media is not None and Path(media) != Path(source).parent:
                text = (
                    "run the import where its paths are valid: relative paths start at the data"
                    " file or the current folder"
                )
                self.draft.add_note("media_dir", media, text)
        return DatasetSource(source, min(limits, default=None), name)

    def _get_hub_address(self, entry: dict[str, object]) -> str | None:
        """Return the hub address of a dataset_info.json entry; None for a local file.

        If the entry names both hubs, USE_MODELSCOPE_HUB decides, as in LLaMA-Factory.
        """
        hf, modelscope = entry.get("hf_hub_url"), entry.get("ms_hub_url")
        if isinstance(modelscope, str) and (self.uses_modelscope or not isinstance(hf, str)):
            hub = f"modelscope:{modelscope}"
        elif isinstance(hf, str):
            hub = f"hf:{hf}"
        else:
            return None
        subset, split = entry.get("subset"), entry.get("split")
        split_name = split if isinstance(split, str) else "train"
        if isinstance(subset, str):
            return f"{hub}:{subset}/{split_name}"
        return hub if split_name == "train" else f"{hub}:{split_name}"

    def _set_image(self, family: FamilySettings) -> None:
        if not family.token_size:
            return
        max_pixels = self.config.get_int("image_max_pixels")
        min_pixels = self.config.get_int("image_min_pixels")
        if max_pixels is None or min_pixels is None or not 0 < min_pixels <= max_pixels:
            expected = "pixels, not below image_min_pixels"
            raise self.config.build_error("image_max_pixels", expected)
        # The image processor applies its own minimum.
        lower_bound = max(min_pixels, family.min_pixels)
        self.draft.set("image.min_pixels", lower_bound)
        is_default = not self.config.has("image_max_pixels")
        comment = "LLaMA-Factory's default, 768 x 768" * is_default
        self.draft.set("image.max_pixels", max(max_pixels, lower_bound), comment)

    def _set_tune(self, family: FamilySettings, method: str) -> None:
        config, draft = self.config, self.draft
        parts = {part for part, key in _FREEZE_KEYS.items() if not config.get_bool(key)}
        if family.token_size == 32 and "vision" in parts and "merger" not in parts:
            text = (
                "LLaMA-Factory trains the deepstack mergers with the vision encoder; here they"
                " belong to the merger and are frozen"
            )
            draft.add_difference(_FREEZE_KEYS["merger"], "true", text)
        if method == "full":
            self.set_parts(parts, "full")
            return
        targets = config.get_list("lora_target")
        if targets == ("all",):
            # These are the linear layers of the decoder and of a trained vision encoder. Layers of
            # the merger match only if the vision encoder has layers of the same name.
            vision_layers = family.layers["vision"] if "vision" in parts else ()
            if "merger" in parts and not set(vision_layers) & set(family.layers["merger"]):
                text = (
                    "has no adapters: `lora_target: all` matches none of its layers in"
                    " LLaMA-Factory either"
                )
                draft.add_note(_FREEZE_KEYS["merger"], "false", text)
                parts -= {"merger"}
            self.set_parts(parts, "lora")
        else:
            self.set_lora_targets(family, parts, "lora_target", targets, False)
        alpha = config.get_float("lora_alpha") or 2.0 * (config.get_int("lora_rank") or 0)
        self.set_lora_config(alpha, "additional_target")
        keys = ("quantization_method", "quantization_bit", "quantization_type")
        self.set_quantization(PARTS, *keys, "double_quantization")

    def _set_batch_size(self) -> None:
        num_gpus, suffix = self.count_processes()
        if num_gpus is None and not suffix:
            visible = self.config.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpus_per_node = len([device for device in visible if device.strip()])
            num_gpus = gpus_per_node * (self.config.get_env_int("NNODES") or 1) or None
            suffix = "" if num_gpus else NOTE_UNKNOWN_PROCESSES
        accumulation = self.config.get_int("gradient_accumulation_steps") or 0
        self.set_batch_size(accumulation, num_gpus or 1, suffix)

    def _set_precision(self) -> None:
        if self.config.get_bool("pure_bf16"):
            text = "trainable weights always have fp32 master weights in finesight"
            self.draft.add_note("pure_bf16", "true", text)
        names = {"pure_bf16": "bf16", "bf16": "bf16", "fp16": "fp16"}
        precision = next((name for key, name in names.items() if self.config.get_bool(key)), "auto")
        comment = "neither bf16 nor fp16 is set" if precision == "auto" else ""
        self.draft.set("train.precision", precision, comment)
