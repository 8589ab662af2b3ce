"""Where the samples of a large file lie, kept for the next start: found once, then mapped into
memory, which all processes of a machine share."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
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

_DIGEST = 32
"""Bytes of a SHA-256."""


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
    """What `find` says of the open file at `path`, or said when the file was the same one: in the
    same place, of the same size, and not written to since, as the file system tells."""
    identity = _identity(file, path, kind)
    if os.fstat(file.fileno()).st_size < LEAST[kind]:
        return find()
    kept = index_folder() / f"{identity}.index"
    index = _read(kept)
    if index is None:
        index = find()
        if _identity(file, path, kind) == identity:
            _write(kept, index)
    return index


def _identity(file: BinaryIO, path: Path, kind: str) -> str:
    found = os.fstat(file.fileno())
    # The time of change, which programs cannot set, beside that of writing, which copies keep.
    times = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    told = FORMAT, kind, str(path.absolute()), found.st_dev, found.st_ino, *times
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _read(kept: Path) -> Index | None:
    """The index, mapped; None where there is none, or a damaged one."""
    try:
        whole_N: NDArray[np.int64] = np.asarray(np.memmap(kept, np.int64, "r"))
        os.utime(kept)
    except (OSError, ValueError):
        return None
    words = _DIGEST // 8
    if len(whole_N) < 2 * words + 2:
        return None
    if hashlib.sha256(whole_N[words:].data).digest() != whole_N[:words].tobytes():
        return None
    samples, rest_N = int(whole_N[2 * words]), whole_N[2 * words + 1 :]
    digest = whole_N[words : 2 * words].tobytes().hex()
    return Index(rest_N[: samples + 1], rest_N[samples + 1 :], digest)


def _write(kept: Path, index: Index) -> None:
    """Eight bytes a number: a SHA-256 of what follows, the content's, the number of samples, then
    the numbers of the index."""
    content = np.frombuffer(bytes.fromhex(index.digest), np.int64)
    samples = np.array([len(index.bounds_N1) - 1])
    told_N = np.concatenate([content, samples, index.bounds_N1, index.beside_B])
    own = np.frombuffer(hashlib.sha256(told_N.data).digest(), np.int64)
    try:
        make_folder(kept.parent)
        _remove_unused(kept.parent)
        write_file(kept, np.concatenate([own, told_N]).tobytes())
    except (UserError, OSError):
        # It would only have saved time.
        return


def _remove_unused(folder: Path) -> None:
    for old in folder.glob("*.index"):
        if time.time() - old.stat().st_mtime > UNUSED_S:
            old.unlink(missing_ok=True)
