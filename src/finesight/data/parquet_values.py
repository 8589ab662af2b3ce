"""Convert Parquet rows to Python values with bounded memory.

Some dates, times and durations cannot be represented in Python. Years before 1 or after 9999 become
null, fractions of a microsecond are truncated, and unknown time zones are converted to UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finesight.data.limits import check_limit
from finesight.errors import UserError

MAX_ROW_BYTES = 2**28
"""Maximum number of bytes of a row. Two copies of a row are in memory."""

MAX_BATCH_BYTES = 2**29
"""Maximum number of bytes of a batch.

Each decoded row is assumed to be as large as its row group.
"""

MAX_BATCH_ROWS = 64
"""Maximum number of rows in a batch."""

MAX_UNCHECKED_ROWS = 100_000
"""Number of rows that is accepted for any file size.

Beyond it, a file must have at least one byte per row. A smaller file repeats one row, because
Parquet can encode repeated rows in no space.
"""

_UNREPRESENTABLE = (ValueError, OverflowError, LookupError)
"""Exceptions of pyarrow for dates out of range and unknown time zones."""


def check_row_count(path: Path, rows: int) -> None:
    """Reject a Parquet file with more rows than bytes.

    Raises:
        UserError: All rows are identical, and reading them would take hours or exhaust the memory.
    """
    size = path.stat().st_size
    if rows > max(MAX_UNCHECKED_ROWS, size):
        raise UserError(
            f"{rows:,} rows in {size:,} bytes: all rows are identical",
            where=str(path),
            expected="different rows, with at least one byte each",
            remedy="check the creation of the file; write each row once",
        )


def get_batch_size(group: Any) -> int:
    """Return the number of rows to read from a Parquet row group at once.

    A dictionary-encoded value is stored once, but each decoded row has a copy of it. The size of
    the full group is used, because pyarrow can crash on the size of a corrupt column.
    """
    size: int = group.total_byte_size
    return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // max(1, size)))


def iter_records(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pyarrow record batch or table as dictionaries.

    Raises:
        LimitExceededError: A row exceeds `MAX_ROW_BYTES`. `where` is the location in the error
            message.
    """
    names = batch.schema.names
    step = batch.num_rows if batch.nbytes <= MAX_ROW_BYTES else 1
    for start in range(0, batch.num_rows, max(1, step)):
        rows = batch.slice(start, step)
        if step == 1:
            check_limit(rows.nbytes, MAX_ROW_BYTES, "bytes", where)
        columns = [_convert_column(column) for column in rows.columns]
        for row in zip(*columns, strict=True):
            yield dict(zip(names, row, strict=True))


def _convert_column(column: Any) -> list[Any]:
    """Convert a pyarrow column to Python values.

    Values are converted one by one if some of them cannot be represented in Python.
    """
    try:
        values: list[Any] = column.to_pylist()
    except _UNREPRESENTABLE:
        return [_convert_value(scalar) for scalar in column]
    return values


def _convert_value(scalar: Any) -> Any:
    """Convert a pyarrow scalar to a Python value.

    The scalar may contain nested times that Python cannot represent; see `_convert_time`.
    """
    from pyarrow import types

    try:
        return scalar.as_py()
    except _UNREPRESENTABLE:
        if not scalar.is_valid:
            return None
        if types.is_temporal(scalar.type) and not types.is_interval(scalar.type):
            return _convert_time(scalar)
        if types.is_struct(scalar.type):
            return {name: _convert_value(inner) for name, inner in scalar.items()}
        if types.is_nested(scalar.type):  # lists, and maps as lists of pairs
            return [_convert_value(inner) for inner in scalar.values]
        raise


def _convert_time(scalar: Any) -> Any:
    """Convert a time or duration to microseconds and UTC, or None if out of range."""
    import pyarrow

    kind = scalar.type
    # Only nanoseconds are converted: conversion from other units could overflow.
    is_fine = not pyarrow.types.is_date(kind) and kind.unit == "ns"
    candidate_types: list[Any] = []
    if pyarrow.types.is_timestamp(kind):
        unit = "us" if is_fine else kind.unit
        candidate_types = [
            pyarrow.timestamp(unit, kind.tz),
            pyarrow.timestamp(unit, kind.tz and "UTC"),
        ]
    elif is_fine and pyarrow.types.is_duration(kind):
        candidate_types = [pyarrow.duration("us")]
    elif is_fine:
        candidate_types = [pyarrow.time64("us")]
    for other in candidate_types:
        try:
            return scalar.cast(other, safe=False).as_py()
        except _UNREPRESENTABLE:
            continue
    return None
