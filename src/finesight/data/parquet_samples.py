"""Samples in Parquet files with the columns `id`, `messages` and optionally `references`, `meta`,
`images`.

Messages are JSON text, or a list of structs. In structs, the image index of a box is text, because
a column has one type.

`images` is a list of structs of `path` and `bytes`, as in hub datasets. Samples refer to their
images by these paths or, without paths, by 0-based index. Without the column, paths are relative to
the folder of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from finesight.bounded_files import parse_json
from finesight.data.container_paths import parquet_row_path
from finesight.data.index_cache import SampleIndex, load_or_build_index
from finesight.data.jsonl import LocatedSample, sample_from_dict
from finesight.data.line_index import FileState, open_data_file, open_unchanged, read_file_state
from finesight.data.parquet_row_groups import (
    IMAGES_COLUMN,
    has_images,
    list_row_group_sizes,
    read_first_row,
    read_parquet_metadata,
    read_text_columns,
    translate_parquet_errors,
)
from finesight.data.parquet_values import iter_records
from finesight.digests import sha256_file
from finesight.errors import UserError

JSON_COLUMNS = ("messages", "references", "meta")
"""Columns that may contain JSON text."""


@dataclass(frozen=True, slots=True)
class ParquetSamples:
    """The first `num_samples` samples of an unmodified Parquet file.

    The extra values of the index contain the end row of each group.
    """

    path: Path
    index: SampleIndex
    file_state: FileState
    num_samples: int
    has_images: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes of the file."""
        return self.index.digest

    def __len__(self) -> int:
        return self.num_samples

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample and check its types. Raises UserError."""
        ends_G = self.index.extra_B
        group = int(np.searchsorted(ends_G, index, side="right"))
        group_start = int(ends_G[group - 1]) if group else 0
        with open_unchanged(self.path, self.file_state), translate_parquet_errors(self.path):
            (record,) = iter_records(
                read_text_columns(self.path, group).slice(index - group_start, 1),
                self.location(index),
            )
        sample = sample_from_dict(
            _decode_record(record, self.location(index)), self.location(index)
        )
        if not self.has_images:
            return LocatedSample(sample, self.path.parent)
        return LocatedSample(
            sample.map_paths(lambda name: parquet_row_path(index + 1, name)), self.path
        )

    def location(self, index: int) -> str:
        """Return file and row for messages."""
        return f"{self.path}, row {index + 1}"

    def take(self, limit: int | None) -> ParquetSamples:
        """Return the first `limit` samples."""
        return self if limit is None else replace(self, num_samples=min(limit, self.num_samples))


def open_parquet_samples(path: Path) -> ParquetSamples:
    """Open the samples of a Parquet file. Raises UserError for a file of another format."""

    def build_index() -> SampleIndex:
        ends = np.array([*accumulate(list_row_group_sizes(path))], dtype=np.int64)
        return SampleIndex(np.zeros(1, np.int64), ends, sha256_file(path))

    with open_data_file(path) as file:
        index, file_state = (
            load_or_build_index(file, path, "parquet", build_index),
            read_file_state(file),
        )
    num_rows = int(index.extra_B[-1]) if len(index.extra_B) else 0
    return ParquetSamples(path, index, file_state, num_rows, has_images(path))


def read_first_record(path: Path) -> dict[str, Any] | None:
    """Read the first row as JSON data without images.

    Returns None for an empty file or texts that are not JSON. Raises UserError for a file of
    another format.
    """
    if not read_parquet_metadata(path).num_rows:
        return None
    try:
        with translate_parquet_errors(path):
            row = read_first_row(path)
        return _decode_record(row, str(path)) | ({IMAGES_COLUMN: []} if has_images(path) else {})
    except UserError:
        return None


def _decode_record(record: dict[str, Any], location: str) -> dict[str, Any]:
    """Decode JSON texts of a row and remove keys without a value."""
    try:
        decoded = {
            name: parse_json(value) if name in JSON_COLUMNS and isinstance(value, str) else value
            for name, value in record.items()
        }
    except ValueError as error:
        raise UserError(
            f"broken JSON: {error}",
            where=location,
            expected=f"JSON, or lists and structs, in {', '.join(JSON_COLUMNS)}",
            remedy="write the file again",
        ) from error
    cleaned: dict[str, Any] = _drop_none(decoded)
    return cleaned


def _drop_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value
