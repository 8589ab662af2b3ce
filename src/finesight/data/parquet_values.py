"""Convert Parquet values to Python values, in batches of bounded size.

Some dates, times and durations have no Python value: years before 1 or after 9999, fractions of a
microsecond, unknown time zones. They become null, are truncated to microseconds, or are converted
to UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finesight.data.limits import check_limit
from finesight.errors import UserError

MAX_ROW_BYTES = 2**28
"""Maximum number of bytes of a row, of which two copies are in memory."""

MAX_BATCH_BYTES = 2**29
"""Maximum number of bytes of the rows of a batch with repeated values."""

MAX_BATCH_ROWS = 64
"""Maximum number of rows of a batch."""

MAX_UNCHECKED_ROWS = 100_000
"""Number of rows that is accepted for any file size. More rows need at least a byte each: a smaller
file repeats one row, which Parquet can encode in no bytes."""

_UNREPRESENTABLE = (ValueError, OverflowError, LookupError)
"""Exceptions for dates out of range and unknown time zones."""


def check_row_count(path: Path, rows: int) -> None:
    """Reject a file with more rows than bytes.

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
    """Return the number of rows of a row group to read as a batch.

    A dictionary stores a repeated value once, but each decoded row has a copy. Only the size of the
    group is used: pyarrow can crash on the size of a corrupt column.
    """
    size: int = group.total_byte_size
    return max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES // max(1, size)))


def iter_records(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch or table as dictionaries.

    Raises LimitExceededError at `where`.
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
    """Return the values of a column, converted individually if some have no Python value."""
    try:
        values: list[Any] = column.to_pylist()
    except _UNREPRESENTABLE:
        return [_convert_value(scalar) for scalar in column]
    return values


def _convert_value(scalar: Any) -> Any:
    """Convert one value, which may contain a time without a Python value."""
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
    """Convert a time to microseconds and UTC; None if it is out of range."""
    import pyarrow

    kind = scalar.type
    # Nanoseconds alone are converted: of other units a conversion could overflow.
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
