"""Samples in Parquet files: the columns `id` and `messages`, and where needed `references`, `meta`
and `images`. Messages are JSON in a text, or a list of structs as JSON has them, where a box tells
its picture's number as a text, since a column has one type.

`images` is a list of structs of `path` and `bytes`, as the hubs' data sets have it: then samples
name their pictures by these paths or, where there are none, by their numbers from 0 on. Without it
their paths are relative to the file's folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from finesight.bounded_files import parse_json
from finesight.data.index_files import Index, indexed
from finesight.data.inside import in_row
from finesight.data.jsonl import Located, sample_from
from finesight.data.lines import State, opened, state_of, unchanged
from finesight.data.parquet_groups import (
    PICTURES,
    first_text,
    group_sizes,
    has_pictures,
    metadata,
    texts,
    undamaged,
)
from finesight.data.parquet_values import records
from finesight.digests import digest
from finesight.errors import UserError

WRITTEN_AS_JSON = ("messages", "references", "meta")
"""Columns that may hold JSON in a text."""


@dataclass(frozen=True, slots=True)
class ParquetSamples:
    """The first `samples` of a Parquet file in the `state` in which they were counted; by the
    `index`, its groups end before the rows `beside_B`."""

    path: Path
    index: Index
    state: State
    samples: int
    pictured: bool

    @property
    def digest(self) -> str:
        """Of the file's bytes."""
        return self.index.digest

    def __len__(self) -> int:
        return self.samples

    def located(self, index: int) -> Located:
        """A sample by its types alone. Raises UserError."""
        ends_G = self.index.beside_B
        group = int(np.searchsorted(ends_G, index, side="right"))
        before = int(ends_G[group - 1]) if group else 0
        with unchanged(self.path, self.state), undamaged(self.path):
            (record,) = records(texts(self.path, group).slice(index - before, 1), self.where(index))
        sample = sample_from(_record(record, self.where(index)), self.where(index))
        if not self.pictured:
            return Located(sample, self.path.parent)
        return Located(sample.with_files(lambda name: in_row(index + 1, name)), self.path)

    def where(self, index: int) -> str:
        """File and row as messages name them."""
        return f"{self.path}, row {index + 1}"

    def first(self, limit: int | None) -> ParquetSamples:
        """So many samples at most, from the start."""
        return self if limit is None else replace(self, samples=min(limit, self.samples))


def parquet_samples(path: Path) -> ParquetSamples:
    """The samples of a Parquet file. Raises UserError for one that is none."""

    def found() -> Index:
        ends = np.array([*accumulate(group_sizes(path))], dtype=np.int64)
        return Index(np.zeros(1, np.int64), ends, digest(path))

    with opened(path) as file:
        index, state = indexed(file, path, "parquet", found), state_of(file)
    rows = int(index.beside_B[-1]) if len(index.beside_B) else 0
    return ParquetSamples(path, index, state, rows, has_pictures(path))


def first_record(path: Path) -> dict[str, Any] | None:
    """The first row as JSON data, without its pictures; None where there is none, or where its
    texts hold something else. Raises UserError for a file that is no Parquet."""
    if not metadata(path).num_rows:
        return None
    try:
        with undamaged(path):
            found = first_text(path)
        return _record(found, str(path)) | ({PICTURES: []} if has_pictures(path) else {})
    except UserError:
        return None


def _record(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as JSON data: texts that hold JSON read, keys without a value left out."""
    try:
        read = {
            name: parse_json(value) if name in WRITTEN_AS_JSON and isinstance(value, str) else value
            for name, value in record.items()
        }
    except ValueError as error:
        raise UserError(
            f"broken JSON: {error}",
            where=where,
            expected=f"JSON, or lists and structs, in {', '.join(WRITTEN_AS_JSON)}",
            remedy="write the file again",
        ) from error
    said: dict[str, Any] = _without_nothing(read)
    return said


def _without_nothing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nothing(one) for key, one in value.items() if one is not None}
    return [_without_nothing(one) for one in value] if isinstance(value, list) else value
