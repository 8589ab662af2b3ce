"""Fetch a dataset for import: local path, archive, hub dataset or web address.

Hubs and the web are accessed only for sources with the prefix hf:, modelscope: or https://.
Downloads stay in the cache, see `repository`. Archives are unpacked next to the output folder and
deleted after the import.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finesight.data.formats import FORMATS
from finesight.data.formats.folder_listing import ROW_SUFFIXES, list_folder
from finesight.data.hub_files import (
    LICENSE_PREFIXES,
    SELF_CONTAINED_SUFFIXES,
    SelectedFiles,
    read_card,
    read_local_card,
    select_files,
)
from finesight.data.import_source import ImportOptions
from finesight.data.row_reader import open_row_file
from finesight.data.webdataset import is_tar_file, is_webdataset, open_webdataset
from finesight.errors import UserError, suggest_similar_path
from finesight.hub.address import is_hub_address, parse_dataset_address
from finesight.hub.archive import is_archive, unpack_archive
from finesight.hub.repository import HubRepository, open_repository
from finesight.hub.url_files import RemoteImages, fetch_url, is_url
from finesight.regular_file import reject_special_file
from finesight.storage import make_folder, raise_if_exists, translate_os_errors, working_folder


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
        out: Output folder of the import.
        options: Import options.
        hosts: Host names from which sources and images may be downloaded.

    Raises:
        UserError: The source is unavailable, or `out` exists.
    """
    raise_if_exists(out)
    if hosts:
        options = replace(
            options, web_images=RemoteImages(hosts, _download_cache_folder() / "images")
        )
    is_web_url = is_url(source) and not source.startswith("file://")
    if is_hub_address(source) or is_web_url:
        with _make_unpack_folder(out) as work_folder:
            copy_options = replace(options, copy_images=True, allowed_root=work_folder)
            if is_web_url:
                yield _prepare_file(
                    fetch_url(source, hosts, _download_cache_folder()), work_folder, copy_options
                )
            else:
                yield _fetch_hub_dataset(source, work_folder, copy_options)
    elif Path(source).is_dir():
        yield _prepare_local_folder(Path(source), options)
    elif not is_archive(source):
        yield FetchedSource(Path(source), options)
    else:
        _check_archive_exists(Path(source))
        with _make_unpack_folder(out) as work_folder:
            yield _prepare_file(
                Path(source), work_folder, replace(options, allowed_root=work_folder)
            )


