"""The data files of a recipe as one sequence of samples: JSONL, Parquet, tars, or many of these."""

from __future__ import annotations

import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

from finesight.child_processes import exit_with_parent
from finesight.config import DataFile, HeldOutFile
from finesight.data.jsonl import Located, line_samples, no_samples
from finesight.data.parquet_samples import parquet_samples
from finesight.data.rules import check_sample
from finesight.data.shards import Samples, Shards, files_at, packed
from finesight.data.tar_samples import tar_samples
from finesight.remote.objects import fetched

MANY = 8
"""Files that are worth processes of their own."""


@dataclass(frozen=True)
class Corpus:
    """The samples of all files end to end, limits applied. They stay in their files, and each is
    read when it is asked for: a corpus of millions needs little memory.

    `fingerprint` is a SHA-256 over the files' bytes, limits and weights: two corpora that share it
    give the same samples in the same order, wherever the files lie.
    """

    files: tuple[Samples, ...]
    weights: tuple[float, ...]
    fingerprint: str
    answered: bool = True

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each file, in order."""
        return tuple(len(samples) for samples in self.files)

    def read(self, limit: int | None = None) -> list[Located]:
        """All samples, or the first ones, each read and checked now."""
        return [self.checked(index) for index in range(len(self))[:limit]]

    def __len__(self) -> int:
        return self._ends[-1] if self.files else 0

    def __getitem__(self, index: int) -> Located:
        """A sample that has been checked before, so that its types alone are looked at."""
        source, place = self._place(index)
        return source.located(place)

    def checked(self, index: int) -> Located:
        """A sample. Raises UserError naming file and line for what `check_sample` refuses."""
        source, place = self._place(index)
        found = source.located(place)
        check_sample(found.sample, source.where(place), answered=self.answered)
        return found

    def where(self, index: int) -> str:
        """A sample's file and line."""
        source, place = self._place(index)
        return source.where(place)

    def _place(self, index: int) -> tuple[Samples, int]:
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number] - len(self.files[number]))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))


def load_sources(files: Sequence[HeldOutFile], *, answered: bool = True) -> Corpus:
    """The files of a recipe's `data.train` or `data.eval`, their samples not yet looked at. Raises
    UserError for a file that is missing, unreadable or empty."""
    identity = hashlib.sha256()
    found: list[Samples] = []
    for file in files:
        found.append(samples_at(file.path))
        identity.update(f"{found[-1].digest} {file.limit} {_weight(file)!r}\n".encode())
    limited = (samples.first(file.limit) for samples, file in zip(found, files, strict=True))
    weights = tuple(map(_weight, files))
    return Corpus(tuple(limited), weights, identity.hexdigest(), answered)


def samples_at(place: Path | str) -> Samples:
    """Those of a file, or of all files that a pattern fits, on this machine or, of an address, in
    object storage. Raises UserError for none."""
    files = files_at(place) if isinstance(place, Path) else fetched(packed(place))
    shards = _of_files(files)
    samples = shards[0] if len(files) == 1 else Shards(tuple(shards))
    if not len(samples):
        raise no_samples(place)
    return samples


def _of_files(files: list[Path]) -> list[Samples]:
    """Those of each file; of many files in several processes, as going through one takes a while
    where that was not done before."""
    cores = os.cpu_count() or 1
    if len(files) < MANY or cores == 1 or sys.platform != "linux":
        return [_of_file(file) for file in files]
    processes, context = min(cores, len(files)), get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=exit_with_parent) as pool:
        return list(pool.map(_of_file, files))


def _of_file(path: Path) -> Samples:
    kinds: dict[str, Callable[[Path], Samples]]
    kinds = {".tar": tar_samples, ".parquet": parquet_samples}
    return kinds.get(path.suffix.lower(), line_samples)(path)


def _weight(file: HeldOutFile) -> float:
    # What is measured on is measured once.
    return file.weight if isinstance(file, DataFile) else 1.0
