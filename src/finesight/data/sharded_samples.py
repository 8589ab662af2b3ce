"""Concatenate the samples of several data files (shards)."""

from __future__ import annotations

import glob
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from finesight.data.jsonl import LocatedSample
from finesight.errors import UserError, suggest_similar_path

PACKED_SUFFIXES = (".tar", ".parquet")
"""Suffixes of sample files that contain their images."""

GLOB_CHARACTERS = frozenset("*?[")
"""Characters that mark a path as a glob pattern."""


class SampleSource(Protocol):
    """Interface for random access to the samples of a data file or shards.

    Samples are read from disk on access.
    """

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal that identifies the samples and their order."""
        ...

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types. Raises UserError."""
        ...

    def location(self, index: int) -> str:
        """Return file and position of a sample for messages."""
        ...

    def take(self, limit: int | None) -> SampleSource:
        """Return a view of the first `limit` samples; None means all."""
        ...


class ShardedSamples:
    """The concatenated samples of several data files (shards)."""

    def __init__(self, sources: Sequence[SampleSource], limit: int | None = None) -> None:
        self._sources = sources
        self._ends = list(accumulate(map(len, sources)))
        self._num_samples = self._ends[-1] if limit is None else min(limit, self._ends[-1])

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all shards."""
        return hashlib.sha256(
            "".join(source.digest for source in self._sources).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self._num_samples

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types. Raises UserError."""
        source, local_index = self._locate(index)
        return source.read_sample(local_index)

    def location(self, index: int) -> str:
        """Return shard file and position of a sample for messages."""
        source, local_index = self._locate(index)
        return source.location(local_index)

    def take(self, limit: int | None) -> ShardedSamples:
        """Return a view of the first `limit` samples over all shards; None means all."""
        return ShardedSamples(self._sources, limit)

    def _locate(self, index: int) -> tuple[SampleSource, int]:
        source_index = bisect_right(self._ends, index)
        return self._sources[source_index], index - (
            self._ends[source_index] - len(self._sources[source_index])
        )


def check_packed_url(url: str) -> str:
    """Return the URL unchanged if it refers to a file that contains its images.

    Raises:
        UserError: The URL ends neither in .tar nor in .parquet.
    """
    if not url.lower().endswith(PACKED_SUFFIXES):
        raise UserError(
            "a file in object storage that is neither .tar nor .parquet",
            where=url,
            expected="files that contain their images",
            remedy="pack samples and images into tar or Parquet files, or download them",
        )
    return url


def is_glob(path: Path) -> bool:
    """Return whether a path is a glob pattern rather than an existing file."""
    return bool(GLOB_CHARACTERS & {*str(path)}) and not path.exists()


def expand_files(path: Path) -> list[Path]:
    """Return the files that match a glob pattern in sorted order, or the path itself.

    Raises:
        UserError: No file matches the pattern.
    """
    if not is_glob(path):
        return [path]
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in matches if file.is_file()]
    if not files:
        raise UserError(
            "no file matches",
            where=str(path),
            expected="a path, or a pattern such as shards/*.tar that matches at least one file",
            remedy=suggest_similar_path(path),
        )
    return files
