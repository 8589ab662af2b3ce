"""Read samples from Parquet files.

The columns are `id`, `messages` and optionally `references`, `meta` and `images`. Messages are JSON
text or a list of structs. In structs, the image index of a box is stored as text, because a Parquet
column has a single type.

`images` is a list of structs of `path` and `bytes`, as in hub datasets. Samples refer to their
images by these paths or, if images have no path, by 0-based index. Without this column, image paths
are relative to the folder of the Parquet file.
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
"""Names of the columns that may contain JSON text."""


@dataclass(frozen=True, slots=True)
class ParquetSamples:
    """Random access to the first `num_samples` samples of an indexed Parquet file.

    The extra values of the index are the cumulative row counts at the end of each row group.
    """

    path: Path
    index: SampleIndex
    file_state: FileState
    num_samples: int
    has_images: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the file content in hexadecimal."""
        return self.index.digest

    def __len__(self) -> int:
        return self.num_samples

    def read_sample(self, index: int) -> LocatedSample:
        """Read a sample by index and check its types.

        Raises:
            UserError: The row is not a sample, or the file is corrupt or modified.
        """
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
        """Return file and 1-based row number of a sample for messages."""
        return f"{self.path}, row {index + 1}"

    def take(self, limit: int | None) -> ParquetSamples:
        """Return a view of the first `limit` samples; None means all."""
        return self if limit is None else replace(self, num_samples=min(limit, self.num_samples))


def open_parquet_samples(path: Path) -> ParquetSamples:
    """Open and index a Parquet file of samples.

    Raises:
        UserError: The file is corrupt or has another format.
    """

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
    """Read the first row of a Parquet file as JSON data, without its images.

    Used to detect whether the file contains samples. Returns None if the file has no rows or the
    first row is unreadable.

    Raises:
        UserError: The file is corrupt or has another format.
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
    """Decode the JSON columns of a Parquet row and remove keys whose value is null."""
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
