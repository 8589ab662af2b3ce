"""What lies in a folder, by kind of file, for the formats that are folders."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finesight.data.rows import Row, Rows, rows_of
from finesight.digests import DIGESTS
from finesight.regular_file import refuse_special

PICTURE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
        *(".tif", ".tiff", ".ppm", ".jp2", ".avif"),
    }
)
"""The endings by which a file of a folder counts as a picture."""

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""The endings of files that hold rows or a whole data set."""

LOOKED_AT = 5
"""Files by which a folder of descriptions is known."""

START = 4096
"""Bytes that are read to see how a file begins."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files below a folder in order of their paths, without hidden ones and our checksums."""

    root: Path
    files: tuple[Path, ...]

    def pictures(self) -> list[Path]:
        """The files that are pictures by their names."""
        return [path for path in self.files if path.suffix.lower() in PICTURE_SUFFIXES]

    def ending(self, suffix: str) -> list[Path]:
        """The files with that suffix, given in lower case and with its point."""
        return [path for path in self.files if path.suffix.lower() == suffix]

    def kinds(self) -> Counter[str]:
        """How many files have each suffix."""
        return Counter(path.suffix.lower() or "no suffix" for path in self.files)

    def nearest(self) -> str:
        """What to do with a folder that no format opens: what it is nearest to, and lacks."""
        for suffix in ROW_SUFFIXES:
            if self.ending(suffix):
                return f"give the file itself, such as {self.ending(suffix)[0]}"
        if self.ending(".xml"):
            first = self.ending(".xml")[0]
            return f"the nearest is voc: its XML files hold <annotation>, unlike {first}"
        if self.pictures() and self.ending(".txt"):
            names = self.pictures()[0].name, self.ending(".txt")[0].name
            return (
                "the nearest is folder: its texts are called as their pictures, a.jpg and a.txt; "
                f"here are {names[0]} and {names[1]}"
            )
        if self.pictures():
            return "the nearest is folder: a .txt file beside each picture, with the answer"
        return "give the folder with the pictures and labels, or the file with the rows"

    def __str__(self) -> str:
        kinds = [f"{count} {suffix}" for suffix, count in self.kinds().most_common(6)]
        return ", ".join(kinds) or "no file"


def inventory(root: Path) -> Inventory:
    """All files below `root`; links to folders are followed, each folder once. Raises SpecialFile
    where one is a named pipe, a socket or a device."""
    return Inventory(root, tuple(sorted(_walk(root))))


def open_described(
    files: Sequence[Path],
    stem: str,
    kind: str,
    described: Callable[[Path], bool],
    classes_in: Callable[[Path], set[str]],
) -> tuple[Rows, str] | None:
    """A row for each file that describes one picture, with the classes of all of them, and why
    they are known; None where none of the first is `described` by the format. `kind` names it."""
    if not any(map(described, files[:LOOKED_AT])):
        return None
    classes = sorted({name for file in files for name in classes_in(file)})

    def row(number: int, file: Path) -> Row:
        record = {"id": file.stem, "file": str(file), "classes": classes}
        return Row(number, str(file), record, stem)

    return rows_of(files, row), f"{kind}, {len(classes)} classes"


def is_json_object(path: Path) -> bool:
    """Whether a file is called .json and begins as an object does; its start alone is read."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError:  # said by whoever reads rows
        return False
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _walk(root: Path) -> Iterator[Path]:
    """Yield all files below a folder, breadth first, and each folder once.

    Raises:
        SpecialFile: A named pipe, a socket or a device is among them.
    """
    seen: set[str] = set()
    waiting = deque([str(root)])
    while waiting:
        folder = waiting.popleft()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(folder):
            if _is(entry.is_dir):
                waiting.append(entry.path)
                continue
            if not _is(entry.is_file):
                refuse_special(Path(entry.path))  # a link to nowhere stays
            if entry.name != DIGESTS:
                yield Path(entry.path)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link into a folder that may not be looked into
        return False


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name, without hidden ones; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(shown, key=lambda entry: entry.name)
