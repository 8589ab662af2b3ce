"""Index of the lines of a file: a file of any size takes a few bytes per line."""

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

from finesight.data.index_cache import SampleIndex, load_or_build_index
from finesight.errors import UserError, suggest_similar_path
from finesight.regular_file import SpecialFileError, open_regular_file

UTF8_BOM = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which some editors write."""

NEWLINE, SPACE = b"\n "
"""White space has no byte above that of a space."""

BLOCK_BYTES = 2**22
"""Number of bytes per block of the scan."""

MAX_LINE_BYTES = 2**25
"""Maximum number of bytes of a line: parsed JSON takes up to 30 times its size in memory."""

FileState = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


class UnreadableFileError(UserError):
    """A data file that is missing, unreadable or modified."""


@dataclass(frozen=True, slots=True)
class IndexedLines:
    """The non-blank lines of a file.

    Line k starts at byte `offsets_N1[k]` and ends before `offsets_N1[k + 1]`, followed by optional
    blank lines. The extra values of the index contain the number of preceding non-blank lines per
    blank line. Lines are read on access from the unmodified file.
    """

    path: Path
    index: SampleIndex
    file_state: FileState

    def __len__(self) -> int:
        return len(self.index.offsets_N1) - 1

    def __getitem__(self, index: int) -> bytes:
        """Read a line. Raises UnreadableFileError if the file is modified or missing."""
        start, stop = self.index.offsets_N1[index : index + 2].tolist()
        with open_unchanged(self.path, self.file_state) as file:
            file.seek(start)
            content = file.read(stop - start)
        return content[: content.find(b"\n") + 1 or None]

    def location(self, index: int) -> str:
        """Return file and 1-based line number, blank lines included, for messages."""
        num_blank = np.searchsorted(self.index.extra_B, index, side="right")
        return f"{self.path}:{index + 1 + num_blank}"

    def take(self, limit: int | None) -> IndexedLines:
        """Return the first `limit` lines."""
        return replace(self, index=self.index.take(limit))


def index_lines(path: Path) -> IndexedLines:
    """Index all lines of a file in one pass. Raises UnreadableFileError."""
    with open_data_file(path) as file:
        return IndexedLines(
            path,
            load_or_build_index(file, path, "lines", lambda: _build_index(file, path)),
            read_file_state(file),
        )


def _build_index(file: BinaryIO, path: Path) -> SampleIndex:
    sha256 = hashlib.sha256()
    starts: list[NDArray[np.int64]] = []
    blanks: list[NDArray[np.int64]] = []
    offset = num_lines = lines = 0
    # In parallel with the line scan: the digest takes as long.
    with ThreadPoolExecutor(1) as executor:
        while block := file.read(BLOCK_BYTES) + file.readline(MAX_LINE_BYTES + 1):
            hash_future = executor.submit(sha256.update, block)
            starts_L, is_blank_L = _find_line_starts(block, is_first=offset == 0)
            long_L = np.flatnonzero(np.diff(starts_L, append=len(block)) > MAX_LINE_BYTES)
            if len(long_L):
                raise _too_long(path, lines + int(long_L[0]) + 1)
            lines += len(starts_L)
            starts.append(starts_L[~is_blank_L] + offset)
            blanks.append(num_lines + np.cumsum(~is_blank_L)[is_blank_L])
            num_lines, offset = num_lines + len(starts[-1]), offset + len(block)
            hash_future.result()
    bounds_N1 = np.concatenate([*starts, np.array([offset])])
    blanks_B = np.concatenate([*blanks, np.empty(0, np.int64)])
    return SampleIndex(bounds_N1, blanks_B, sha256.hexdigest())


def _find_line_starts(
    block: bytes, *, is_first: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the line starts of a block, and a mask of blank lines.

    A byte order mark is skipped.
    """
    bytes_N = np.frombuffer(block, np.uint8)
    stops_L = np.flatnonzero(bytes_N == NEWLINE) + 1
    if not block.endswith(b"\n"):
        stops_L = np.append(stops_L, len(block))
    starts_L = np.concatenate([np.zeros(1, np.int64), stops_L[:-1]])
    is_blank_L = bytes_N[starts_L] <= SPACE
    if is_first and block.startswith(UTF8_BOM):
        starts_L[0] = len(UTF8_BOM)
        is_blank_L[0] = True
    # Some that begin with white space are not blank.
    for line_index in np.flatnonzero(is_blank_L):
        is_blank_L[line_index] = not block[starts_L[line_index] : stops_L[line_index]].strip()
    return starts_L, is_blank_L


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield non-blank lines with file and line number in one pass, also from a pipe.

    Raises UnreadableFileError.
    """
    with open_data_file(path, may_be_pipe=True) as file:
        for line_number, line in enumerate_lines(file, path):
            if line.strip():
                yield line, f"{path}:{line_number}"


def enumerate_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its 1-based number, without a byte order mark.

    Raises:
        UnreadableFileError: A line has more than `MAX_LINE_BYTES` bytes.
    """
    lines = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise _too_long(path, number)
        yield number, line.removeprefix(UTF8_BOM) if number == 1 else line


def _too_long(path: Path, number: int) -> UnreadableFileError:
    return UnreadableFileError(
        f"a line of more than {MAX_LINE_BYTES:,} bytes",
        where=f"{path}:{number}",
        expected="one row per line",
        remedy="split the line, or save its images as files and reference their paths",
    )


def read_file_state(file: BinaryIO) -> FileState:
    """Return the state of an open file."""
    stat_result = os.fstat(file.fileno())
    return stat_result.st_size, stat_result.st_mtime_ns


@contextmanager
def open_unchanged(path: Path, file_state: FileState) -> Iterator[BinaryIO]:
    """Open the data file. Raises UnreadableFileError if it is modified or missing."""
    with open_data_file(path) as file:
        if read_file_state(file) != file_state:
            raise UnreadableFileError(
                "has changed since its lines were counted",
                where=str(path),
                expected="an unmodified file",
                remedy="restore the previous file and use --resume, or start a new run",
            )
        yield file


@contextmanager
def open_data_file(path: Path, *, may_be_pipe: bool = False) -> Iterator[BinaryIO]:
    """Open a data file.

    Raises:
        UnreadableFileError: The file is unreadable, a device or, unless `may_be_pipe`, a pipe.
    """
    try:
        with path.open("rb") if may_be_pipe and path.is_fifo() else open_regular_file(path) as file:
            yield file
    except SpecialFileError as error:
        raise UnreadableFileError(
            error.what, where=error.where, expected=error.expected, remedy=error.remedy
        ) from error
    except FileNotFoundError as error:
        raise UnreadableFileError(
            "no such file",
            where=str(path),
            expected="an existing data file",
            remedy=suggest_similar_path(path),
        ) from error
    except OSError as error:
        raise UnreadableFileError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            expected="a data file",
            remedy="check the path and its permissions",
        ) from error
