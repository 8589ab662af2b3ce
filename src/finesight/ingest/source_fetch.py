"""Select the files to download from a dataset repository on a hub.

These are the files of a split and the files that they refer to. A dataset card (README.md) may
assign files to splits in its `configs`. Otherwise, splits are inferred from file names such as
data/train-00000-of-00002.parquet or validation/rows.jsonl.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finesight.errors import UserError, describe_choices, suggest_similar_path
from finesight.files.archive import ARCHIVE_SUFFIXES, is_archive, unpack_archive
from finesight.files.bounded_files import load_yaml, reject_special_file
from finesight.files.hub_address import is_hub_address, parse_dataset_address
from finesight.files.storage import check_new_path, make_folder, translate_os_errors, working_folder
from finesight.hub.repository import HubRepository, open_repository
from finesight.hub.url_files import RemoteImages, fetch_url, is_url
from finesight.ingest.folder_listing import ROW_SUFFIXES, list_folder
from finesight.ingest.formats import iter_formats
from finesight.ingest.formats.split_folders import SPLIT_ALIASES
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.record_files import open_record_files
from finesight.ingest.row_reader import is_tar_file, is_webdataset, open_row_file
from finesight.samples.image_file import IMAGE_SUFFIXES
from finesight.samples.line_index import cache_folder

SELF_CONTAINED_SUFFIXES = (".parquet", ".tar")
"""Suffixes of files that contain both rows and their images."""

LABEL_SUFFIXES = (".txt", ".xml", ".yaml", ".yml")
LICENSE_PREFIXES = ("license", "licence", "notice")

METADATA_FILES = frozenset(
    {
        "dataset_infos.json",
        "dataset_info.json",
        "dataset_dict.json",
        "state.json",
        "configuration.json",
        "config.json",
        "croissant.json",
    }
)
"""Lower-case names of JSON files with metadata of other programs, which contain no rows."""

CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**20
"""Maximum number of characters read from a dataset card to find its front matter."""

_FRONT_MATTER = re.compile(r"\ufeff?---[^\S\n]*\n(.*?)^---[^\S\n]*$", re.DOTALL | re.MULTILINE)
"""YAML at the start of a dataset card, between lines of three dashes."""

DEFAULT_SPLIT = "train"

UNPACK_FOLDER = "unpacked"
"""Fixed name of the folder of unpacked files, because the IDs of rows may contain it."""


@dataclass(frozen=True, slots=True)
class SelectedFiles:
    """Files of a dataset repository that belong to a split.

    Attributes:
        row_files: Files with rows, in order. Empty for a dataset that consists of image folders.
        support_files: Files that the rows may reference, such as images and archives.
        split: Name of the selected split, None if the repository has no splits.
    """

    row_files: tuple[str, ...]
    support_files: tuple[str, ...]
    split: str | None = None
    other_splits: tuple[str, ...] = ()


def select_repository_files(repository: HubRepository) -> list[str]:
    """Select the files to download from a dataset repository.

    These are the files of the requested split, or all data files if the address names none,
    together with the dataset card and the license.
    """
    paths, address = repository.paths, repository.address
    extra_files = [
        path for path in paths if path == CARD_FILE or path.lower().startswith(LICENSE_PREFIXES)
    ]
    if address.data_part is None:
        selected = list(filter(is_data_file, paths))
        if not selected:
            raise _build_no_data_error(paths, str(address))
    else:
        selection = select_files(paths, address.data_part, read_card(repository), str(address))
        selected = [*selection.row_files, *selection.support_files]
    return list(dict.fromkeys([*selected, *extra_files]))


def read_card(source: HubRepository | Path) -> str:
    """Read the start of the dataset card of a repository or folder; "" without a card."""
    if isinstance(source, HubRepository):
        has_card = CARD_FILE in source.paths
        source = source.fetch_files([CARD_FILE]) if has_card else source.folder
    card = source / CARD_FILE
    if not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        return file.read(MAX_CARD_BYTES)


def select_files(
    paths: Sequence[str], selector: str | None, card: str, source: str
) -> SelectedFiles:
    """Select the files of a split, a subset, SUBSET/SPLIT, or a single file.

    Args:
        selector: Requested split, subset, SUBSET/SPLIT or file path. None selects the default
            split.
    """
    data = list(filter(is_data_file, paths))
    if not data:
        raise _build_no_data_error(paths, source)
    if selector is not None and selector in paths:
        return _add_support_files((selector,), data)
    # Without a match in the card, a subset is a folder of this name.
    subset = (selector or "").rpartition("/")[0]
    splits = _read_card_splits(data, card, selector) or _infer_splits(
        [path for path in data if not subset or subset in path.split("/")[:-1]]
    )
    if not splits:
        if selector is not None:
            raise _build_no_split_error(selector, [], data, source)
        return SelectedFiles((), tuple(data))
    split = (selector or "").rpartition("/")[2]
    if split not in splits:
        # The selector may be the name of a subset, which has a default split.
        subset_names = (subset["config_name"] for subset in _iter_subsets(card))
        default = DEFAULT_SPLIT if selector in (None, *subset_names) else split
        split = SPLIT_ALIASES.get(split, default)
    if selector is None and split not in splits and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise _build_no_split_error(selector, list(splits), data, source)
    others = tuple(name for name in splits if name != split)
    selection = _add_support_files(tuple(sorted(splits[split])), data)
    return replace(selection, split=split, other_splits=others)


def is_data_file(path: str) -> bool:
    """Return whether a file of a repository has data: rows, images, labels, a license."""
    name = PurePosixPath(path).name.lower()
    if name.startswith(".") or name in METADATA_FILES:
        return False
    suffixes = (*ROW_SUFFIXES, *IMAGE_SUFFIXES, *LABEL_SUFFIXES, *ARCHIVE_SUFFIXES)
    return name.endswith(suffixes) or name.startswith(LICENSE_PREFIXES)


def _is_row_file(path: str) -> bool:
    return path.lower().endswith((*ROW_SUFFIXES, *SELF_CONTAINED_SUFFIXES))


def _add_support_files(rows: tuple[str, ...], data_paths: Sequence[str]) -> SelectedFiles:
    """Add the files that rows may reference, such as images and archives, to row files.

    Parquet and tar files contain their images and need no other files.
    """
    if all(path.lower().endswith(SELF_CONTAINED_SUFFIXES) for path in rows):
        return SelectedFiles(rows, ())
    others = [path for path in data_paths if path not in rows and not _is_row_file(path)]
    tars = [path for path in data_paths if path.lower().endswith(".tar") and path not in rows]
    return SelectedFiles(rows, (*others, *tars))


def _infer_splits(data: Sequence[str]) -> dict[str, list[str]]:
    """Group row files into splits by the last split name in their path.

    If no path contains a split name, all files form the default split.
    """
    splits: dict[str, list[str]] = {}
    rows = [path for path in data if path.lower().endswith(ROW_SUFFIXES)]
    # A tar next to row files contains their images; without row files, it is the dataset.
    for path in rows or [path for path in data if is_archive(path)]:
        words = re.split(r"[^a-z]+", path.lower())
        split_words = [SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES]
        splits.setdefault(split_words[-1] if split_words else "", []).append(path)
    if splits.keys() == {""}:
        return {DEFAULT_SPLIT: splits[""]}
    splits.pop("", None)
    return splits


def _read_card_splits(data: Sequence[str], card: str, selector: str | None) -> dict[str, list[str]]:
    subset_config = _find_subset(card, selector)
    if subset_config is None:
        return {}
    folder = subset_config.get("data_dir")
    if isinstance(folder, str) and not subset_config.get("data_files"):
        return _infer_splits([path for path in data if _matches_glob(path, f"{folder}/*")])
    splits: dict[str, list[str]] = {}
    for split, pattern in _iter_split_patterns(subset_config):
        matching = [path for path in data if _is_row_file(path) and _matches_glob(path, pattern)]
        if matching:
            splits.setdefault(split, []).extend(matching)
    return splits


def _find_subset(card: str, selector: str | None) -> dict[str, Any] | None:
    """Return the entry of `configs` in a dataset card that matches a selector.

    Without a match, the entry marked as default is returned, then the first entry, else None.
    """
    subsets = list(_iter_subsets(card))
    subset_name = (selector or "").partition("/")[0]
    named = [subset for subset in subsets if subset["config_name"] == subset_name]
    defaults = [s for s in subsets if s.get("default") is True or s["config_name"] == "default"]
    return next(iter([*named, *defaults, *subsets]), None)


def _iter_subsets(card: str) -> Iterator[dict[str, Any]]:
    front_matter = _FRONT_MATTER.match(card)
    try:
        head = load_yaml(front_matter[1]) if front_matter else None
    except yaml.YAMLError:  # the card is optional; file names are sufficient
        return
    configs = head.get("configs") if isinstance(head, dict) else None
    for subset in configs if isinstance(configs, list) else []:
        if isinstance(subset, dict) and isinstance(subset.get("config_name"), str):
            yield subset


def _iter_split_patterns(subset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (split, glob pattern) pairs of an entry of `configs` in a dataset card.

    `data_files` is a pattern, a list of patterns, a list of {split, path}, or a mapping from split
    to patterns.
    """
    entries = subset.get("data_files")
    if isinstance(entries, dict) and "path" not in entries:
        entries = [{"split": split, "path": path} for split, path in entries.items()]
    for entry in entries if isinstance(entries, list) else [entries]:
        split, paths = DEFAULT_SPLIT, entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", DEFAULT_SPLIT)), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield split, path


