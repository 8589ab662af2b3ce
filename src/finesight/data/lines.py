"""The lines of a file by their places: a file of any size costs a few bytes a line."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError, look_beside

MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors put at the start."""

State = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


class Unreadable(UserError):
    """A data file that is gone, cannot be read, or is not what it was."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file that are not blank: where they start and stop in bytes, and their
    numbers, counted from 1 with the blank ones. A line is read when it is asked for, from the file
    in the `state` in which its lines were found."""

    path: Path
    starts_N: NDArray[np.int64]
    stops_N: NDArray[np.int64]
    numbers_N: NDArray[np.int64]
    state: State

    def __len__(self) -> int:
        return len(self.starts_N)

    def __getitem__(self, index: int) -> bytes:
        """Raises Unreadable when the file has changed or is gone."""
        start, stop = int(self.starts_N[index]), int(self.stops_N[index])
        with opened(self.path) as file:
            if _state(file) != self.state:
                raise Unreadable(
                    "has changed since its lines were counted",
                    where=str(self.path),
                    expected="the same file until the end",
                    remedy="put the old file back and go on with --resume, or start anew",
                )
            file.seek(start)
            return file.read(stop - start)

    def where(self, index: int) -> str:
        """File and line as messages name them."""
        return f"{self.path}:{self.numbers_N[index]}"

    def first(self, limit: int | None) -> Lines:
        """So many lines at most, from the start."""
        starts_N, stops_N, numbers_N = (
            column[:limit] for column in (self.starts_N, self.stops_N, self.numbers_N)
        )
        return Lines(self.path, starts_N, stops_N, numbers_N, self.state)


def find_lines(path: Path) -> Lines:
    """Raises Unreadable for a file that is missing or cannot be read."""
    starts, stops, numbers = (array("q") for _ in range(3))
    with opened(path) as file:
        state, at = _state(file), 0
        for number, line in enumerate(file, start=1):
            content = _content(line, number)
            if content.strip():
                starts.append(at + len(line) - len(content))
                stops.append(at + len(line))
                numbers.append(number)
            at += len(line)
    starts_N, stops_N, numbers_N = (np.array(c, dtype=np.int64) for c in (starts, stops, numbers))
    return Lines(path, starts_N, stops_N, numbers_N, state)


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """The lines that are not blank, each with its file and number, in one passage: of a pipe, too.
    Raises Unreadable."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            content = _content(line, number)
            if content.strip():
                yield content, f"{path}:{number}"


def _content(line: bytes, number: int) -> bytes:
    return line.removeprefix(MARK) if number == 1 else line


def _state(file: BinaryIO) -> State:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The data file, open for reading. Raises Unreadable when it cannot be opened or read."""
    try:
        with path.open("rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):  # such as /dev/zero, without an end
                raise Unreadable(
                    "is a device",
                    where=str(path),
                    expected="a data file",
                    remedy="check the path",
                )
            yield file
    except FileNotFoundError as error:
        raise Unreadable(
            "no such file",
            where=str(path),
            expected="an existing data file",
            remedy=look_beside(path),
        ) from error
    except OSError as error:
        raise Unreadable(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            expected="a data file",
            remedy="check the path and its permissions",
        ) from error
