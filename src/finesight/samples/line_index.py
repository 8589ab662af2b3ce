"""Index samples and lines of data files for random access without loading them into memory.

An index takes a few bytes per line. For large files, it is built once, then memory-mapped and
shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.files.bounded_files import open_regular_file, translate_os_errors
from finesight.files.storage import make_folder, write_file

MIN_INDEXED_BYTES = {"lines": 2**28, "tar": 2**24, "parquet": 2**24}
"""Minimum file size for which an index is cached, by file type.

Smaller files are indexed in less than a second, and there may be many of them.
"""

MAX_UNUSED_S = 90 * 24 * 3600.0
"""Time in seconds after which an unused index is deleted from the cache."""

INDEX_VERSION = 2
"""Format version of the cached index. Increase it when the content of an index changes."""

_DIGEST_WORDS = 4
"""Number of 8-byte words in a SHA-256 digest."""


class SampleIndex(NamedTuple):
    """Positions of the samples in a data file.

    Attributes:
        offsets_N1: Byte offsets of N samples, followed by the end of the last one. In a Parquet
            file, the row groups of N samples and a last value.
        digest: SHA-256 of the file content in hexadecimal.
    """

    offsets_N1: NDArray[np.int64]
    extra_B: NDArray[np.int64]
    digest: str


def cache_folder(name: str) -> Path:
    """Return the cache folder of indexes, Parquet files with small row groups, or downloads."""
    # huggingface_hub is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / name


def load_or_build_index(
    file: BinaryIO, path: Path, kind: str, build_index: Callable[[], SampleIndex]
) -> SampleIndex:
    """Return the cached index of a data file, or build and cache it.

    A cached index is used only if the file is unchanged, see `hash_file_identity`. Files smaller
    than `MIN_INDEXED_BYTES` are not cached.
    """
    file_identity = hash_file_identity(file)
    if os.fstat(file.fileno()).st_size < MIN_INDEXED_BYTES[kind]:
        return build_index()
    cache_key = hashlib.sha256(f"{kind} {path.absolute()}".encode(errors="surrogateescape"))
    cache_path = cache_folder("index") / f"{cache_key.hexdigest()}.index"
    index = _read_index(cache_path, file_identity)
    if index is None:
        index = build_index()
        if hash_file_identity(file) == file_identity:
            _write_index(cache_path, file_identity, index)
    return index


def hash_file_identity(file: BinaryIO) -> bytes:
    """Hash the device, inode, size and timestamps of an open file to detect modifications."""
    stat_result = os.fstat(file.fileno())
    # ctime, which programs cannot set, in addition to mtime, which copies preserve.
    times = stat_result.st_size, stat_result.st_mtime_ns, stat_result.st_ctime_ns
    return hashlib.sha256(
        repr((INDEX_VERSION, stat_result.st_dev, stat_result.st_ino, *times)).encode()
    ).digest()


def _read_index(cache_path: Path, file_identity: bytes) -> SampleIndex | None:
    """Memory-map a cached index.

    Returns None if the index is missing, invalid, or belongs to another version of the file.
    """
    try:
        words_N: NDArray[np.int64] = np.asarray(np.memmap(cache_path, np.int64, "r"))
        os.utime(cache_path)
    except (OSError, ValueError):
        return None
    if len(words_N) < 3 * _DIGEST_WORDS + 2:
        return None
    checksum, stored_identity, content_digest = (
        words_N[word_index * _DIGEST_WORDS :][:_DIGEST_WORDS].tobytes() for word_index in range(3)
    )
    if (
        stored_identity != file_identity
        or hashlib.sha256(words_N[_DIGEST_WORDS:].data).digest() != checksum
    ):
        return None
    num_samples, rest_N = int(words_N[3 * _DIGEST_WORDS]), words_N[3 * _DIGEST_WORDS + 1 :]
    return SampleIndex(rest_N[: num_samples + 1], rest_N[num_samples + 1 :], content_digest.hex())


def _write_index(cache_path: Path, file_identity: bytes, index: SampleIndex) -> None:
    """Write an index to the cache as 8-byte words; write errors are ignored.

    The words are the SHA-256 of all following words, of the file identity and of the file content,
    the number of samples, and the values of the index.
    """
    digests = np.frombuffer(file_identity + bytes.fromhex(index.digest), np.int64)
    num_samples_1 = np.array([len(index.offsets_N1) - 1])
    payload_N = np.concatenate([digests, num_samples_1, index.offsets_N1, index.extra_B])
    checksum = hashlib.sha256(payload_N.data).digest()
    try:
        make_folder(cache_path.parent)
        remove_stale_indexes(cache_path.parent)
        write_file(cache_path, checksum + payload_N.tobytes())
    except (UserError, OSError):
        # The cache is optional.
        return


@lru_cache
def remove_stale_indexes(folder: Path) -> None:
    """Delete unused indexes from the cache, once per process.

    An index is written per shard, so the scan would otherwise run thousands of times.
    """
    for index_file in folder.glob("*.index"):
        if time.time() - index_file.stat().st_mtime > MAX_UNUSED_S:
            index_file.unlink(missing_ok=True)


UTF8_BOM = b"\xef\xbb\xbf"
"""Byte order mark of UTF-8, which some editors write at the start of a file."""

NEWLINE, SPACE = b"\n "
"""Byte values of newline and space. ASCII white space is at most `SPACE`."""

BLOCK_BYTES = 2**22
"""Number of bytes that are read and scanned for newlines at once."""

MAX_LINE_BYTES = 2**25
"""Maximum number of bytes of a line.