def _matches_glob(path: str, pattern: str) -> bool:
    relative = pattern.removeprefix("./")
    return fnmatch(path, relative) or fnmatch(path, relative.replace("**/", ""))


def _build_no_data_error(paths: Sequence[str], source: str) -> UserError:
    scripts = [path for path in paths if path.endswith(".py")]
    listed = ", ".join(paths[:6]) or "nothing"
    return UserError(
        f"no data file among {len(paths)}: {listed}",
        where=source,
        expected="Parquet, JSON, CSV, archives or images",
        remedy=f"{scripts[0]} generates the data, and remote code is never executed: look"
        " for a copy of the data as files (on Hugging Face possibly @refs/convert/parquet)"
        if scripts
        else "check the name: a model is not a dataset",
    )


def _build_no_split_error(
    selector: str | None, splits: Sequence[str], data: Sequence[str], source: str
) -> UserError:
    rows = [path for path in data if _is_row_file(path)]
    return UserError(
        f"no split {selector!r}"
        if selector is not None
        else "several splits without a train split",
        where=source,
        expected=describe_choices(splits, "split"),
        remedy=f"name a split after a colon, or one of its files: {source}:{(rows or data)[0]}",
    )


@dataclass(frozen=True, slots=True)
class FetchedSource:
    """A locally available dataset: its path, import options, and notes for the user."""

    path: Path
    options: ImportOptions
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def fetch_source(
    source: str, out: Path, options: ImportOptions, hosts: Sequence[str] = ()
) -> Iterator[FetchedSource]:
    """Make a dataset available locally for the duration of the context.

    Only images inside an archive or a downloaded source are accepted, and they are copied to `out`.

    Args:
        source: Local path, archive, hub address or URL.
        hosts: Host names from which sources and images may be downloaded.
    """
    check_new_path(out)
    downloads = cache_folder("downloads")
    if hosts:
        options = replace(options, web_images=RemoteImages(hosts, downloads / "images"))
    is_web_url = is_url(source) and not source.startswith("file://")
    is_remote, path = is_hub_address(source) or is_web_url, Path(source)
    if not is_remote and path.is_dir():
        # A folder with Parquet files may have several splits.
        has_parquet = list_folder(path).files_with_suffix(".parquet")
        prepare = _prepare_folder if has_parquet else FetchedSource
        yield prepare(path, options)
        return
    if not is_remote and not is_archive(source):
        yield FetchedSource(path, options)
        return
    if not is_remote:
        reject_special_file(path)
        if not path.is_file():
            raise UserError(
                "no such file",
                where=str(source),
                expected="an archive",
                remedy=suggest_similar_path(path),
            )
    with working_folder(out.absolute()) as folder:
        work_folder = folder / UNPACK_FOLDER
        copies = is_remote or options.copy_images
        options = replace(options, copy_images=copies, allowed_root=work_folder)
        with _name_source(source, work_folder):
            if is_remote and not is_web_url:
                yield _fetch_hub_dataset(source, work_folder, options)
            else:
                file = fetch_url(source, hosts, downloads) if is_web_url else path
                yield _prepare_file(file, work_folder, options)


