"""Read datasets of LLaMA-Factory from its dataset_info.json."""

from __future__ import annotations

import os
from pathlib import Path

from finesight.bounded_files import read_json_object
from finesight.convert.external_config import ExternalConfig
from finesight.convert.import_commands import DatasetSource
from finesight.convert.recipe_draft import RecipeDraft
from finesight.errors import UserError

DATASET_INFO_FILE = "dataset_info.json"

_STANDARD_COLUMNS = {
    "messages": ("conversations", "messages"),
    "images": ("images",),
    "prompt": ("instruction",),
    "query": ("input",),
    "response": ("output",),
    "system": ("system",),
    "history": ("history",),
}
"""Column names that `finesight data import` detects without `--map`, by LLaMA-Factory role."""


def read_dataset_sources(
    config: ExternalConfig, draft: RecipeDraft, key: str
) -> list[DatasetSource]:
    """Return the datasets that a LLaMA-Factory setting lists, with their files or hub addresses.

    Args:
        config: Configuration with `dataset_dir`, the folder of dataset_info.json.
        draft: Receives notes for the user.
        key: Setting with the names, `dataset` or `eval_dataset`.

    Raises UserError for a name that dataset_info.json does not contain.
    """
    names = config.get_list(key)
    folder = config.get_str("dataset_dir") or "data"
    if not names:
        return []
    if folder == "ONLINE":
        return [_apply_limit(config, DatasetSource(_hub_address(config, name))) for name in names]
    info = _load_dataset_info(config, folder)
    if info is None:
        text = (
            f"{folder}/{DATASET_INFO_FILE} does not exist: correct the commands below, or run"
            " this command in its folder"
        )
        draft.add_note("dataset_dir", folder, text)
        return [_apply_limit(config, DatasetSource(f"{folder}/{name}.json")) for name in names]
    path, entries = info
    return [
        _apply_limit(config, _build_source(config, draft, path, name, entries)) for name in names
    ]


def _apply_limit(config: ExternalConfig, source: DatasetSource) -> DatasetSource:
    max_samples = config.get_int("max_samples")
    if max_samples is not None and max_samples < 1:
        raise config.build_error("max_samples", "an integer above 0")
    limits = [limit for limit in (source.limit, max_samples) if limit is not None]
    return DatasetSource(source.name, min(limits, default=None), source.title)


def _hub_address(config: ExternalConfig, name: str) -> str:
    return f"{'modelscope' if config.is_env_enabled('USE_MODELSCOPE_HUB') else 'hf'}:{name}"


def _load_dataset_info(
    config: ExternalConfig, folder: str
) -> tuple[Path, dict[str, object]] | None:
    """Load dataset_info.json, and return its folder and content.

    `folder` is searched relative to the working directory, then to the folder of the configuration
    and its parents. Returns None if the file does not exist.
    """
    config_folder = Path(config.where).parent
    candidates = (
        Path(folder),
        *(parent / folder for parent in (config_folder, *config_folder.resolve().parents[:3])),
    )
    for candidate in candidates:
        path = candidate / DATASET_INFO_FILE
        if os.path.exists(path):
            expected = "descriptions of datasets by name"
            return candidate, read_json_object(path, expected=expected, remedy="correct the file")
    return None


def _build_error(where: str, what: str, expected: str) -> UserError:
    return UserError(what, where=where, expected=expected, remedy="correct the file")


def _build_source(
    config: ExternalConfig, draft: RecipeDraft, folder: Path, name: str, entries: dict[str, object]
) -> DatasetSource:
    entry = entries.get(name)
    if not isinstance(entry, dict):
        known_names = ", ".join(list(entries)[:8])
        raise UserError(
            f"does not contain {name}",
            where=str(folder / DATASET_INFO_FILE),
            expected=f"one of {known_names}",
            remedy=f"add {name}, or correct the name in {config.where}",
        )
    if entry.get("ranking"):
        raise _build_error(
            str(folder / DATASET_INFO_FILE),
            f"{name} is for preference learning",
            "supervised fine-tuning data",
        )
    _note_renamed_columns(draft, name, entry)
    limit = entry.get("num_samples")
    if isinstance(limit, int) and limit > 0:
        text = "the first ones are used; LLaMA-Factory draws random ones"
        draft.add_difference(f"{name}: num_samples", limit, text)
    else:
        limit = None
    hub_address = _get_hub_address(config, entry)
    if hub_address is not None:
        return DatasetSource(hub_address, limit, name)
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise _build_error(
            str(folder / DATASET_INFO_FILE),
            f"{name} has no file_name",
            "a file, or the name of a dataset on a hub",
        )
    media = config.get_str("media_dir")
    if media is not None and Path(media) != (folder / file).parent:
        text = (
            "run the import where its paths are valid: relative paths start at the data file"
            " or the current folder"
        )
        draft.add_note("media_dir", media, text)
    return DatasetSource(str(folder / file), limit, name)


def _get_hub_address(config: ExternalConfig, entry: dict[str, object]) -> str | None:
    """Return the hub address of a dataset_info.json entry; None for a local file.

    If the entry names both hubs, USE_MODELSCOPE_HUB decides, as in LLaMA-Factory.
    """
    hf, modelscope = entry.get("hf_hub_url"), entry.get("ms_hub_url")
    prefers_modelscope = config.is_env_enabled("USE_MODELSCOPE_HUB")
    if isinstance(modelscope, str) and (prefers_modelscope or not isinstance(hf, str)):
        hub = f"modelscope:{modelscope}"
    elif isinstance(hf, str):
        hub = f"hf:{hf}"
    else:
        return None
    subset, split = entry.get("subset"), entry.get("split")
    if isinstance(subset, str):
        return f"{hub}:{subset}/{split if isinstance(split, str) else 'train'}"
    return f"{hub}:{split}" if isinstance(split, str) and split != "train" else hub


def _note_renamed_columns(draft: RecipeDraft, name: str, entry: dict[str, object]) -> None:
    columns = entry.get("columns")
    if not isinstance(columns, dict):
        return
    renamed = [
        f"{role}={column}"
        for role, column in columns.items()
        if column not in _STANDARD_COLUMNS.get(str(role), ()) and column is not None
    ]
    if renamed:
        text = "nonstandard column names: rename them, or map them with --map in the command below"
        draft.add_note(f"{name}: columns", ", ".join(renamed), text)
