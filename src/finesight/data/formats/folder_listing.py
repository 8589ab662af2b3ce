"""List the files of a dataset folder and group them by suffix."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.data.row_reader import RowReader, SourceRow, rows_from_items
from finesight.digests import DIGESTS_FILE
from finesight.regular_file import reject_special_file

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
        *(".tif", ".tiff", ".ppm", ".jp2", ".avif"),
    }
)
"""Suffixes of image files, in lower case."""

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Suffixes of files that contain rows or a complete dataset, in lower case."""

NUM_DETECTION_FILES = 5
"""Number of annotation files that are read to detect the dataset format."""

SNIFF_BYTES = 4096
"""Number of bytes read from the start of a file to detect its format."""


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

    def count_suffixes(self) -> Counter[str]:
        """Count the files of the folder by suffix."""
        return Counter(path.suffix.lower() or "no suffix" for path in self.files)

    def suggest_source(self) -> str:
        """Return a suggestion for a folder that no dataset format can open.

        It names the closest format and the files that it misses.
        """
        for suffix in ROW_SUFFIXES:
            if self.files_with_suffix(suffix):
                return f"give the file itself, such as {self.files_with_suffix(suffix)[0]}"
        if self.files_with_suffix(".xml"):
            first = self.files_with_suffix(".xml")[0]
            return f"the closest is voc: its XML files contain <annotation>, in contrast to {first}"
        if self.image_files() and self.files_with_suffix(".txt"):
            names = self.image_files()[0].name, self.files_with_suffix(".txt")[0].name
            return (
                "the closest is folder: texts have the names of their images, a.jpg and a.txt; "
                f"found {names[0]} and {names[1]}"
            )
        if self.image_files():
            return "the closest is folder: a .txt file with the answer next to each image"
        return "give the folder with the images and labels, or the file with the rows"

    def __str__(self) -> str:
        kinds = [f"{count} {suffix}" for suffix, count in self.count_suffixes().most_common(6)]
        return ", ".join(kinds) or "no file"


def list_folder(root: Path) -> FolderListing:
    """List all files below a folder, including those behind symbolic links to folders.

    Each folder is visited once.

    Raises:
        SpecialFileError: A file is a named pipe, a socket or a device.
    """
    return FolderListing(root, tuple(sorted(_iter_files(root))))


def open_annotation_files(
    files: Sequence[Path],
    stem: str,
    description: str,
    is_annotation: Callable[[Path], bool],
    read_classes: Callable[[Path], set[str]],
) -> tuple[RowReader, str] | None:
    """Open annotation files as rows, one per image.

    Args:
        files: All candidate annotation files.
        stem: Name used for generated IDs.
        description: Description of the format, part of the reason for the match.
        is_annotation: Function that returns whether a file is an annotation of the format.
        read_classes: Function that returns the class names in a file.

    Returns:
        The rows and the reason for the match, or None if none of the first files is an annotation
            of the format. Each row lists the class names of all files.
    """
    if not any(map(is_annotation, files[:NUM_DETECTION_FILES])):
        return None
    classes = sorted({name for file in files for name in read_classes(file)})

    def make_row(row_number: int, file: Path) -> SourceRow:
        record = {"id": file.stem, "file": str(file), "classes": classes}
        return SourceRow(row_number, str(file), record, stem)

    return rows_from_items(files, make_row), f"{description}, {len(classes)} classes"


def is_json_object(path: Path) -> bool:
    """Return whether a .json file contains an object, judged by its first bytes."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
    except OSError:  # the row reader reports it
        return False
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _iter_files(root: Path) -> Iterator[Path]:
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
        for entry in _list_entries(folder):
            if _is(entry.is_dir):
                waiting.append(entry.path)
                continue
            if not _is(entry.is_file):
                reject_special_file(Path(entry.path))  # broken links are listed
            if entry.name != DIGESTS_FILE:
                yield Path(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link into an unreadable folder
        return False


def _list_entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder sorted by name, without hidden ones.

    An unreadable folder has no entries.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(shown, key=lambda entry: entry.name)
