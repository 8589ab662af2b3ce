"""Convert a configuration of TRL, Unsloth or Qwen-VL-Series-Finetune to recipe settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finesight.convert.external_config import PARTS, FamilySettings
from finesight.convert.trainer_converter import DatasetSource, TrainerConverter
from finesight.settings.recipe import load_trainer_settings

_QUANTIZED_MIRROR = re.compile(r"unsloth/(Qwen.+?)(?:-unsloth)?-bnb-4bit")
_FILE_BUILDERS = ("json", "csv", "parquet", "imagefolder", "webdataset")
"""Names of `load_dataset` for local files."""

_IMAGE_SETTINGS = {
    "resized_height": "image.height",
    "resized_width": "image.width",
    "longest_side": "image.longest_side",
    "min_pixels": "image.min_pixels",
    "max_pixels": "image.max_pixels",
}
_TUNE_KEYS = {"vision": "tune_mm_vision", "merger": "tune_mm_mlp", "language": "tune_mm_llm"}
"""Settings of the scripts of Qwen2.5-VL, which train no part without them."""

_QWEN_VL_TARGETS = {"c_attn", "attn.c_proj", "w1", "w2"}
"""Names of layers of the language model only; the vision encoder has another `c_proj`."""

_FREEZE_KEYS = {
    "vision": "freeze_vision_tower",
    "merger": "freeze_merger",
    "language": "freeze_llm",
}


class TrlConverter(TrainerConverter):
    """Conversion of a configuration of TRL, or of a program on the same trainer."""

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        config, draft = self.config, self.draft
        # A YAML file names no method: settings of one identify it.
        methods = load_trainer_settings()["method_keys"].items()
        used = [method for method, names in methods if config.has(*names.split())]
        self.set_objective("stage", config.get_str("stage") or [*used, "sft"][0])
        config = self.config
        model = config.get_str("model_name_or_path") or ""
        if mirror := _QUANTIZED_MIRROR.fullmatch(model):
            draft.note("model", model, "quantized by finesight itself, from the original weights")
            model = f"Qwen/{mirror[1]}"
        if config.program == "Qwen-VL" and model.endswith("-Int4"):
            draft.note("model", model, "quantized by finesight itself, from the original weights")
            model = model.removesuffix("-Int4")
        family = self.set_model(model, (), "adapter_name_or_path")
        self._set_data(family)
        if family.token_size:
            self._set_image()
        if system_prompt := config.get_str("system_prompt"):
            draft.set("data.system_prompt", system_prompt)
        self._set_tune(family)
        bits = "4" if config.get_bool("load_in_4bit") or mirror else config.get_str("bits")
        self.set_quantization(PARTS, "load_in_4bit", None if bits == "16" else bits)
        self.set_trainer_settings()
        self.copy_setting("train.learning_rate.default", "learning_rate")
        for part in ("vision", "merger"):
            if config.has(f"{part}_learning_rate"):
                self.copy_setting(f"train.learning_rate.{part}", f"{part}_learning_rate")
        dtype = (config.get_str("dtype") or "").removeprefix("torch.")
        is_half = config.get_bool("fp16") or (dtype == "float16" and not config.get_bool("bf16"))
        precision = "bf16" if config.get_bool("bf16") else self.get_launcher_precision()
        draft.set("train.precision", "fp16" if is_half else precision)
        self.set_output_dir("trainer_output")

    def _set_image(self) -> None:
        """Set one size of images, else the longer side, else limits of pixels."""
        config, draft = self.config, self.draft
        sizes = {key: config.get_int(key) for key in _IMAGE_SETTINGS}
        for key in ("min_pixels", "max_pixels"):
            sizes[key] = sizes[key] or config.get_int(key.upper())
        given = [key for key, size in sizes.items() if size]
        if "resized_height" in given and "resized_width" in given:
            used = ["resized_height", "resized_width"]
        elif "longest_side" in given:
            used = ["longest_side"]
        else:
            used = ["min_pixels", "max_pixels"]
        for key in given:
            if key in used:
                draft.set(_IMAGE_SETTINGS[key], sizes[key])
            else:
                text = "is not applied beside the other size: set `image` in the recipe"
                draft.note(key, sizes[key], text, differs=True)

    def _set_data(self, family: FamilySettings) -> None:
        config, draft = self.config, self.draft
        sources = self._list_train_sources()
        eval_sources = self._list_eval_sources()
        if not sources:
            sources = [DatasetSource("DATA", title=Path(config.where).stem)]
            text = "built by the script: replace DATA in the command below by its file"
            if self.objective is None:
                draft.note("dataset", config.unresolved.get("dataset_name", ""), text, differs=True)
        self.set_data_files(sources, eval_sources, {})
        # Without a limit, which null means, samples have the maximum length of the model.
        key = self.objective_rules.get("max_length", "max_length")
        is_unlimited = key in config.values and not config.has(key)
        if limit := None if is_unlimited else config.get_int(key):
            draft.set("data.max_length", limit, config.default_comment(key))
            draft.note(key, limit, "longer samples are skipped and counted")
        else:
            draft.set("data.max_length", family.max_length, f"no limit in {config.program}")

    def _list_train_sources(self) -> list[DatasetSource]:
        """Return the datasets of a mixture, and the files or the dataset of the training."""
        config = self.config
        sources: list[DatasetSource] = []
        mixture = config.get_value("datasets")
        for item in mixture if isinstance(mixture, list) else ():
            if isinstance(item, dict) and isinstance(item.get("path"), str):
                split = str(item.get("split") or "")
                subset = str(item.get("name") or "")
                sources.append(self._build_source(item["path"], split, subset))
        splits = config.get_list("dataset_train_split")
        if len(splits) > 1:
            text = "the first one is used: import the others separately, such as for data.eval"
            self.draft.note("dataset_train_split", ", ".join(splits), text, differs=True)
        split = splits[0] if splits else ""
        subset = config.get_str("dataset_config") or ""
        names = self._list_files("dataset_name", "data_files", is_train=True)
        return sources + [self._build_source(name, split, subset) for name in names]

    def _list_eval_sources(self) -> list[DatasetSource]:
        """Return the files or the dataset of the evaluation."""
        split = self.config.get_str("eval_dataset_split") or ""
        subset = self.config.get_str("eval_dataset_config") or ""
        names = self._list_files("eval_dataset_name", "eval_data_files", is_train=False)
        names = names or self._list_files("dataset_name", "data_files", is_train=False)
        return [self._build_source(name, split, subset) for name in names]

    def _list_files(self, name_key: str, files_key: str, *, is_train: bool) -> list[str]:
        """Return the names of files or hub datasets in two settings.

        The setting of files has an effect if the other one is a format, such as `json`. Files
        without a split are for training, unless the setting is that of the evaluation.
        """
        config = self.config
        files = config.get_value(files_key)
        is_own_setting = is_train or name_key.startswith("eval")
        if config.get_str(name_key) not in _FILE_BUILDERS:
            return list(config.get_list(name_key)) if is_own_setting else []
        if isinstance(files, dict):
            found: list[object] = []
            for split, names in files.items():
                if (split == "train") == is_train or name_key.startswith("eval"):
                    found += names if isinstance(names, list | tuple) else [names]
            return [str(name) for name in found if name]
        return list(config.get_list(files_key)) if is_own_setting else []

    def _build_source(self, name: str, split: str, subset: str) -> DatasetSource:
        """Return a file or hub address, and the number of rows of a split such as train[:500]."""
        split, _, rows = (split or "train").partition("[")
        limit = int(rows[1:-1]) if re.fullmatch(r":[1-9]\d{0,8}\]", rows) else None
        if rows and limit is None:
            text = "select the rows by --rows in the command below"
            self.draft.note("dataset_train_split", rows[:-1], text, differs=True)
        if os.path.exists(name) or Path(name).suffix or name.startswith(("/", ".", "~")):
            return DatasetSource(name, limit)
        if name.startswith(("hf:", "modelscope:")):
            return DatasetSource(name, limit)
        address = ""
        if subset:
            address = f":{subset}/{split}"
        elif split != "train":
            address = f":{split}"
        return DatasetSource(f"hf:{name}{address}", limit)

    def _set_tune(self, family: FamilySettings) -> None:
        """Set the mode of each part; without adapters, parts that are not frozen are trained."""
        config, draft = self.config, self.draft
        full = [part for part in PARTS if not config.get_bool(_FREEZE_KEYS[part])]
        if config.has(*_TUNE_KEYS.values()):
            full = [part for part in PARTS if config.get_bool(_TUNE_KEYS[part])]
        if not config.get_bool("use_peft") or config.get_bool("full_finetuning"):
            self.set_parts(full, "full")
            return
        targets, parts = config.get_list("lora_target_modules"), set(PARTS)
        if config.program == "Qwen-VL-Series-Finetune":
            # Parts without adapters are trained in full, unless they are frozen.
            parts = {"language", "vision"} if config.get_bool("vision_lora") else {"language"}
        elif config.program == "Unsloth":
            keys = {"language": "finetune_language_layers", "vision": "finetune_vision_layers"}
            parts = {part for part, key in keys.items() if config.get_bool(key)}
        elif not targets:
            parts = {"language"}
        if config.program == "Qwen-VL" and {*targets} <= _QWEN_VL_TARGETS:
            self.set_parts({"language"}, "lora")
            draft.set("tune.lora.target_modules", list(targets))
        elif targets not in (("all-linear",), ()):
            self.set_lora_targets(family, parts, "lora_target_modules", targets)
        else:
            self.set_parts(parts, "lora")
        if config.program == "Qwen-VL-Series-Finetune":
            for part in {*full} - parts:
                draft.set(f"tune.{part}", "full")
        self.set_lora_config(config.get_float("lora_alpha") or 0.0, "lora_modules_to_save")
        model = config.get_str("model_name_or_path") or ""
        is_chat_model = "chat" in model.lower() or config.get_bool("load_in_4bit")
        if config.program == "Qwen-VL" and not is_chat_model:
            draft.set("tune.embeddings", "full", "of models without `chat` in their name there")
