"""List the files of a folder, and select its annotation files."""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.errors import Remedy, Step, UserError, format_count
from finesight.files.bounded_files import reject_special_file
from finesight.files.storage import DIGESTS_FILE
from finesight.ingest.row_reader import (
    COMPRESSED_SUFFIXES,
    JSON_LINES_SUFFIXES,
    SNIFF_BYTES,
    XML_REMEDY,
    RowReader,
    SourceRow,
    open_row_file,
    rows_from_items,
)
from finesight.samples.image_file import IMAGE_SUFFIXES, is_image_value
from finesight.samples.line_index import UTF8_BOM, open_data_file

ROW_SUFFIXES = (
    ".jsonl",
    ".json",
    ".parquet",
    ".csv",
    ".tsv",
    ".xlsx",
    *JSON_LINES_SUFFIXES,
    *COMPRESSED_SUFFIXES,
)
"""Suffixes of files that contain rows or a complete dataset, in lower case."""

NUM_DETECTION_FILES = 5
"""Number of annotation files that are read to detect the dataset format."""


NUM_CHECKED_ROWS = 3
"""Number of rows of a file that are read before an error proposes it."""

MAX_PROPOSED_FILES = 5
"""Maximum number of files that an error proposes."""

_TURN_KEYS = ("messages", "conversations", "conversation")


def check_rows(file: Path) -> None:
    """Raise UserError for a file whose first rows have neither an image nor turns."""
    rows = open_row_file(file)
    for row in rows.iter_range(0, NUM_CHECKED_ROWS):
        has_turns = not row.record.keys().isdisjoint(_TURN_KEYS)
        if not has_turns and not any(map(is_image_value, row.record.values())):
            raise UserError(
                f"a row of {', '.join(map(str, row.record))} without an image and without turns",
                where=f"{file}, {row.location}",
                expected="rows with an image or turns",
                remedy="add the image to the row",
            )


