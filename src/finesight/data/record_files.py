"""Folders with a JSON file for each image: the rows are the objects in these files.

The file of `a.jpg` is `a.json` or `a.jpg.json`, or `a.txt` if it contains an object. It is in the
folder of the image, or in another one, such as `images` and `annotations`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from finesight.bounded_files import parse_unique_json
from finesight.data.folder_listing import ROW_SUFFIXES, FolderListing, list_folder
from finesight.data.line_index import UTF8_BOM
from finesight.data.row_reader import (
    SNIFF_BYTES,
    Record,
    RowReader,
    SourceRow,
    read_first_records,
    rows_from_items,
)
from finesight.data.sample import MAX_LABEL_FILE_BYTES, check_json, read_data_file
from finesight.errors import UserError, format_count

IMAGE_KEY = "image"
"""Key of the image in a row."""

OTHER_IMAGE_KEY = "image_file"
"""Key of the image in a row whose object has something else under `image`."""

RECORD_SUFFIXES = (".json", ".txt")


def open_record_files(source: Path) -> RowReader | None:
    """Open the objects in a folder as rows; None without an object that belongs to an image.

    A folder with a file of rows is no such folder: its JSON files may be something else.

    Raises:
        UserError: Several objects belong to the same image, or an object to several images.
    """
    listing = list_folder(source)
    records: list[Path] = []
    for file in listing.files:
        if _has_object(file):
            records.append(file)
        elif file.suffix.lower() != ".json" and file.name.lower().endswith(ROW_SUFFIXES):
            return None
    images_by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for image in listing.image_files():
        images_by_name[image.stem].append(image)
        images_by_name[image.name].append(image)
    pairs: list[tuple[Path, Path]] = []
    folders: dict[str, None] = {}
    for file in records:
        found = _find_image(file, images_by_name[file.stem])
        if found is not None:
            pairs.append((file, found))
            folders[str(found.parent.relative_to(source))] = None
    if not pairs:
        return None
    _check_single_records(source, pairs)

    def make_row(row_number: int, pair: tuple[Path, Path]) -> SourceRow:
        file, image = pair
        record = _add_image(read_record_file(file), image)
        return SourceRow(row_number, str(file), record, file.stem)

    note = f"{format_count(len(pairs), 'image')} with a JSON file of the same name"
    if len(folders) > 1:
        note += f", in {format_count(len(folders), 'folder')}: {', '.join(folders)[:80]}"
    used = set(itertools.chain(*pairs))
    unused = tuple(file for file in listing.files if file not in used)
    if unused:
        note += f"; other files, not read: {FolderListing(source, unused)}"
    return rows_from_items(pairs, make_row, note)


def open_json_objects(source: Path) -> RowReader | None:
    """Open the JSON objects in a folder as rows, for a mapping; None without one.

    The objects belong to no image, such as a file for each episode of screenshots.
    """
    listing = list_folder(source)
    files: list[Path] = []
    for file in listing.files:
        if file.suffix.lower() == ".json" and _has_object(file):
            files.append(file)
    if not files:
        return None

    def make_row(row_number: int, file: Path) -> SourceRow:
        return SourceRow(row_number, str(file), read_record_file(file), file.stem)

    return rows_from_items(files, make_row, format_count(len(files), "JSON file"))


def _add_image(record: Record, image: Path) -> Record:
    """Return an object with the path of its image.

    An `image` of its own may be the name of this file. Any other value is not replaced.
    """
    own = record.get(IMAGE_KEY)
    is_name = isinstance(own, str) and PureWindowsPath(own).name == image.name
    if own is not None and not is_name:
        return {OTHER_IMAGE_KEY: str(image), **record}
    others = {key: value for key, value in record.items() if key != IMAGE_KEY}
    return {IMAGE_KEY: str(image), **others}


def read_preview_records(source: Path, count: int) -> list[Record]:
    """Return the first records of a row file or of a folder of objects; none for other folders.

    Raises UserError if a file is not readable.
    """
    if not source.is_dir():
        return read_first_records(source, count)
    rows = open_record_files(source)
    if rows is None:
        return []
    return [row.record for row in rows.iter_range(0, count)]


def read_record_file(path: Path) -> Record:
    """Read the JSON object of an image. Raises UserError for other content."""
    content = read_data_file(path, MAX_LABEL_FILE_BYTES)
    check_json(content, str(path))
    record: Any = None
    reason = "no object"
    try:
        record = parse_unique_json(content)
    except ValueError as error:
        reason = f"not valid JSON: {str(error)[:200]}"
    if not isinstance(record, dict):
        raise UserError(
            reason,
            where=str(path),
            expected="a JSON object with the labels of an image",
            remedy="correct the file, or remove it",
        )
    return record


def _has_object(path: Path) -> bool:
    """Return whether a file may contain a JSON object, judged by its name and first bytes."""
    if path.suffix.lower() not in RECORD_SUFFIXES or not path.is_file():
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip().startswith(b"{")
    return False


def _find_image(record: Path, candidates: Sequence[Path]) -> Path | None:
    """Return the image of an object: that in the nearest folder, or in one of the same name.

    Raises:
        UserError: Several images have the name of the object.
    """
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        depths = [_count_common_folders(image, record) for image in found]
        found = [image for image, depth in zip(found, depths, strict=True) if depth == max(depths)]
    in_same_split = [image for image in found if image.parent.name == record.parent.name]
    found = in_same_split or found
    if len(found) > 1:
        raise UserError(
            f"several images may belong to the file: {found[0]} and {found[1]}",
            where=str(record),
            expected="one image with the name of the JSON file",
            remedy=f"move the folder {found[1].parent} elsewhere, or rename its images",
        )
    return found[0] if found else None


def _count_common_folders(first: Path, second: Path) -> int:
    """Return the number of folders that contain both files."""
    return len(os.path.commonpath([first.parent, second.parent]).split(os.sep))


def _check_single_records(source: Path, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Raise UserError if several objects belong to the same image."""
    files: dict[Path, Path] = {}
    for file, image in pairs:
        other = files.setdefault(image, file)
        if other is file:
            continue
        raise UserError(
            f"two JSON files of the image {image.name}: {other} and {file}",
            where=str(source),
            expected="one JSON file for each image",
            remedy=f"move {file} and others of its kind out of the folder",
        )