@contextlib.contextmanager
def _name_source(source: str, work_folder: Path) -> Iterator[None]:
    """Name the source in an error instead of its temporary folder."""
    try:
        yield
    except UserError as error:
        for name in ("what", "where", "expected", "remedy"):
            text = getattr(error, name)
            if isinstance(text, str):
                setattr(error, name, text.replace(str(work_folder), source))
        raise


def _prepare_file(file: Path, work_folder: Path, options: ImportOptions) -> FetchedSource:
    """Unpack an archive; a WebDataset or a file of another type is returned unchanged."""
    if not is_archive(file.name) or (is_tar_file(file) and is_webdataset(file)):
        return FetchedSource(file, options)
    unpack_archive(file, work_folder)
    return _prepare_folder(_skip_single_folders(work_folder), replace(options, copy_images=True))


def _skip_single_folders(folder: Path) -> Path:
    """Descend into a folder as long as its only entry is another folder."""
    entries = list(folder.iterdir())
    return _skip_single_folders(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


def _prepare_folder(folder: Path, options: ImportOptions) -> FetchedSource:
    """Return a folder if a dataset format can open it, else its row files."""
    paths = [path.relative_to(folder).as_posix() for path in list_folder(folder).files]
    rows = [path for path in paths if path.lower().endswith(ROW_SUFFIXES)]
    if not rows or _is_folder_dataset(folder):
        return FetchedSource(folder, options)
    selection = select_files(paths, None, read_card(folder), str(folder))
    return _select_rows(folder, selection, options)


def _is_folder_dataset(folder: Path) -> bool:
    if any(form.open_dataset and form.open_dataset(folder) for form in iter_formats()):
        return True
    return open_record_files(folder) is not None


def _select_rows(folder: Path, selection: SelectedFiles, options: ImportOptions) -> FetchedSource:
    """Return a single row file as the source, or several row files concatenated.

    Image paths in a single file are relative to its own folder.
    """
    others = ", ".join(selection.other_splits)
    notes = (f"split {selection.split}, not {others}",) if others else ()
    files = tuple(folder / path for path in selection.row_files)
    if len(files) == 1:
        return FetchedSource(files[0], options, notes)
    return FetchedSource(folder, replace(options, row_files=files), notes)


def _fetch_hub_dataset(source: str, work_folder: Path, options: ImportOptions) -> FetchedSource:
    address = parse_dataset_address(source)
    repository = open_repository(address)
    card = read_card(repository)
    selection = select_files(repository.paths, address.data_part, card, str(address))
    if selection.row_files and all(
        path.lower().endswith(SELF_CONTAINED_SUFFIXES) for path in selection.row_files
    ):
        rows, folder = _fetch_needed_files(repository, selection.row_files, options)
        if not is_tar_file(Path(rows[0])) or is_webdataset(folder / rows[0]):
            fetched = _select_rows(folder, replace(selection, row_files=rows), options)
            num_files = len(selection.row_files)
            if len(rows) == num_files:
                return fetched
            num_left = num_files - len(rows)
            note = f"{num_left} of {num_files} files not downloaded: not needed for --rows"
            return replace(fetched, notes=(*fetched.notes, note))
    folder = repository.fetch_files([*selection.row_files, *selection.support_files])
    _link_files(folder, [*selection.row_files, *selection.support_files], work_folder)
    rows = tuple(path for path in selection.row_files if not is_archive(path))
    if rows and not _is_folder_dataset(work_folder):
        return _select_rows(work_folder, replace(selection, row_files=rows), options)
    return _prepare_folder(_skip_single_folders(work_folder), options)


def _fetch_needed_files(
    repository: HubRepository, rows: Sequence[str], options: ImportOptions
) -> tuple[tuple[str, ...], Path]:
    """Download the row files up to the last row that `--rows` and `--limit` select.

    Returns:
        Paths of the downloaded files, and the folder that they are relative to.
    """
    start, stop = options.row_range
    ends = [] if stop is None else [stop]
    if options.limit is not None:
        ends.append((start or 0) + options.limit)
    if not ends or min(start or 0, stop or 0) < 0:
        return tuple(rows), repository.fetch_files(rows)
    fetched: list[str] = []
    num_rows = 0
    for path in rows:
        if num_rows >= min(ends) and fetched:
            break
        fetched.append(path)
        file = repository.fetch_files([path]) / path
        num_rows += open_row_file(file, options.encoding).num_rows
    return tuple(fetched), repository.fetch_files(fetched)


def _link_files(folder: Path, paths: Sequence[str], work_folder: Path) -> None:
    """Link cached files below `work_folder`, and unpack archives in their folders."""
    for path in paths:
        target = work_folder / path
        if not is_archive(path):
            _add_file(folder / path, target, path, Path.symlink_to)
            continue
        unpacked = work_folder / ".unpacked"
        unpack_archive(folder / path, unpacked)
        for file in filter(Path.is_file, sorted(unpacked.rglob("*"))):
            _add_file(
                file, target.parent / file.relative_to(unpacked), path, lambda a, b: b.rename(a)
            )
        shutil.rmtree(unpacked)


def _add_file(
    file: Path, target: Path, source: str, transfer: Callable[[Path, Path], object]
) -> None:
    """Link or move a file to its target path; an identical existing file is accepted.

    Each archive may have its own license file; the first one is used.
    """
    with translate_os_errors(target):
        make_folder(target.parent)
        if not os.path.lexists(target):
            transfer(target, file.resolve())
        elif not target.is_file() or not (
            target.name.lower().startswith(LICENSE_PREFIXES) or filecmp.cmp(file, target, False)
        ):
            raise UserError(
                f"{target.name} is duplicated in this repository, with different content",
                where=source,
                expected="one file per path after the archives are unpacked",
                remedy="download it, unpack the archives into folders of their own, and"
                " import the one that you want",
            )
