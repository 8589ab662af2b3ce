"""Where the samples of a large file lie, kept for the next start: found once, then mapped into
memory, which all processes of a machine share."""

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

LEAST = {"lines": 2**28, "tar": 2**24, "parquet": 2**24}
"""Bytes of a file whose index is kept, by its kind: smaller ones are read anew in less than a
second, of which there may be many where they are shards."""

UNUSED_S = 90 * 24 * 3600.0
"""Seconds after which an index that nobody has asked for is removed."""

FORMAT = 1
"""To be raised where what an index holds changes."""

_WORDS = 4
"""Numbers of eight bytes that a SHA-256 takes."""


class Index(NamedTuple):
    """Where samples start, and the end of the last; numbers of any meaning that the kind of file
    needs beside them; and a SHA-256 of the content, in hexadecimal."""

    bounds_N1: NDArray[np.int64]
    beside_B: NDArray[np.int64]
    digest: str

    def first(self, limit: int | None) -> Index:
        """That of so many samples at most, from the start."""
        return self if limit is None else self._replace(bounds_N1=self.bounds_N1[: limit + 1])


def index_folder() -> Path:
    """Where indices lie, of all files of data."""
    # Imported here: it is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "index"


def indexed(file: BinaryIO, path: Path, kind: str, find: Callable[[], Index]) -> Index:
    """What `find` says of the open file at `path`, or said when the file was the same one: of the
    same size, and not written to since, as the file system tells."""
    own = identity(file)
    if os.fstat(file.fileno()).st_size < LEAST[kind]:
        return find()
    place = hashlib.sha256(f"{kind} {path.absolute()}".encode(errors="surrogateescape"))
    kept = index_folder() / f"{place.hexdigest()}.index"
    index = _read(kept, own)
    if index is None:
        index = find()
        if identity(file) == own:
            _write(kept, own, index)
    return index


def identity(file: BinaryIO) -> bytes:
    """What tells an open file from every other, and from itself before it was written to."""
    found = os.fstat(file.fileno())
    # The time of change, which programs cannot set, beside that of writing, which copies keep.
    times = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return hashlib.sha256(repr((FORMAT, found.st_dev, found.st_ino, *times)).encode()).digest()


def _read(kept: Path, file: bytes) -> Index | None:
    """The index, mapped; None where there is none of this file, or a damaged one."""
    try:
        whole_N: NDArray[np.int64] = np.asarray(np.memmap(kept, np.int64, "r"))
        os.utime(kept)
    except (OSError, ValueError):
        return None
    if len(whole_N) < 3 * _WORDS + 2:
        return None
    own, of_file, content = (whole_N[at * _WORDS :][:_WORDS].tobytes() for at in range(3))
    if of_file != file or hashlib.sha256(whole_N[_WORDS:].data).digest() != own:
        return None
    samples, rest_N = int(whole_N[3 * _WORDS]), whole_N[3 * _WORDS + 1 :]
    return Index(rest_N[: samples + 1], rest_N[samples + 1 :], content.hex())


def _write(kept: Path, file: bytes, index: Index) -> None:
    """Eight bytes a number: SHA-256 of what follows, of the file's identity and of its content, the
    number of samples, then the numbers of the index."""
    digests = np.frombuffer(file + bytes.fromhex(index.digest), np.int64)
    samples = np.array([len(index.bounds_N1) - 1])
    told_N = np.concatenate([digests, samples, index.bounds_N1, index.beside_B])
    own = hashlib.sha256(told_N.data).digest()
    try:
        make_folder(kept.parent)
        _remove_unused(kept.parent)
        write_file(kept, own + told_N.tobytes())
    except (UserError, OSError):
        # It would only have saved time.
        return


@lru_cache
def _remove_unused(folder: Path) -> None:
    """Once in a process: there may be thousands of shards."""
    for old in folder.glob("*.index"):
        if time.time() - old.stat().st_mtime > UNUSED_S:
            old.unlink(missing_ok=True)
