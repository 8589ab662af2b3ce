"""Convert a configuration of TRL, Unsloth or Qwen-VL-Series-Finetune to recipe settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finesight.convert.external_config import PARTS, FamilySettings
from finesight.convert.trainer_converter import DatasetSource, TrainerConverter
from finesight.recipe import load_trainer_settings

_QUANTIZED_MIRROR = re.compile(r"unsloth/(Qwen.+?)(?:-unsloth)?-bnb-4bit")
_FILE_BUILDERS = ("json", "csv", "parquet", "imagefolder", "webdataset")
"""Names of `load_dataset` for local files."""

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
        methods = load_trainer_settings()["TRL"]["method_keys"].items()
        used = [method for method, names in methods if config.has(*names.split())]
        self.set_objective("stage", config.get_str("stage") or [*used, "sft"][0])
        config = self.config
        model = config.get_str("model_name_or_path") or ""
        if mirror := _QUANTIZED_MIRROR.fullmatch(model):
            draft.note("model", model, "quantized by finesight itself, from the original weights")
            model = f"Qwen/{mirror[1]}"
        family = self.set_model(model, (), "adapter_name_or_path")
        self._set_data(family)
        for limit in ("min_pixels", "max_pixels"):
            if family.token_size and config.has(limit):
                draft.set(f"image.{limit}", config.get_int(limit))
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
        precision = "fp16" if is_half else "bf16" if config.get_bool("bf16") else "auto"
        draft.set("train.precision", precision)
        self.set_output_dir("trainer_output")

    def _set_data(self, family: FamilySettings) -> None:
        config, draft = self.config, self.draft
        files = config.get_value("data_files")
        if not isinstance(files, dict) or config.get_str("dataset_name") not in _FILE_BUILDERS:
            is_file = config.get_str("dataset_name") in _FILE_BUILDERS
            names = files if is_file else config.get_list("dataset_name")
            files = {"train": names, "test": config.get_list("eval_dataset_name")}
        by_split: dict[bool, list[DatasetSource]] = {True: [], False: []}
        mixture = config.get_value("datasets")
        for item in mixture if isinstance(mixture, list) else ():
            if isinstance(item, dict) and isinstance(item.get("path"), str):
                split, subset = str(item.get("split") or ""), str(item.get("name") or "")
                by_split[True].append(self._build_source(item["path"], split, subset))
        splits = config.get_list("dataset_train_split")
        if len(splits) > 1:
            text = "the first one is used: import the others separately, such as for data.eval"
            draft.note("dataset_train_split", ", ".join(splits), text, differs=True)
        selected = [*splits, ""][0], config.get_str("dataset_config") or ""
        for split, names in files.items():
            for name in names if isinstance(names, list | tuple) else [names] if names else []:
                by_split[split == "train"].append(self._build_source(str(name), *selected))
        if not by_split[True]:
            by_split[True] = [DatasetSource("DATA", title=Path(config.where).stem)]
            text = "built by the script: replace DATA in the command below by its file"
            if self.objective is None:
                draft.note("dataset", config.unresolved.get("dataset_name", ""), text, differs=True)
        self.set_data_files(by_split[True], by_split[False], {})
        # Without a limit, which null and GRPO mean, samples have the maximum length of the model.
        key = "max_prompt_length" if config.method == "grpo" else "max_length"
        is_unlimited = key in config.values and not config.has(key)
        if limit := None if is_unlimited else config.get_int(key):
            draft.set("data.max_length", limit, config.default_comment(key))
            draft.note(key, limit, "longer samples are skipped and counted")
        else:
            draft.set("data.max_length", family.max_length, f"no limit in {config.program}")

    def _build_source(self, name: str, split: str, subset: str) -> DatasetSource:
        """Return a file or hub address, and the number of rows of a split such as train[:500]."""
        split, _, rows = (split or "train").partition("[")
        limit = int(rows[1:-1]) if re.fullmatch(r":[1-9]\d{0,8}\]", rows) else None
        if rows and limit is None:
            text = "select the rows by --rows in the command below"
            self.draft.note("dataset_train_split", rows[:-1], text, differs=True)
        if os.path.exists(name) or Path(name).suffix or name.startswith(("/", ".", "~")):
            return DatasetSource(name, limit)
        address = f":{subset}/{split}" if subset else f":{split}" if split != "train" else ""
        return DatasetSource(f"hf:{name}{address}", limit)

    def _set_tune(self, family: FamilySettings) -> None:
        """Set the mode of each part; without adapters, parts that are not frozen are trained."""
        config, draft = self.config, self.draft
        full = [part for part in PARTS if not config.get_bool(_FREEZE_KEYS[part])]
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
        if targets not in (("all-linear",), ()):
            self.set_lora_targets(family, parts, "lora_target_modules", targets)
        else:
            self.set_parts(parts, "lora")
        if config.program == "Qwen-VL-Series-Finetune":
            for part in {*full} - parts:
                draft.set(f"tune.{part}", "full")
        self.set_lora_config(config.get_float("lora_alpha") or 0.0, "lora_modules_to_save")
