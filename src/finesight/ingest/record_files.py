"""Folders with a JSON file for each image: the rows are the objects in these files.

The file of `a.jpg` is `a.json` or `a.jpg.json`, or `a.txt` if it contains an object. It is in the
folder of the image, or in another one, such as `images` and `annotations`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import parse_unique_json
from finesight.ingest.folder_listing import ROW_SUFFIXES, FolderListing, list_folder
from finesight.ingest.row_reader import (
    SNIFF_BYTES,
    Record,
    RowReader,
    SourceRow,
    read_first_records,
    rows_from_items,
)
from finesight.samples.line_index import UTF8_BOM
from finesight.samples.sample import MAX_LABEL_FILE_BYTES, check_json, read_data_file

IMAGE_KEY = "image"
"""Key of the image in a row."""

OTHER_IMAGE_KEY = "image_file"
"""Key of the image in a row whose object has something else under `image`."""

RECORD_SUFFIXES = (".json", ".txt")


def open_record_files(source: Path, *, needs_images: bool = True) -> RowReader | None:
    """Open the objects in a folder as rows. None without objects of images.

    A folder with a file of rows is no such folder: its JSON files may be something else.

    Args:
        needs_images: False for a mapping: all JSON objects are rows, such as a file for each
            episode of screenshots.

    Raises:
        UserError: Several objects belong to the same image, or an object to several images.
    """
    listing = list_folder(source)
    if needs_images and any(map(_has_rows, listing.files)):
        return None
    images = _find_images(listing, needs_images=needs_images)
    paired: dict[Path, Path] = {}
    folders: dict[str, None] = {}
    for file, image in images.items():
        if image is not None:
            paired[file] = image
            folders[str(image.parent.relative_to(source))] = None
    if not images or (needs_images and not paired):
        return None
    _check_single_records(source, paired)

    def make_row(row_number: int, item: tuple[Path, Path | None]) -> SourceRow:
        file, image = item
        record = read_record_file(file)
        if image is not None:
            record = _add_image(record, image)
        return SourceRow(row_number, str(file), record, file.stem)

    note = "no image has the name of a JSON file"
    if paired:
        note = f"{format_count(len(paired), 'image')} with a JSON file of the same name"
    if len(folders) > 1:
        note += f", in {format_count(len(folders), 'folder')}: {', '.join(folders)[:80]}"
    if len(images) > len(paired):
        note = f"{format_count(len(images), 'JSON file')}, {note}"
    used = {*images, *paired.values()}
    unused = tuple(file for file in listing.files if file not in used)
    if unused:
        note += f"; other files, not read: {FolderListing(source, unused)}"
    return rows_from_items(list(images.items()), make_row, note)


def _has_rows(file: Path) -> bool:
    """Return whether a file has many rows, by its name and first bytes."""
    is_row_file = file.name.lower().endswith(ROW_SUFFIXES) and file.suffix.lower() != ".json"
    return is_row_file and not _has_object(file)


def _find_images(listing: FolderListing, *, needs_images: bool) -> dict[Path, Path | None]:
    """Return the image of each file that is a row. A JSON file of a mapping may have none."""
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for image in listing.image_files():
        by_name[image.stem].append(image)
        by_name[image.name].append(image)
    images: dict[Path, Path | None] = {}
    for file in filter(_has_object, listing.files):
        found = _find_image(file, by_name[file.stem])
        is_record = not needs_images and file.suffix.lower() == ".json"
        if found is not None or is_record:
            images[file] = found
    return images


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
            expected="a JSON object",
            remedy="correct the file, or remove it",
        )
    return record


def _has_object(path: Path) -> bool:
    """Return whether name and first bytes of a file are those of a JSON object."""
    if path.suffix.lower() not in RECORD_SUFFIXES or not path.is_file():
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip().startswith(b"{")
    return False


def _find_image(record: Path, candidates: Sequence[Path]) -> Path | None:
    """Return the image of an object: that beside it, in a folder of the same name, or nearest.

    Raises:
        UserError: Several images have the name of the object.
    """
    distinct = list(dict.fromkeys(candidates))
    beside: list[Path] = []
    in_same_split: list[Path] = []
    for image in distinct:
        if image.parent == record.parent:
            beside.append(image)
        if image.parent.name == record.parent.name:
            in_same_split.append(image)
    found = beside or in_same_split or distinct
    if len(found) > 1:
        found.sort(key=lambda image: _count_common_folders(image, record), reverse=True)
        first_depth = _count_common_folders(found[0], record)
        second_depth = _count_common_folders(found[1], record)
        # A folder below that of the object may contain drawings.
        if first_depth > second_depth and not found[0].is_relative_to(record.parent):
            del found[1:]
    if len(found) > 1:
        remedy = f"move the folder {found[1].parent} elsewhere, or rename its images"
        if found[0].parent == found[1].parent:
            remedy = f"move or rename one of them, such as {found[1]}"
        elif found[0].is_relative_to(record.parent):  # such as drawings
            remedy = f"move the folder {found[0].parent} elsewhere, or rename its images"
        raise UserError(
            f"several images may belong to the file: {found[0]} and {found[1]}",
            where=str(record),
            expected="one image with the name of the JSON file",
            remedy=remedy,
        )
    return found[0] if found else None


def _count_common_folders(first: Path, second: Path) -> int:
    """Return the number of folders that contain both files."""
    pairs = zip(first.parts, second.parts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _check_single_records(source: Path, images: Mapping[Path, Path]) -> None:
    """Raise UserError if several objects belong to the same image."""
    files: dict[Path, Path] = {}
    for file, image in images.items():
        other = files.setdefault(image, file)
        if other is file:
            continue
        raise UserError(
            f"two JSON files of the image {image.name}: {other} and {file}",
            where=str(source),
            expected="one JSON file for each image",
            remedy=f"move {file} and others of its kind out of the folder",
        )
