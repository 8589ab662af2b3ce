"""Convert a LLaMA-Factory configuration to recipe settings."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.convert.external_config import PARTS, FamilySettings
from finesight.convert.registered_data import Reading, describe_reading
from finesight.convert.source_file import iter_folders
from finesight.convert.trainer_converter import DatasetSource, TrainerConverter
from finesight.errors import UserError
from finesight.files.bounded_files import read_json_object

_FREEZE_KEYS = {
    "vision": "freeze_vision_tower",
    "merger": "freeze_multi_modal_projector",
    "language": "freeze_language_model",
}


class LlamaFactoryConverter(TrainerConverter):
    """Conversion of a LLaMA-Factory configuration."""

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        config, draft = self.config, self.draft
        is_training = config.has("dataset") and not config.has("do_train", "export_dir")
        if not (config.get_bool("do_train") or is_training):
            raise UserError(
                "is not a training: do_train is not set",
                where=config.where,
                expected="a configuration with `do_train: true` and a dataset",
                remedy="merge, predict or evaluate with the operation of that name",
            )
        self.set_objective("stage", config.get_str("stage") or "sft")
        method = self.require_method("finetuning_type", ("lora", "full"))
        self.hub = "modelscope" if config.get_bool("USE_MODELSCOPE_HUB") else "hf"
        model, hints = config.get_str("model_name_or_path") or "", (config.get_str("template"),)
        family = self.set_model(model, hints, "adapter_name_or_path")
        self._set_data()
        self._set_image(family)
        self._set_tune(family, method)
        visible = config.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        self.set_trainer_settings(len([device for device in visible if device.strip()]))
        self.copy_setting("train.learning_rate", "learning_rate")
        uses_bf16 = config.get_bool("bf16") or config.get_bool("pure_bf16")
        fallback = "fp16" if config.get_bool("fp16") else self.get_launcher_precision()
        draft.set("train.precision", "bf16" if uses_bf16 else fallback)
        self.set_output_dir("trainer_output")

    def _set_data(self) -> None:
        config, draft = self.config, self.draft
        sources, eval_sources = self._read_sources("dataset"), self._read_sources("eval_dataset")
        if not sources:
            raise config.build_error("dataset", "dataset names")
        val_size = config.get_float("val_size") or 0.0
        split: dict[str, object] = {}
        if val_size and not eval_sources:
            if val_size < 0 or (val_size >= 1 and not val_size.is_integer()):
                raise config.build_error("val_size", "a fraction below 1, or a count")
            split, text = {"train_fraction": round(1 - val_size, 6)}, "split by image"
            if val_size >= 1:
                split, text = {"eval_last": int(val_size)}, "the last rows are the validation split"
            draft.note("val_size", f"{val_size:g}", f"{text}; LLaMA-Factory draws random rows")
        self.set_data_files(sources, eval_sources, split)
        if system_prompt := config.get_str("default_system"):
            draft.set("data.system_prompt", system_prompt)
        max_length = config.get_int("cutoff_len")
        draft.set("data.max_length", max_length, config.default_comment("cutoff_len"))
        text = "longer samples are skipped and counted; LLaMA-Factory truncates them, including"
        draft.note("cutoff_len", max_length, f"{text} images")

    def _read_sources(self, key: str) -> list[DatasetSource]:
        """Return the datasets that a setting lists, with their files or hub addresses.

        dataset_info.json is in a folder relative to the working directory, or to the configuration
        and its parents. Raises UserError for a name that it does not contain.
        """
        config, names = self.config, self.config.get_list(key)
        folder, limit = config.get_str("dataset_dir") or "data", config.get_int("max_samples")
        if limit is not None and limit < 1:
            raise config.build_error("max_samples", "an integer above 0")
        if folder == "ONLINE" or not names:
            return [DatasetSource(f"{self.hub}:{name}", limit) for name in names]
        folders = iter_folders(Path(config.where))
        candidates = (parent / folder / "dataset_info.json" for parent in folders)
        file = next(filter(os.path.exists, candidates), None)
        if file is None:
            text = "has no dataset_info.json: correct the commands below, or convert in its folder"
            self.draft.note("dataset_dir", folder, text)
            return [DatasetSource(f"{folder}/{name}.json", limit) for name in names]
        expected = "descriptions of datasets by name"
        entries = read_json_object(file, expected=expected, remedy="correct the file")
        return [self._build_source(file, name, entries, limit) for name in names]

    def _build_source(
        self, info_file: Path, name: str, entries: dict[str, object], limit: int | None
    ) -> DatasetSource:
        entry = entries.get(name)
        if not isinstance(entry, dict):
            raise UserError(
                f"does not contain {name}",
                where=str(info_file),
                expected="one of its datasets: "
                + (", ".join(list(entries)[:8]) or "the file has none"),
                remedy=f"correct the name in {self.config.where}, or the file",
            )
        is_supervised = self.objective is None and "train.objective" not in self.draft.settings
        if entry.get("ranking") and is_supervised:
            raise UserError(
                f"{name} is for preference learning",
                where=str(info_file),
                expected="a dataset for supervised fine-tuning, without `ranking: true`",
                remedy=f"set the `stage` for it, or another dataset, in {self.config.where}",
            )
        if entry.get("num_samples"):
            text = "set its count by --limit in the command below"
            self.draft.note(f"{name}: num_samples", entry["num_samples"], text, differs=True)
        # If the entry names both hubs, USE_MODELSCOPE_HUB decides, as in LLaMA-Factory.
        urls = {"hf": entry.get("hf_hub_url"), "modelscope": entry.get("ms_hub_url")}
        hubs = [hub for hub in (self.hub, *urls) if isinstance(urls[hub], str)]
        if not hubs:
            file = info_file.parent / str(entry.get("file_name"))
            reading = self._describe_reading(name, entry, file)
            return DatasetSource(str(file), limit, name, reading)
        subset, split = entry.get("subset"), entry.get("split") or "train"
        address = f"{hubs[0]}:{urls[hubs[0]]}"
        if subset or split != "train":
            address += f":{subset}/{split}" if subset else f":{split}"
        return DatasetSource(address, limit, name, self._describe_reading(name, entry, None))

    def _describe_reading(self, name: str, entry: dict[str, object], file: Path | None) -> Reading:
        """Return how an import reads the keys of a dataset, and note what it cannot state."""
        reading = describe_reading(entry, file)
        if reading.problem:
            text = f"{reading.problem}; the import below does not read the file before"
            self.draft.note(f"{name}: columns", "", text, differs=True)
        return reading

    def _set_image(self, family: FamilySettings) -> None:
        if not family.token_size:
            return
        # The image processor applies its own minimum.
        lower_bound = max(self.config.get_int("image_min_pixels") or 0, family.min_pixels)
        self.draft.set("image.min_pixels", lower_bound)
        comment = self.config.default_comment("image_max_pixels")
        max_pixels = max(self.config.get_int("image_max_pixels") or 0, lower_bound)
        self.draft.set("image.max_pixels", max_pixels, comment)

    def _set_tune(self, family: FamilySettings, method: str) -> None:
        config, draft = self.config, self.draft
        parts = {part for part, key in _FREEZE_KEYS.items() if not config.get_bool(key)}
        if family.token_size == 32 and "vision" in parts and "merger" not in parts:
            text = "LLaMA-Factory also trains the deepstack mergers, here a part of the merger"
            draft.note(_FREEZE_KEYS["merger"], "true", text, differs=True)
        if method == "full":
            self.set_parts(parts, "full")
            return
        targets = config.get_list("lora_target")
        if targets == ("all",):
            # These are the linear layers of the decoder and of a trained vision encoder. Layers of
            # the merger match only if the vision encoder has layers of the same name.
            vision_layers = family.layers["vision"] if "vision" in parts else ()
            if "merger" in parts and not set(vision_layers) & set(family.layers["merger"]):
                text = "has no adapters: `lora_target: all` matches none of its layers there either"
                draft.note(_FREEZE_KEYS["merger"], "false", text)
                parts -= {"merger"}
            self.set_parts(parts, "lora")
        else:
            self.set_lora_targets(family, parts, "lora_target", targets)
        alpha = config.get_float("lora_alpha") or 2.0 * (config.get_int("lora_rank") or 0)
        self.set_lora_config(alpha, "additional_target")
        self.set_quantization(PARTS, "quantization_bit", config.get_str("quantization_bit"))
