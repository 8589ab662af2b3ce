"""Which files of a data repository are meant: those of a split, and what their rows speak of.

A card (README.md) may say which files are which split, as `configs` in its head. Else names tell:
data/train-00000-of-00002.parquet, validation/rows.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finesight.data.formats.inventory import PICTURE_SUFFIXES, ROW_SUFFIXES
from finesight.errors import UserError
from finesight.remote.archive import ARCHIVES, is_archive
from finesight.remote.repository import Repository
from finesight.yaml_text import parsed

WHOLE = (".parquet", ".tar")
"""Endings of files that hold their pictures with their rows."""

LABELS = (".txt", ".xml", ".yaml", ".yml")
LEGAL = ("license", "licence", "notice")

DESCRIPTIONS = frozenset(
    {
        *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
        *("configuration.json", "config.json", "croissant.json"),
    }
)
"""JSON that describes a data set to other programs. It is not read: some of it is broken."""

CARD = "README.md"
CARD_BYTES = 2**20
"""Of a card so much is read; its head is what counts."""

USUAL = "train"
_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files that hold the rows, in order, and the others that these may need.

    `split` is how it was found, None where the repository has no splits; `others` are splits that
    were not chosen. Without rows the whole repository is a data set of folders.
    """

    rows: tuple[str, ...]
    needed: tuple[str, ...]
    split: str | None = None
    others: tuple[str, ...] = ()


def data_files(paths: Sequence[str]) -> list[str]:
    """The files that can be data: rows, pictures, labels, archives, the licence; never code."""
    return [path for path in paths if _is_data(path)]


def repository_files(repository: Repository) -> list[str]:
    """What is fetched of a data repository: the files of the part that its address names, or all
    that can be data; the card and the licence with them. Raises UserError as `choose` does."""
    paths, address = repository.paths, repository.address
    besides = [path for path in paths if path == CARD or path.lower().startswith(LEGAL)]
    if address.part is None:
        chosen = data_files(paths)
        if not chosen:
            raise _no_data(paths, str(address))
    else:
        found = choose(paths, address.part, read_card(repository), str(address))
        chosen = [*found.rows, *found.needed]
    return list(dict.fromkeys([*chosen, *besides]))


def read_card(repository: Repository) -> str:
    """The beginning of a repository's card, fetched if need be; nothing where it has none."""
    return card_in(repository.fetch([CARD])) if CARD in repository.paths else ""


def card_in(folder: Path) -> str:
    """The beginning of the card in a folder; nothing where it has none."""
    card = folder / CARD
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        return file.read(CARD_BYTES)


def choose(paths: Sequence[str], part: str | None, card: str, source: str) -> Chosen:
    """The files of `part`: a split, SUBSET/SPLIT, a subset, or a file; None is the usual split.

    `card` is the text of README.md. Raises UserError where it is not plain which are meant.
    """
    data = data_files(paths)
    if not data:
        raise _no_data(paths, source)
    if part is not None and part in paths:
        return _with_needs((part,), data)
    splits = _splits_of_card(data, card, part) or _splits_by_name(_of_subset(data, part))
    if not splits:
        if part is not None:
            raise _no_such_part(part, [], data, source)
        return Chosen((), tuple(data))
    wanted = (part or "").rpartition("/")[2]
    if wanted not in splits:
        # Of a part that is a subset the usual split is meant, as of none.
        wanted = _WORDS.get(wanted, USUAL if part is None or _is_subset(card, part) else wanted)
    if part is None and wanted not in splits and len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise _no_such_part(part, list(splits), data, source)
    others = tuple(name for name in splits if name != wanted)
    found = _with_needs(tuple(sorted(splits[wanted])), data)
    return Chosen(found.rows, found.needed, wanted, others)