def _passes(check_file: Callable[[Path], None], file: Path) -> bool:
    """Return whether a check accepts a file."""
    try:
        check_file(file)
    except (UserError, OSError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class FolderListing:
    """Sorted paths of the files in a folder and its subfolders.

    Hidden files and the checksum file of finesight are excluded.
    """

    root: Path
    files: tuple[Path, ...]

    def image_files(self) -> list[Path]:
        """Return the files with the suffix of an image format."""
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    def files_with_suffix(self, suffix: str) -> list[Path]:
        """Return the files with a given suffix, in lower case with its dot."""
        return [path for path in self.files if path.suffix.lower() == suffix]

    def suggest_source(self, check_file: Callable[[Path], None] = check_rows) -> Remedy:
        """Return a suggestion for a folder that no dataset format can open.

        It names a file that can be imported, or the closest format and the files that it misses.

        Args:
            check_file: Function that raises UserError for a file that cannot be imported.
        """
        has_rows = False
        num_images = len(self.image_files())
        for suffix in ROW_SUFFIXES:
            files = self.files_with_suffix(suffix)
            has_rows |= bool(files)
            if len(files) > 1 and len(files) >= num_images > 0:
                continue  # a file describes one image each
            by_stem = {path.stem: path for path in files}
            train = by_stem.get("train")
            evaluation = by_stem.get("eval")
            if train is not None and _passes(check_file, train):
                advice = f"give the file itself, such as {train}"
                if evaluation is not None:
                    advice += f"; a check also takes --against {evaluation}"
                return advice
            advice = self._suggest_files(files[:MAX_PROPOSED_FILES], check_file)
            if advice:
                return advice
        images = self.image_files()
        texts = self.files_with_suffix(".txt")
        for first in self.files_with_suffix(".xml"):
            return f"{XML_REMEDY} (found {first})"
        if images and texts:
            return self._suggest_text_files(images[0], texts)
        if has_rows:
            return self._suggest_rows()
        if images:
            purpose = (
                "add a table or a .txt file with the answer next to each image, sort the images"
                " into one folder per class, or label them"
            )
            arguments = {"run_or_model": "MODEL", "sources": [str(self.root)], "prompt": "TEXT"}
            return Step("label", arguments, purpose)
        for first in self.files_with_suffix(".tar"):
            return f"give a file itself, such as {first}"
        return "give the folder with the images and labels, or the file with the rows"

    def _suggest_files(self, files: Sequence[Path], check_file: Callable[[Path], None]) -> str:
        """Return a suggestion for the files that pass a check; empty without one."""
        names: list[str] = []
        for file in files:
            if _passes(check_file, file):
                names.append(str(file.relative_to(self.root)))
        if not names:
            return ""
        advice = f"give the file itself, such as {self.root / names[0]}"
        if len(names) > 1:
            advice += f"; other files: {', '.join(names[1:])}"
        return advice

    def _suggest_text_files(self, image: Path, texts: Sequence[Path]) -> str:
        """Return a suggestion for images with texts that are not those of the same name."""
        same: list[Path] = []
        for text in texts:
            if text.stem == image.stem:
                same.append(text)
        found = str(image.relative_to(self.root))
        for text in (same or texts)[:3]:
            found += f" and {text.relative_to(self.root)}"
        advice = "the closest is folder: a text is in the folder of its image and has its name,"
        advice += f" a.jpg and a.txt; found {found}"
        if same and image.with_suffix(".txt") not in same:
            advice += ": move the texts of one folder to the images"
        return advice

    def _suggest_rows(self) -> str:
        """Return a suggestion for a folder of files that no dataset format reads."""
        num_files = sum(path.suffix.lower() in ROW_SUFFIXES for path in self.files)
        advice = (
            'no format reads files of this layout: write a row per image, such as {"image":'
            ' "a.jpg", "question": "...", "answer": "..."}, to one .jsonl file and import this'
            " file, with --mapping for rows with other keys; or, for a file with an object for each"
            " image, give a folder with images and files of the same names, and no table beside"
            " them"
        )
        if num_files < len(self.image_files()):
            advice += "; if a file describes all images, give this file"
        return advice

    def __str__(self) -> str:
        counts = Counter(path.suffix.lower() or "no suffix" for path in self.files)
        kinds = [f"{count} {suffix}" for suffix, count in counts.most_common(6)]
        return ", ".join(kinds) or "no file"


def list_folder(root: Path) -> FolderListing:
    """List all files below a folder, including those behind symbolic links to folders.

    Each folder is visited once.

    Raises:
        SpecialFileError: A file is a named pipe, a socket or a device.
    """
    return FolderListing(root, tuple(sorted(iter_files(root))))


def open_annotation_files(
    source: Path,
    suffix: str,
    description: str,
    marker: bytes,
    read_classes: Callable[[Path], tuple[bool, set[str], set[str]]],
) -> tuple[RowReader, str] | None:
    """Open annotation files as rows, one per image.

    Args:
        source: A single annotation file, or a folder of them.
        suffix: Suffix of annotation files in lower case.
        description: Description of the format, part of the reason for the match.
        marker: Text near the start of an annotation file, which may be invalid.
        read_classes: Function that returns whether a file is an annotation of the format, and its
            names of classes and of points. It raises UserError for an invalid file.

    Returns:
        The rows and the reason for the match, or None if none of the first files is an annotation
            of the format. Each row lists the names of all files.
    """
    if source.is_dir():
        files = list_folder(source).files_with_suffix(suffix)
    else:
        if source.suffix.lower() != suffix or not source.is_file():
            return None
        if suffix == ".json" and not is_json_file(source):
            return None
        files = [source]

    def scan(file: Path) -> tuple[bool, set[str], set[str]]:
        try:
            return read_classes(file)
        except UserError:  # reported when the row is parsed
            with open_data_file(file) as content:
                return marker in content.read(SNIFF_BYTES), set(), set()

    if not any(scan(file)[0] for file in files[:NUM_DETECTION_FILES]):
        return None
    class_names: set[str] = set()
    point_names: set[str] = set()
    for file in files:
        _, file_classes, file_points = scan(file)
        class_names |= file_classes
        point_names |= file_points
    classes = sorted(class_names)
    points = sorted(point_names)

    def make_row(row_number: int, file: Path) -> SourceRow:
        record = {"id": file.stem, "file": str(file), "classes": classes, "points": points}
        return SourceRow(row_number, str(file), record, source.stem)

    return rows_from_items(files, make_row), f"{description}, {format_count(len(classes), 'class')}"


def is_json_file(path: Path, opening: bytes = b"{") -> bool:
    """Return whether a .json file contains an object, or an array, judged by its first bytes."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:  # the row reader reports it
        return file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip().startswith(opening)
    return False


def iter_files(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, breadth first, visiting each folder once.

    Raises:
        SpecialFileError: A file is a named pipe, a socket or a device.
    """
    visited: set[str] = set()
    waiting = deque([str(root)])
    while waiting:
        folder = waiting.popleft()
        real_path = os.path.realpath(folder)
        if real_path in visited:
            continue
        visited.add(real_path)
        for entry in list_entries(folder):
            is_folder = is_file = False
            with contextlib.suppress(OSError):  # a link into an unreadable folder
                is_folder = entry.is_dir()
                is_file = entry.is_file()
            if is_folder:
                waiting.append(entry.path)
                continue
            if not is_file:
                reject_special_file(Path(entry.path))  # broken links are listed
            if entry.name != DIGESTS_FILE:
                yield Path(entry.path)


def list_entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the readable entries of a folder sorted by name, without hidden ones."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        return sorted(shown, key=lambda entry: entry.name)
    return []
