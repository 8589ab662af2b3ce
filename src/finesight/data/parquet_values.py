"""Values out of Parquet files as Python has them, in rows of bounded size.

Of dates, times and durations some are no Python values: those before the year 1 or after 9999, of
a fraction of a microsecond, or in a time zone that nobody knows. These become null, are cut to
microseconds, or are given in UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finesight.data.limits import check_count
from finesight.errors import UserError

LARGEST_ROW = 2**28
"""Bytes of a row: all of it is in memory at once, twice."""

LARGEST_BATCH = 2**29
"""Bytes that the rows of a batch take, at most, where values repeat."""

MOST_ROWS = 64
"""Rows that are read at once."""

SURE_ROWS = 100_000
"""Rows that a file of any size may have. Further ones take a byte or more: fewer say that all rows
are the same, which encodings of Parquet hold in no bytes at all."""

_UNREPRESENTABLE = (ValueError, OverflowError, LookupError)
"""What a date out of range, or an unknown time zone, raises when it is turned into Python's."""


def check_rows(path: Path, rows: int) -> None:
    """Refuse a file of more rows than bytes.

    Raises:
        UserError: All rows are the same, and reading them would take hours or fill the memory.
    """
    size = path.stat().st_size
    if rows > max(SURE_ROWS, size):
        raise UserError(
            f"{rows:,} rows in {size:,} bytes: they are all the same",
            where=str(path),
            expected="rows that differ, at least a byte for each",
            remedy="check how the file was made; write each row once",
        )


def batch_rows(group: Any) -> int:
    """Return how many rows of a row group to read at once.

    A dictionary holds a value once for all rows that have it: read, each row has its own. The group
    is asked for its size alone: asked for a damaged column, pyarrow ends the process.
    """
    size: int = group.total_byte_size
    return max(1, min(MOST_ROWS, LARGEST_BATCH // max(1, size)))


def records(batch: Any, where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record batch or table as plain records. Raises TooMany at `where`."""
    names = batch.schema.names
    step = batch.num_rows if batch.nbytes <= LARGEST_ROW else 1
    for start in range(0, batch.num_rows, max(1, step)):
        rows = batch.slice(start, step)
        if step == 1:
            check_count(rows.nbytes, LARGEST_ROW, "bytes", where)
        columns = [_values(column) for column in rows.columns]
        for row in zip(*columns, strict=True):
            yield dict(zip(names, row, strict=True))


def _values(column: Any) -> list[Any]:
    """The values of a column; one by one where some cannot be represented."""
    try:
        values: list[Any] = column.to_pylist()
    except _UNREPRESENTABLE:
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    """One value, of which a part may be a time that Python cannot represent."""
    from pyarrow import types

    try:
        return scalar.as_py()
    except _UNREPRESENTABLE:
        if not scalar.is_valid:
            return None
        if types.is_temporal(scalar.type) and not types.is_interval(scalar.type):
            return _time(scalar)
        if types.is_struct(scalar.type):
            return {name: _value(inner) for name, inner in scalar.items()}
        if types.is_nested(scalar.type):  # lists, and maps as lists of pairs
            return [_value(inner) for inner in scalar.values]
        raise


def _time(scalar: Any) -> Any:
    """A time in microseconds and UTC, as far as it is one; None for one out of range."""
    import pyarrow

    kind = scalar.type
    # Nanoseconds alone are converted: of other units a conversion could overflow.
    is_fine = not pyarrow.types.is_date(kind) and kind.unit == "ns"
    wanted: list[Any] = []
    if pyarrow.types.is_timestamp(kind):
        unit = "us" if is_fine else kind.unit
        wanted = [pyarrow.timestamp(unit, kind.tz), pyarrow.timestamp(unit, kind.tz and "UTC")]
    elif is_fine and pyarrow.types.is_duration(kind):
        wanted = [pyarrow.duration("us")]
    elif is_fine:
        wanted = [pyarrow.time64("us")]
    for other in wanted:
        try:
            return scalar.cast(other, safe=False).as_py()
        except _UNREPRESENTABLE:
            continue
    return None
