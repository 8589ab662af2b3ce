"""Concatenate the data files of a recipe (JSONL, Parquet, tar, glob patterns) into one corpus."""

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
from finesight.config import DataFileSettings, TrainFileSettings
from finesight.data.jsonl import LocatedSample, build_no_samples_error, open_jsonl_samples
from finesight.data.parquet_samples import open_parquet_samples
from finesight.data.sample_validation import validate_sample
from finesight.data.sharded_samples import (
    SampleSource,
    ShardedSamples,
    check_packed_url,
    expand_files,
)
from finesight.data.tar_samples import open_tar_samples

MIN_PARALLEL_FILES = 8
"""Minimum number of data files that are indexed in parallel by worker processes."""


@dataclass(frozen=True)
class Corpus:
    """The samples of all data files of a recipe, concatenated, with `limit` applied per file.

    Samples remain on disk and are read on access, so a corpus of millions of samples needs little
    memory.

    Attributes:
        sources: One source of samples per entry of `data.train` or `data.eval`.
        weights: Sampling weight of each source.
        fingerprint: SHA-256 over the contents of the files, their limits and weights. Corpora with
            equal fingerprints contain the same samples in the same order, regardless of the path of
            the files.
        require_answer: Whether validation rejects samples without a final assistant message.
    """

    sources: tuple[SampleSource, ...]
    weights: tuple[float, ...]
    fingerprint: str
    require_answer: bool = True

    @property
    def source_sizes(self) -> tuple[int, ...]:
        """Number of samples per source, in order."""
        return tuple(len(source) for source in self.sources)

    def read_samples(self, limit: int | None = None) -> list[LocatedSample]:
        """Read and validate all samples of the corpus, or only the first `limit`."""
        return [self.read_validated(index) for index in range(len(self))[:limit]]

    def __len__(self) -> int:
        return self._ends[-1] if self.sources else 0

    def __getitem__(self, index: int) -> LocatedSample:
        """Read a sample and check its types.

        The content is not validated again: samples are expected to have passed `read_validated`.
        """
        source, local_index = self._locate(index)
        return source.read_sample(local_index)

    def read_validated(self, index: int) -> LocatedSample:
        """Read and fully validate a sample.

        Raises:
            UserError: The sample is invalid. The error names its file and line.
        """
        source, local_index = self._locate(index)
        located_sample = source.read_sample(local_index)
        validate_sample(
            located_sample.sample, source.location(local_index), require_answer=self.require_answer
        )
        return located_sample

    def location(self, index: int) -> str:
        """Return the location of a sample for messages, such as `train.jsonl:12`."""
        source, local_index = self._locate(index)
        return source.location(local_index)

    def _locate(self, index: int) -> tuple[SampleSource, int]:
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        source_index = bisect_right(self._ends, index)
        return self.sources[source_index], index - (
            self._ends[source_index] - len(self.sources[source_index])
        )

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.source_sizes))


def load_corpus(files: Sequence[DataFileSettings], *, require_answer: bool = True) -> Corpus:
    """Open the data files of `data.train` or `data.eval` without reading their samples.

    Args:
        files: Entries of the recipe with path, limit and weight.
        require_answer: Whether validation rejects samples without a final assistant message.

    Raises:
        UserError: A file is missing, unreadable or empty.
    """
    sha256 = hashlib.sha256()
    sources: list[SampleSource] = []
    for file in files:
        sources.append(open_sample_source(file.path))
        sha256.update(f"{sources[-1].digest} {file.limit} {_file_weight(file)!r}\n".encode())
    limited = (source.take(file.limit) for source, file in zip(sources, files, strict=True))
    weights = tuple(map(_file_weight, files))
    return Corpus(tuple(limited), weights, sha256.hexdigest(), require_answer)


def open_sample_source(path_or_url: Path | str) -> SampleSource:
    """Open a data file, a glob pattern or an object storage URL as one source.

    Raises:
        UserError: No file matches, a file is unreadable, or there are no samples.
    """
    if isinstance(path_or_url, Path):
        files = expand_files(path_or_url)
    else:
        from finesight.hub.url_files import fetch_objects

        files = fetch_objects(check_packed_url(path_or_url))
    sources = _open_files(files)
    source = sources[0] if len(files) == 1 else ShardedSamples(tuple(sources))
    if not len(source):
        raise build_no_samples_error(path_or_url)
    return source


def _open_files(files: list[Path]) -> list[SampleSource]:
    """Open and index each data file, in worker processes if there are many."""
    num_cpus = os.cpu_count() or 1
    if len(files) < MIN_PARALLEL_FILES or num_cpus == 1 or sys.platform != "linux":
        return [_open_file(file) for file in files]
    processes, context = min(num_cpus, len(files)), get_context("fork")
    with ProcessPoolExecutor(processes, context, initializer=exit_with_parent) as pool:
        return list(pool.map(_open_file, files))


def _open_file(path: Path) -> SampleSource:
    openers: dict[str, Callable[[Path], SampleSource]]
    openers = {".tar": open_tar_samples, ".parquet": open_parquet_samples}
    return openers.get(path.suffix.lower(), open_jsonl_samples)(path)


def _file_weight(file: DataFileSettings) -> float:
    # Evaluation files have no sampling weight.
    return file.weight if isinstance(file, TrainFileSettings) else 1.0
