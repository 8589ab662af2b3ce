"""Concatenate the samples of several data files (shards)."""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from finesight.errors import Step, UserError, suggest_similar_path
from finesight.files.archive import TarArchive, open_tar
from finesight.files.bounded_files import parse_json, to_readable_name
from finesight.files.path_patterns import is_glob, iter_matches
from finesight.files.storage import sha256_file
from finesight.files.worker_pool import exit_with_parent
from finesight.samples.image_file import split_page
from finesight.samples.line_index import IndexedFile, SampleIndex, open_unchanged
from finesight.samples.parquet_reader import (
    IMAGES_COLUMN,
    has_images,
    iter_records,
    list_row_group_sizes,
    read_first_row,
    read_parquet_metadata,
    read_text_columns,
    translate_parquet_errors,
)
from finesight.samples.sample import (
    JSON_DATA_KEYS,
    JsonlSamples,
    LocatedSample,
    build_no_samples_error,
    open_jsonl_samples,
    parse_sample,
    remove_nulls,
    sample_from_dict,
    translate_errors,
    validate_sample,
)
from finesight.samples.tar_members import MemberGroup as Members
from finesight.samples.tar_members import iter_member_groups, split_member_name
from finesight.satellites import load_satellite
from finesight.settings.config import DataFileSettings, TrainFileSettings

PACKED_SUFFIXES = (".tar", ".parquet")


@dataclass(frozen=True)
class ShardedSamples:
    """The concatenated samples of several data files (shards)."""

    sources: tuple[SampleSource, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of all shards."""
        digests = "".join(source.digest for source in self.sources)
        return hashlib.sha256(digests.encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types."""
        source, local_index = self._locate(index)
        return source.read_sample(local_index)

    def location(self, index: int) -> str:
        """Return shard file and position of a sample for messages."""
        source, local_index = self._locate(index)
        return source.location(local_index)

    def take(self, limit: int | None) -> ShardedSamples:
        """Return a view of the first `limit` samples over all shards; None means all."""
        if limit is None:
            return self
        taken: list[SampleSource] = []
        num_before = 0
        for source in self.sources:
            taken.append(source.take(max(0, limit - num_before)))
            num_before += len(source)
        return ShardedSamples(tuple(taken))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.sources)))

    def _locate(self, index: int) -> tuple[SampleSource, int]:
        assert 0 <= index < self._ends[-1], f"sample {index} of {len(self)}"
        source_index = bisect_right(self._ends, index)
        source = self.sources[source_index]
        return source, index - self._ends[source_index] + len(source)


def expand_files(path: Path) -> list[Path]:
    """Return the files that match a glob pattern in sorted order, or the path itself."""
    if not is_glob(path):
        return [path]
    matches = sorted(map(Path, iter_matches(str(path))))
    files = [file for file in matches if file.is_file()]
    if not files:
        raise UserError(
            "no file matches",
            where=str(path),
            expected="a path, or a pattern such as shards/*.tar that matches at least one file",
            remedy=suggest_similar_path(path),
        )
    return files


