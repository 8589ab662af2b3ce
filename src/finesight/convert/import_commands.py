"""Set the data files of a converted recipe, and build the commands that import them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from finesight.convert.recipe_draft import RecipeDraft

SAMPLES_FOLDER = "samples"
"""Folder into which the printed commands import all datasets."""


@dataclass(frozen=True)
class DatasetSource:
    """Dataset of the other program, as a source for `finesight data import`.

    Attributes:
        name: File, folder or hub address.
        limit: Number of rows from the start; None for all.
        title: Name of the dataset in the other program, if it differs from the file name.
    """

    name: str
    limit: int | None = None
    title: str | None = None

    def folder_name(self) -> str:
        """Return the folder name for the samples, from title, file or hub name."""
        name = self.name
        if name.startswith(("hf:", "modelscope:")):
            name = name.split(":")[1]
        path = Path(name)
        stem = path.stem if path.stem not in _GENERIC_NAMES else path.parent.name or path.stem
        return re.sub(r"[^\w.-]+", "-", self.title or stem).strip("-.") or "data"


_GENERIC_NAMES = ("data", "train", "dataset")
"""File names that do not identify a dataset, so that the name of their folder is used."""


@dataclass(frozen=True)
class ValidationSource:
    """Validation data: separate datasets, or import options that split every training dataset."""

    sources: tuple[DatasetSource, ...] = ()
    options: tuple[str, ...] = ()


@dataclass
class _FolderNames:
    used: set[str] = field(default_factory=set)

    def allocate(self, stem: str) -> str:
        name, suffix = stem, 2
        while name in self.used:
            name, suffix = f"{stem}-{suffix}", suffix + 1
        self.used.add(name)
        return f"{SAMPLES_FOLDER}/{name}"


def set_data_files(
    draft: RecipeDraft, sources: list[DatasetSource], validation: ValidationSource
) -> None:
    """Set `data.train` and `data.eval` of the recipe, and add the commands that import them."""
    folder_names = _FolderNames()
    train_folders = [
        _add_import(draft, folder_names, source, validation.options) for source in sources
    ]
    file_stem = "train" if validation.options else "data"
    train = [f"{folder}/{file_stem}.jsonl" for folder in train_folders]
    draft.set(
        "data.train", _unwrap_single(train), "from the commands printed by `finesight convert`"
    )
    if validation.options:
        draft.set("data.eval", _unwrap_single([f"{folder}/eval.jsonl" for folder in train_folders]))
    elif validation.sources:
        eval_folders = [
            _add_import(draft, folder_names, source, ()) for source in validation.sources
        ]
        draft.set("data.eval", _unwrap_single([f"{folder}/data.jsonl" for folder in eval_folders]))


def _add_import(
    draft: RecipeDraft, folder_names: _FolderNames, source: DatasetSource, options: tuple[str, ...]
) -> str:
    out_folder = folder_names.allocate(source.folder_name())
    limit_options = () if source.limit is None else ("--limit", str(source.limit))
    draft.import_commands.append(
        shlex.join(
            ["finesight", "data", "import", source.name, out_folder, *limit_options, *options]
        )
    )
    return out_folder


def _unwrap_single(items: list[str]) -> str | list[object]:
    return items[0] if len(items) == 1 else list[object](items)


def split_options(fraction: float) -> tuple[str, ...]:
    """Return the import options that use a fraction of the rows for validation."""
    return ("--train-fraction", f"{round(1 - fraction, 6):g}")