def _is_data(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    if name.startswith(".") or name in DESCRIPTIONS:
        return False
    return name.endswith((*ROW_SUFFIXES, *PICTURE_SUFFIXES, *LABELS, *ARCHIVES)) or name.startswith(
        LEGAL
    )


def _holds_rows(path: str) -> bool:
    return path.lower().endswith((*ROW_SUFFIXES, *WHOLE))


def _with_needs(rows: tuple[str, ...], data: Sequence[str]) -> Chosen:
    """Parquet and tars hold their pictures; other rows name them, wherever they lie."""
    if all(path.lower().endswith(WHOLE) for path in rows):
        return Chosen(rows, ())
    others = [path for path in data if path not in rows and not _holds_rows(path)]
    tars = [path for path in data if path.lower().endswith(".tar") and path not in rows]
    return Chosen(rows, (*others, *tars))


def _splits_by_name(data: Sequence[str]) -> dict[str, list[str]]:
    """Files with rows by the last word of their path that is a split's; without such a word they
    are all one."""
    splits: dict[str, list[str]] = {}
    rows = [path for path in data if path.lower().endswith(ROW_SUFFIXES)]
    # A tar beside rows holds their pictures; alone it is the data.
    for path in rows or [path for path in data if is_archive(path)]:
        words = re.split(r"[^a-z]+", path.lower())
        named = [_WORDS[word] for word in words if word in _WORDS]
        splits.setdefault(named[-1] if named else "", []).append(path)
    if splits.keys() == {""}:
        return {USUAL: splits[""]}
    splits.pop("", None)
    return splits


def _of_subset(data: Sequence[str], part: str | None) -> Sequence[str]:
    """Of a subset that no card knows the files in folders of its name."""
    subset = (part or "").rpartition("/")[0]
    return [path for path in data if subset in path.split("/")[:-1]] if subset else data


def _splits_of_card(data: Sequence[str], card: str, part: str | None) -> dict[str, list[str]]:
    subset = _subset(card, part)
    if subset is None:
        return {}
    folder = subset.get("data_dir")
    if isinstance(folder, str) and not subset.get("data_files"):
        return _splits_by_name([path for path in data if _fits(path, f"{folder}/*")])
    splits: dict[str, list[str]] = {}
    for split, pattern in _patterns(subset):
        found = [path for path in data if _holds_rows(path) and _fits(path, pattern)]
        if found:
            splits.setdefault(split, []).extend(found)
    return splits


def _subset(card: str, part: str | None) -> dict[str, Any] | None:
    """The entry of `configs` that is meant: the named one, the one marked default, the first."""
    subsets = list(_subsets(card))
    named = (part or "").partition("/")[0]
    for subset in subsets:
        if subset["config_name"] == named:
            return subset
    marked = [s for s in subsets if s.get("default") is True or s["config_name"] == "default"]
    return next(iter([*marked, *subsets]), None)


def _is_subset(card: str, part: str) -> bool:
    return part in [subset["config_name"] for subset in _subsets(card)]


def _subsets(card: str) -> Iterator[dict[str, Any]]:
    try:
        head = parsed(_head(card.removeprefix("\ufeff")))
    except yaml.YAMLError:  # a card is for people; names tell as well
        return
    configs = head.get("configs") if isinstance(head, dict) else None
    for subset in configs if isinstance(configs, list) else []:
        if isinstance(subset, dict) and isinstance(subset.get("config_name"), str):
            yield subset


def _head(card: str) -> str:
    """What stands between the first line and the next one of three dashes."""
    first, *lines = card.split("\n")
    ends = (number for number, line in enumerate(lines) if line.rstrip() == "---")
    end = next(ends, None) if first.rstrip() == "---" else None
    return "\n".join(lines[:end]) if end is not None else ""


def _patterns(subset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Splits and patterns of an entry: a pattern, several, {split, path} for each split, or the
    patterns by split."""
    given = subset.get("data_files")
    if isinstance(given, dict) and "path" not in given:
        given = [{"split": split, "path": path} for split, path in given.items()]
    for entry in given if isinstance(given, list) else [given]:
        split, paths = USUAL, entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", USUAL)), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield split, path


def _fits(path: str, pattern: str) -> bool:
    plain = pattern.removeprefix("./")
    return fnmatch(path, plain) or fnmatch(path, plain.replace("**/", ""))


def _no_data(paths: Sequence[str], source: str) -> UserError:
    scripts = [path for path in paths if path.endswith(".py")]
    kept = ", ".join(paths[:6]) or "nothing"
    return UserError(
        f"no file of data among {len(paths)}: {kept}",
        where=source,
        expected="Parquet, JSON, CSV, archives or pictures",
        remedy=f"{scripts[0]} makes the data when it runs, and code of others is never run: look"
        " for a copy of the data as files (on Hugging Face perhaps @refs/convert/parquet)"
        if scripts
        else "check the name: a model is no data set",
    )


def _no_such_part(
    part: str | None, splits: Sequence[str], data: Sequence[str], source: str
) -> UserError:
    rows = [path for path in data if _holds_rows(path)]
    return UserError(
        f"no split {part!r}" if part is not None else "several splits, none of them called train",
        where=source,
        expected=f"one of {', '.join(splits)}" if splits else "no split, as it has none",
        remedy=f"name a split after a colon, or one of its files: {source}:{(rows or data)[0]}",
    )