class TarSamples(IndexedFile):
    """Random access to the samples of an indexed tar file.

    The tar headers and files of sample k are in the bytes from `offsets_N1[k]` to `offsets_N1[k +
    1]`. The digest covers all member names, sizes and sample JSON, but not the content of images.
    """

    kind = "tar"

    @staticmethod
    def build_index(file: BinaryIO, path: Path) -> SampleIndex:
        """Find the members of each sample."""
        sha256 = hashlib.sha256()
        starts = []
        stop = 0
        with open_tar(path) as tar:
            for members in iter_member_groups(tar):
                starts.append(members[0].offset)
                stop = members[-1].offset_data + members[-1].size
                for member in members:
                    sha256.update(f"{member.name!r} {member.size}\n".encode(errors="surrogatepass"))
                sha256.update(_read_sample_json(tar, members)[0])
        return SampleIndex(np.array([*starts, stop]), np.empty(0, np.int64), sha256.hexdigest())

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types."""
        start, stop = self.index.offsets_N1[index : index + 2].tolist()
        with open_unchanged(self.path, self.file_state), open_tar(self.path, start) as tar:
            headers = tar.iter_headers()
            members = [*itertools.takewhile(lambda member: member.offset < stop, headers)]
            content, folder = _read_sample_json(tar, members)
        folder = to_readable_name(folder)
        sample = parse_sample(content, self.location(index))
        # Non-UTF-8 names are also found by their decoded form.
        paths_by_name: dict[str, str] = {}
        for member in members:
            file_name = posixpath.basename(member.name)
            path_in_tar = f"@{member.offset_data}+{member.size}/{file_name}"
            paths_by_name[member.name] = path_in_tar
            paths_by_name[to_readable_name(member.name)] = path_in_tar

        def map_path(name: str) -> str:
            document, page = split_page(name)
            member_path = paths_by_name.get(posixpath.normpath(posixpath.join(folder, document)))
            # Other names become paths below the tar, where no files exist: only images inside the
            # tar are valid.
            return (member_path or posixpath.normpath(f"/{document}").lstrip("/")) + page

        return LocatedSample(sample.map_paths(map_path), self.path)


def _read_sample_json(tar: TarArchive, members: Members) -> tuple[bytes, str]:
    for member in members:
        if split_member_name(member)[1] == "json":
            return tar.read_member(member), posixpath.dirname(member.name)
    raise UserError(
        f"no sample next to {members[0].name}",
        where=str(tar.archive),
        expected="a .json file with a sample per image: 0001.json, 0001.jpg, 0002.json, ...",
        remedy=Step("import", {"source": str(tar.archive), "out": "OUT"}, "import other tar files"),
    )


JSON_COLUMNS = ("tools", "messages", "references", "meta")


class ParquetSamples(IndexedFile):
    """Random access to the samples of an indexed Parquet file.

    The extra values of the index are the first rows of each row group.
    """

    kind = "parquet"
    unit = "row"

    @staticmethod
    def build_index(file: BinaryIO, path: Path) -> SampleIndex:
        """Find the row group of each sample."""
        sizes_G = np.array(list_row_group_sizes(path), np.int64)
        groups_N1 = np.repeat(np.arange(len(sizes_G) + 1), [*sizes_G, 1])
        return SampleIndex(groups_N1, np.cumsum(sizes_G) - sizes_G, sha256_file(path))

    @cached_property
    def has_images(self) -> bool:
        """Return whether the file contains its images."""
        return has_images(self.path)

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types."""
        group = int(self.index.offsets_N1[index])
        where = self.location(index)
        group_start = int(self.index.extra_B[group])
        with open_unchanged(self.path, self.file_state), translate_parquet_errors(self.path):
            row = read_text_columns(self.path, group).slice(index - group_start, 1)
            (record,) = iter_records(row, where)
        sample = sample_from_dict(_decode_record(record, where), where)
        if not self.has_images:
            return LocatedSample(sample, self.path.parent)
        sample = sample.map_paths(lambda name: f"@{index + 1}/{name}")
        return LocatedSample(sample, self.path)


def read_first_record(path: Path) -> dict[str, Any] | None:
    """Read the first sample of a tar or row of a Parquet file as JSON data, without its images.

    Used to detect whether the file contains samples. Returns None if the file has no rows or the
    first row is unreadable.
    """
    if path.suffix.lower() == ".tar":
        with open_tar(path) as tar, suppress(ValueError):
            for member in next(iter_member_groups(tar), []):
                if split_member_name(member)[1] == "json":
                    record = parse_json(tar.read_member(member))
                    return record if isinstance(record, dict) else None
        return None
    if not read_parquet_metadata(path).num_rows:
        return None
    with suppress(UserError), translate_parquet_errors(path):
        row = _decode_record(read_first_row(path), str(path))
        if has_images(path):
            row[IMAGES_COLUMN] = []
        return row
    return None


def _decode_record(record: dict[str, Any], location: str) -> dict[str, Any]:
    """Decode the JSON columns of a Parquet row and remove keys whose value is null."""
    expected = f"JSON, or lists and structs, in {', '.join(JSON_COLUMNS)}"
    with translate_errors("broken JSON", expected, "write the file again", location):
        decoded = {}
        for name, value in record.items():
            if name in JSON_COLUMNS and isinstance(value, str):
                decoded[name] = parse_json(value)
            else:
                decoded[name] = value
    cleaned: dict[str, Any] = remove_nulls(decoded, JSON_DATA_KEYS)
    return cleaned