Parsed JSON takes up to 30 times its size in memory.
"""

FileState = tuple[int, int]
"""Size in bytes and modification time in nanoseconds of a file, used to detect modifications."""


class UnreadableFileError(UserError):
    """Raised when a data file is missing, unreadable, modified, or has an overlong line."""


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """Random access to the samples of an indexed file, provided that it is unmodified."""

    path: Path
    index: SampleIndex
    file_state: FileState
    kind: ClassVar[str]
    unit: ClassVar[str] = "sample"

    @classmethod
    def open(cls, path: Path) -> Self:
        """Index a file in one pass, or load its cached index.

        Raises:
            UnreadableFileError: The file is unreadable, or a line is too long.
        """
        with open_data_file(path) as file:
            index = load_or_build_index(file, path, cls.kind, lambda: cls.build_index(file, path))
            return cls(path, index, read_file_state(file))

    @staticmethod
    def build_index(file: BinaryIO, path: Path) -> SampleIndex:
        """Build the index of an open file."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal that identifies the samples and their order."""
        return self.index.digest

    def __len__(self) -> int:
        return len(self.index.offsets_N1) - 1

    def location(self, index: int) -> str:
        """Return file and 1-based number of a sample for messages."""
        return f"{self.path}, {self.unit} {index + 1}"

    def take(self, limit: int | None) -> Self:
        """Return a view of the first `limit` samples; None means all."""
        offsets_N1 = self.index.offsets_N1[: None if limit is None else limit + 1]
        return replace(self, index=self.index._replace(offsets_N1=offsets_N1))


class IndexedLines(IndexedFile):
    """Random access to the non-blank lines of a file.

    Line k starts at byte `offsets_N1[k]` of the index and ends before `offsets_N1[k + 1]`; blank
    lines may follow it. The extra values of the index hold, for each blank line, the number of
    non-blank lines before it.
    """

    kind = "lines"

    @staticmethod
    def build_index(file: BinaryIO, path: Path) -> SampleIndex:
        """Find the lines of an open file."""
        sha256 = hashlib.sha256()
        starts: list[NDArray[np.int64]] = []
        blanks: list[NDArray[np.int64]] = []
        offset = num_lines = lines = 0
        # Hash in a second thread: the SHA-256 takes as long as the line scan.
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

    def __getitem__(self, index: int) -> bytes:
        """Read a line by index."""
        start, stop = self.index.offsets_N1[index : index + 2].tolist()
        with open_unchanged(self.path, self.file_state) as file:
            file.seek(start)
            content = file.read(stop - start)
        return content[: content.find(b"\n") + 1 or None]

    def location(self, index: int) -> str:
        """Return file and 1-based line number for messages; the number includes blank lines."""
        num_blank = np.searchsorted(self.index.extra_B, index, side="right")
        return f"{self.path}:{index + 1 + num_blank}"


def _find_line_starts(
    block: bytes, *, is_first: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the byte offsets of lines in a block, and a mask of blank lines.

    In the first block of a file, a byte order mark is skipped.
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
    # Lines that start with white space are not necessarily blank.
    for line_index in np.flatnonzero(is_blank_L):
        is_blank_L[line_index] = not block[starts_L[line_index] : stops_L[line_index]].strip()
    return starts_L, is_blank_L


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield each non-blank line of a file with its location for messages.

    The file may be a named pipe, because it is read in one pass.

    Raises:
        UnreadableFileError: The file is unreadable, or a line is too long.
    """
    with open_data_file(path, may_be_pipe=True) as file:
        for line_number, line in enumerate_lines(file, path):
            if line.strip():
                yield line, f"{path}:{line_number}"


def enumerate_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the 1-based number and the content of each line, without a byte order mark.

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
    """Return the size and modification time of an open file, used to detect modifications."""
    stat_result = os.fstat(file.fileno())
    return stat_result.st_size, stat_result.st_mtime_ns


@contextmanager
def open_unchanged(path: Path, file_state: FileState) -> Iterator[BinaryIO]:
    """Open a data file for reading if its size and modification time are unchanged.

    Raises:
        UnreadableFileError: The file is missing or was modified since it was indexed.
    """
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
    """Open a data file for reading.

    Raises:
        UnreadableFileError: The file is missing, unreadable, a device, or a pipe that is not
            accepted.
    """
    with (
        translate_os_errors(
            path,
            expected=f"a data file, relative to {os.getcwd()} or to the folder of its recipe",
            remedy="check the path and its permissions",
            error_class=UnreadableFileError,
        ),
        path.open("rb") if may_be_pipe and path.is_fifo() else open_regular_file(path) as file,
    ):
        yield file
