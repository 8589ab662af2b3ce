"""The lines of a file by their places: a file of any size costs a few bytes a line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError

_MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors put at the start."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file that are not blank: where they start and stop in bytes, and their
    numbers, counted from 1 with the blank ones. A line is read when it is asked for."""

    path: Path
    starts_N: NDArray[np.int64]
    stops_N: NDArray[np.int64]
    numbers_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, index: int) -> bytes:
        """Raises UserError when the file cannot be read any more."""
        start, stop = int(self.starts_N[index]), int(self.stops_N[index])
        with opened(self.path) as file:
            file.seek(start)
            return file.read(stop - start)

    def __iter__(self) -> Iterator[bytes]:
        """All of them, the file opened once."""
        with opened(self.path) as file:
            for start, stop in zip(self.starts_N.tolist(), self.stops_N.tolist(), strict=True):
                file.seek(start)
                yield file.read(stop - start)

    def where(self, index: int) -> str:
        """File and line as messages name them."""
        return f"{self.path}:{self.numbers_N[index]}"

    def first(self, limit: int | None) -> Lines:
        """So many lines at most, from the start."""
        if limit is None:
            return self
        return Lines(self.path, self.starts_N[:limit], self.stops_N[:limit], self.numbers_N[:limit])


def find_lines(path: Path) -> Lines:
    """Raises UserError for a file that is missing or cannot be read."""
    found: list[tuple[int, int, int]] = []
    at = 0
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            mark = len(_MARK) if number == 1 and line.startswith(_MARK) else 0
            if line[mark:].strip():
                found.append((at + mark, at + len(line), number))
            at += len(line)
    columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Lines(path, *columns)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The data file, open for reading. Raises UserError when it cannot be opened or read."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        raise UserError(
            "no such file",
            where=str(path),
            expected="an existing data file",
            remedy=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            expected="a data file",
            remedy="check the path and its permissions",
        ) from error


def _names_beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