SampleSource = JsonlSamples | TarSamples | ParquetSamples | ShardedSamples
"""Random access to the samples of a data file or shards, which are read from disk on access."""

MIN_PARALLEL_FILES = 8


@dataclass(frozen=True)
class Corpus(ShardedSamples):
    """The samples of all data files of a recipe, concatenated, with `limit` applied per file.

    Samples remain on disk and are read on access, so a corpus of millions of samples needs little
    memory.

    Attributes:
        fingerprint: SHA-256 over the contents of the files, their limits and weights. Corpora with
            equal fingerprints contain the same samples in the same order, regardless of the path of
            the files.
        require_answer: Whether validation rejects samples without a final assistant message.
    """

    weights: tuple[float, ...]
    fingerprint: str
    require_answer: bool = True

    @property
    def source_sizes(self) -> tuple[int, ...]:
        """Number of samples per source, in order."""
        return tuple(len(source) for source in self.sources)

    def get_weight(self, index: int) -> float:
        """Return the weight of the source of a sample."""
        return self.weights[bisect_right(self._ends, index)]

    def read_samples(self, limit: int | None = None) -> list[LocatedSample]:
        """Read and validate all samples of the corpus, or only the first `limit`."""
        return [self.read_validated(index) for index in range(len(self))[:limit]]

    def __getitem__(self, index: int) -> LocatedSample:
        """Read a sample and check its types.

        The content is not validated again: samples are expected to have passed `read_validated`.
        """
        return self.read_sample(index)

    def read_validated(self, index: int) -> LocatedSample:
        """Read and fully validate a sample."""
        found = self[index]
        where = self.location(index)
        validate_sample(found.sample, where, require_answer=self.require_answer)
        return found


def load_corpus(files: Sequence[DataFileSettings], *, require_answer: bool = True) -> Corpus:
    """Open the data files of `data.train` or `data.eval` without reading their samples.

    Args:
        files: Entries of the recipe with path, limit and weight.
        require_answer: Whether validation rejects samples without a final assistant message.
    """
    sha256 = hashlib.sha256()
    sources: list[SampleSource] = []
    for file in files:
        source = open_sample_source(file.path)
        sha256.update(f"{source.digest} {file.limit} {_file_weight(file)!r}\n".encode())
        sources.append(source.take(file.limit))
    weights = tuple(map(_file_weight, files))
    return Corpus(tuple(sources), weights, sha256.hexdigest(), require_answer)


def open_sample_source(path_or_url: Path | str) -> SampleSource:
    """Open a data file, a glob pattern or an object storage URL as one source."""
    if isinstance(path_or_url, Path):
        files = expand_files(path_or_url)
    else:
        if not path_or_url.lower().endswith(PACKED_SUFFIXES):
            raise UserError(
                "a file in object storage that is neither .tar nor .parquet",
                where=path_or_url,
                expected="files that contain their images",
                remedy="pack samples and images into tar or Parquet files, or download them",
            )
        files = load_satellite("finesight.hub.url_files:fetch_objects")(path_or_url)
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
    num_processes = min(num_cpus, len(files))
    context = get_context("fork")
    with ProcessPoolExecutor(num_processes, context, initializer=exit_with_parent) as pool:
        return list(pool.map(_open_file, files))


def _open_file(path: Path) -> SampleSource:
    openers: dict[str, Callable[[Path], SampleSource]]
    openers = {".tar": TarSamples.open, ".parquet": ParquetSamples.open}
    return openers.get(path.suffix.lower(), open_jsonl_samples)(path)


def _file_weight(file: DataFileSettings) -> float:
    # Evaluation files have no sampling weight.
    return file.weight if isinstance(file, TrainFileSettings) else 1.0


def draw_subset(num_samples: int, num_draws: int) -> Sequence[int]:
    """Draw about `num_draws` indices in ascending order, or all of fewer samples.

    The draw is deterministic: it depends only on the numbers.
    """
    if num_samples <= num_draws:
        return range(num_samples)
    draws = np.random.Philox(np.random.SeedSequence(num_samples)).random_raw(num_draws)
    indices: list[int] = np.unique(draws % num_samples).tolist()
    return indices
