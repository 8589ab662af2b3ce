"""Folders of the splits of a dataset, such as train and validation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

SPLIT_ALIASES = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""Split of a dataset by the name of its folder or file."""


def order_by_split(root: Path, files: Sequence[Path]) -> tuple[list[Path], int, str]:
    """Order files of split folders: training, then validation.

    Returns:
        The files of both splits, the number of training files, and a description of the splits,
            which is empty without split folders. The test split counts as validation if there is
            no other one, and is left out otherwise.
    """
    splits: defaultdict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        *folders, _ = file.relative_to(root).parts
        splits[SPLIT_ALIASES.get(folders[0].lower()) if folders else None].append(file)
    if None in splits or "train" not in splits:
        return list(files), len(files), ""
    validation = "validation" if "validation" in splits else "test"
    note = f", {validation} folder for validation" if validation in splits else ", training folder"
    if validation == "validation" and "test" in splits:
        note += ", test folder not read"
    return splits["train"] + splits.get(validation, []), len(splits["train"]), note
