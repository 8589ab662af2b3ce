"""Cache the byte offsets of samples in large data files.

An index is built once, then memory-mapped and shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.storage import make_folder, write_file

MIN_INDEXED_BYTES = {"lines": 2**28, "tar": 2**24, "parquet": 2**24}
"""Minimum file size for which an index is cached, by file type.

Smaller files are indexed in less than a second, and there may be many of them.
"""

MAX_UNUSED_S = 90 * 24 * 3600.0
"""Time in seconds after which an unused index is deleted from the cache."""

INDEX_VERSION = 1
"""Format version of the cached index. Increase it when the content of an index changes."""

_DIGEST_WORDS = 4
"""Number of 8-byte words in a SHA-256 digest."""


class SampleIndex(NamedTuple):
    """Positions of the samples in a data file.

    Attributes:
        offsets_N1: Byte offsets of N samples, followed by the end of the last one.
        extra_B: Additional values that depend on the file type.
        digest: SHA-256 of the file content in hexadecimal.
    """

    offsets_N1: NDArray[np.int64]
    extra_B: NDArray[np.int64]
    digest: str

    def take(self, limit: int | None) -> SampleIndex:
        """Return the index of the first `limit` samples."""
        return self if limit is None else self._replace(offsets_N1=self.offsets_N1[: limit + 1])


def index_cache_folder() -> Path:
    """Return the cache folder that contains all cached indexes."""
    # huggingface_hub is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "index"


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
    cache_path = index_cache_folder() / f"{cache_key.hexdigest()}.index"
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
        _remove_stale(cache_path.parent)
        write_file(cache_path, checksum + payload_N.tobytes())
    except (UserError, OSError):
        # The cache is optional.
        return


@lru_cache
def _remove_stale(folder: Path) -> None:
    """Delete unused indexes from the cache, once per process.

    An index is written per shard, so the scan would otherwise run thousands of times.
    """
    for index_file in folder.glob("*.index"):
        if time.time() - index_file.stat().st_mtime > MAX_UNUSED_S:
            index_file.unlink(missing_ok=True)