@contextlib.contextmanager
def _make_unpack_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder for unpacked files.

    Its name is fixed, because the IDs of rows may contain it.
    """
    with working_folder(out.absolute()) as folder:
        yield folder / "unpacked"


def _download_cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "downloads"


def _prepare_file(file: Path, work_folder: Path, options: ImportOptions) -> FetchedSource:
    """Unpack an archive; a WebDataset or a file of another type is returned unchanged."""
    if not is_archive(file.name):
        return FetchedSource(file, options)
    if is_tar_file(file) and is_webdataset(file):
        return FetchedSource(file, options)
    unpack_archive(file, work_folder)
    return _prepare_folder(_skip_single_folders(work_folder), replace(options, copy_images=True))


def _check_archive_exists(archive: Path) -> None:
    reject_special_file(archive)
    if not archive.is_file():
        raise UserError(
            "no such file",
            where=str(archive),
            expected="an archive",
            remedy=suggest_similar_path(archive),
        )


def _skip_single_folders(folder: Path) -> Path:
    """Descend into a folder as long as its only entry is another folder."""
    entries = list(folder.iterdir())
    return _skip_single_folders(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


def _prepare_local_folder(folder: Path, options: ImportOptions) -> FetchedSource:
    """Return a local folder unchanged or, if it contains Parquet files, select its rows."""
    listing = list_folder(folder)
    suffixes = {suffix for suffix in ROW_SUFFIXES if listing.files_with_suffix(suffix)}
    return (
        _prepare_folder(folder, options)
        if ".parquet" in suffixes
        else FetchedSource(folder, options)
    )


def _prepare_folder(folder: Path, options: ImportOptions) -> FetchedSource:
    """Return a folder if a dataset format can open it, else its row files."""
    paths = [path.relative_to(folder).as_posix() for path in list_folder(folder).files]
    rows = [path for path in paths if path.lower().endswith(ROW_SUFFIXES)]
    if not rows or _is_folder_dataset(folder):
        return FetchedSource(folder, options)
    selection = select_files(paths, None, read_local_card(folder), str(folder))
    return _select_rows(folder, selection, options)


def _is_folder_dataset(folder: Path) -> bool:
    return any(
        form.open_dataset is not None and form.open_dataset(folder) is not None for form in FORMATS
    )


def _select_rows(folder: Path, selection: SelectedFiles, options: ImportOptions) -> FetchedSource:
    """Return a single row file as the source, or several row files concatenated.

    Image paths in a single file are relative to its own folder.
    """
    notes = (
        (f"split {selection.split}, not {', '.join(selection.other_splits)}",)
        if selection.other_splits
        else ()
    )
    files = tuple(folder / path for path in selection.row_files)
    if len(files) == 1:
        return FetchedSource(files[0], options, notes)
    return FetchedSource(folder, replace(options, row_files=files), notes)


def _fetch_hub_dataset(source: str, work_folder: Path, options: ImportOptions) -> FetchedSource:
    address = parse_dataset_address(source)
    repository = open_repository(address)
    selection = select_files(
        repository.paths, address.data_part, read_card(repository), str(address)
    )
    if selection.row_files and all(
        path.lower().endswith(SELF_CONTAINED_SUFFIXES) for path in selection.row_files
    ):
        rows, folder = _fetch_needed_files(repository, selection.row_files, options)
        if not is_tar_file(Path(rows[0])) or is_webdataset(folder / rows[0]):
            fetched = _select_rows(folder, replace(selection, row_files=rows), options)
            num_skipped = len(selection.row_files) - len(rows)
            note = (
                f"{num_skipped} of {len(selection.row_files)} files not downloaded:"
                " not needed for --rows",
            )
            return replace(fetched, notes=(*fetched.notes, *(note if num_skipped else ())))
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
    max_rows = _max_row(options)
    if max_rows is None:
        return tuple(rows), repository.fetch_files(rows)
    fetched: list[str] = []
    num_rows = 0
    for path in rows:
        if num_rows >= max_rows and fetched:
            break
        fetched.append(path)
        file = repository.fetch_files([path]) / path
        num_rows += (open_webdataset(file) if is_tar_file(file) else open_row_file(file)).num_rows
    return tuple(fetched), repository.fetch_files(fetched)


def _max_row(options: ImportOptions) -> int | None:
    """Return the number of leading rows that `--rows` and `--limit` need; None for all."""
    start, stop = options.row_range
    if (start or 0) < 0 or (stop is not None and stop < 0):
        return None
    ends = [] if stop is None else [stop]
    if options.limit is not None:
        ends.append((start or 0) + options.limit)
    return min(ends, default=None)


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
            _add_file(file, target.parent / file.relative_to(unpacked), path, _move_file)
        shutil.rmtree(unpacked)


def _is_license(file: Path) -> bool:
    return file.name.lower().startswith(LICENSE_PREFIXES)


def _move_file(target: Path, file: Path) -> None:
    file.rename(target)


def _add_file(
    file: Path, target: Path, source: str, transfer: Callable[[Path, Path], None]
) -> None:
    """Link or move a file to its target path; an identical existing file is accepted.

    Each archive may have its own license file; the first one is used.

    Raises:
        UserError: The target exists with different content.
    """
    with translate_os_errors(target):
        make_folder(target.parent)
        if not os.path.lexists(target):
            transfer(target, file.resolve())
        elif not (target.is_file() and (_is_license(target) or filecmp.cmp(file, target, False))):
            raise UserError(
                f"{target.name} is duplicated in this repository, with different content",
                where=source,
                expected="one file per path after the archives are unpacked",
                remedy="`finesight download` it, unpack the archives into folders of their own, and"
                " import the one that you want",
            )
