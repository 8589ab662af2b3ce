"""The lines of a file by their places: a file of any size costs a few bytes a line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from finesight.data.index_files import Index, indexed
from finesight.errors import UserError, look_beside
from finesight.regular_file import SpecialFile, open_regular

MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some editors put at the start."""

NEWLINE, SPACE = b"\n "
"""White space has no byte above that of a space."""

BLOCK = 2**22
"""Bytes that are looked through at once."""

LARGEST_LINE = 2**25
"""Bytes of a line: parsed, JSON takes up to 30 times its size in memory."""

State = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


class Unreadable(UserError):
    """A data file that is gone, cannot be read, or is not what it was."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of a file that are not blank. By the `index`, line k starts at byte `bounds_N1[k]`
    and ends before `bounds_N1[k + 1]`, with blank ones that may follow it; of each blank line,
    `beside_B` has how many others stand before it. A line is read when it is asked for, from the
    file in the `state` in which its lines were found."""

    path: Path
    index: Index
    state: State

    def __len__(self) -> int:
        return len(self.index.bounds_N1) - 1

    def __getitem__(self, index: int) -> bytes:
        """Raises Unreadable when the file has changed or is gone."""
        start, stop = self.index.bounds_N1[index : index + 2].tolist()
        with unchanged(self.path, self.state) as file:
            file.seek(start)
            content = file.read(stop - start)
        return content[: content.find(b"\n") + 1 or None]

    def where(self, index: int) -> str:
        """File and line as messages name them, counted from 1 with the blank ones."""
        blank = np.searchsorted(self.index.beside_B, index, side="right")
        return f"{self.path}:{index + 1 + blank}"

    def first(self, limit: int | None) -> Lines:
        """So many lines at most, from the start."""
        return replace(self, index=self.index.first(limit))


def find_lines(path: Path) -> Lines:
    """All lines of a file, in one passage. Raises Unreadable for one that is missing or cannot be
    read."""
    with opened(path) as file:
        return Lines(path, indexed(file, path, "lines", lambda: _found(file, path)), state_of(file))


def _found(file: BinaryIO, path: Path) -> Index:
    whole = hashlib.sha256()
    starts: list[NDArray[np.int64]] = []
    blanks: list[NDArray[np.int64]] = []
    at = found = lines = 0
    # Beside the search for lines: a digest takes as long as that.
    with ThreadPoolExecutor(1) as beside:
        while block := file.read(BLOCK) + file.readline(LARGEST_LINE + 1):
            hashed = beside.submit(whole.update, block)
            starts_L, is_blank_L = _starts(block, first=at == 0)
            long_L = np.flatnonzero(np.diff(starts_L, append=len(block)) > LARGEST_LINE)
            if len(long_L):
                raise _too_long(path, lines + int(long_L[0]) + 1)
            lines += len(starts_L)
            starts.append(starts_L[~is_blank_L] + at)
            blanks.append(found + np.cumsum(~is_blank_L)[is_blank_L])
            found, at = found + len(starts[-1]), at + len(block)
            hashed.result()
    bounds_N1 = np.concatenate([*starts, np.array([at])])
    blanks_B = np.concatenate([*blanks, np.empty(0, np.int64)])
    return Index(bounds_N1, blanks_B, whole.hexdigest())


def _starts(block: bytes, *, first: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Where the lines of a block start, a mark before the file's first one passed over, and which
    of them are blank."""
    bytes_N = np.frombuffer(block, np.uint8)
    stops_L = np.flatnonzero(bytes_N == NEWLINE) + 1
    if not block.endswith(b"\n"):
        stops_L = np.append(stops_L, len(block))
    starts_L = np.concatenate([np.zeros(1, np.int64), stops_L[:-1]])
    is_blank_L = bytes_N[starts_L] <= SPACE
    if first and block.startswith(MARK):
        starts_L[0] = len(MARK)
        is_blank_L[0] = True
    # Some that begin with white space are not blank.
    for line in np.flatnonzero(is_blank_L):
        is_blank_L[line] = not block[starts_L[line] : stops_L[line]].strip()
    return starts_L, is_blank_L


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """The lines that are not blank, each with its file and number, in one passage: of a pipe, too.
    Raises Unreadable."""
    with opened(path, may_be_pipe=True) as file:
        for number, line in numbered_lines(file, path):
            if line.strip():
                yield line, f"{path}:{number}"


def numbered_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its number from 1, without a byte order mark.

    Raises:
        Unreadable: A line has more than `LARGEST_LINE` bytes.
    """
    lines = iter(partial(file.readline, LARGEST_LINE + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > LARGEST_LINE:
            raise _too_long(path, number)
        yield number, line.removeprefix(MARK) if number == 1 else line


def _too_long(path: Path, number: int) -> Unreadable:
    return Unreadable(
        f"a line of more than {LARGEST_LINE:,} bytes",
        where=f"{path}:{number}",
        expected="one row a line",
        remedy="split the line, or save its images as files and name their paths",
    )


def state_of(file: BinaryIO) -> State:
    """That of an open file."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


@contextmanager
def unchanged(path: Path, state: State) -> Iterator[BinaryIO]:
    """The data file, open for reading. Raises Unreadable when it has changed or is gone."""
    with opened(path) as file:
        if state_of(file) != state:
            raise Unreadable(
                "has changed since its lines were counted",
                where=str(path),
                expected="the same file until the end",
                remedy="put the old file back and go on with --resume, or start anew",
            )
        yield file


@contextmanager
def opened(path: Path, *, may_be_pipe: bool = False) -> Iterator[BinaryIO]:
    """The data file, open for reading. Raises Unreadable when it cannot be opened or read, for a
    device and, unless it `may_be_pipe`, for a pipe."""
    try:
        with path.open("rb") if may_be_pipe and path.is_fifo() else open_regular(path) as file:
            yield file
    except SpecialFile as error:
        raise Unreadable(
            error.what, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
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
