"""Many files of samples as one."""

from __future__ import annotations

import glob
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from finesight.data.jsonl import Located
from finesight.errors import UserError, look_beside

PACKED = (".tar", ".parquet")
"""How the names of files end that bring their pictures along."""

PATTERN = frozenset("*?[")
"""Characters of a path that fits many files."""


class Samples(Protocol):
    """Samples of one source by their places; a sample is read when it is asked for."""

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """A SHA-256, in hexadecimal: who shares it has the same samples in the same order."""
        ...

    def located(self, index: int) -> Located:
        """A sample by its types alone. Raises UserError."""
        ...

    def where(self, index: int) -> str:
        """File and place of a sample, as messages name them."""
        ...

    def first(self, limit: int | None) -> Samples:
        """So many at most, from the start."""
        ...


class Shards:
    """The samples of several files end to end."""

    def __init__(self, parts: Sequence[Samples], limit: int | None = None) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))
        self._samples = self._ends[-1] if limit is None else min(limit, self._ends[-1])

    @property
    def digest(self) -> str:
        """Of those of all files."""
        return hashlib.sha256("".join(part.digest for part in self._parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self._samples

    def located(self, index: int) -> Located:
        """A sample by its types alone. Raises UserError."""
        part, place = self._place(index)
        return part.located(place)

    def where(self, index: int) -> str:
        """File and place of a sample, as messages name them."""
        part, place = self._place(index)
        return part.where(place)

    def first(self, limit: int | None) -> Shards:
        """So many at most, from the start of the first file."""
        return Shards(self._parts, limit)

    def _place(self, index: int) -> tuple[Samples, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number] - len(self._parts[number]))


def packed(address: str) -> str:
    """The address, of files that bring their pictures along. Raises UserError for others."""
    if not address.lower().endswith(PACKED):
        raise UserError(
            "a file in object storage that is neither .tar nor .parquet",
            where=address,
            expected="files with their pictures in them",
            remedy="pack samples and pictures into tars or Parquet files, or copy them here",
        )
    return address


def is_pattern(path: Path) -> bool:
    """Whether the path is meant to fit many files: a file of that very name is that file."""
    return bool(PATTERN & {*str(path)}) and not path.exists()


def files_at(path: Path) -> list[Path]:
    """The file itself, or all that a pattern such as `shards/*.tar` fits, by name. Raises UserError
    where there is none."""
    if not is_pattern(path):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(
            "no file fits",
            where=str(path),
            expected="a path, or a pattern such as shards/*.tar that fits one file or more",
            remedy=look_beside(path),
        )
    return files
