"""Read Parquet files with bounded memory: row groups, rows as Python values, and images.

Row groups are the smallest readable unit. Some dates, times and durations cannot be represented in
Python: years before 1 or after 9999 become null, fractions of a microsecond are truncated, and
unknown time zones are converted to UTC.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.files.bounded_files import is_utf8, reject_special_file
from finesight.files.storage import require_free_space, write_folder_once
from finesight.samples.line_index import cache_folder, hash_file_identity
from finesight.samples.sample import check_limit

MAX_ROW_BYTES = 2**28
"""Maximum number of bytes of a row. Two copies of a row are in memory."""

MAX_BATCH_BYTES = 2**29
"""Maximum number of bytes of a batch.

Each decoded row is assumed to be as large as its row group.
"""

MAX_BATCH_ROWS = 64

MAX_UNCHECKED_ROWS = 100_000
"""Number of rows that is accepted for any file size.

Beyond it, a file must have at least one byte per row. A smaller file repeats one row, because
Parquet can encode repeated rows in no space.
"""

_UNREPRESENTABLE = (ValueError, OverflowError, LookupError)
"""Exceptions of pyarrow for dates out of range and unknown time zones."""


def check_row_count(path: Path, rows: int) -> None:
    """Reject a Parquet file with more rows than bytes."""
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
        columns = list(map(_convert_column, rows.columns))
        for row in zip(*columns, strict=True):
            yield dict(zip(names, row, strict=True))


def _convert_column(column: Any) -> list[Any]:
    """Convert a pyarrow column to Python values.

    Values are converted one by one if some of them cannot be represented in Python.
    """
    try:
        values: list[Any] = column.to_pylist()
    except _UNREPRESENTABLE:
        return list(map(_convert_value, column))
    return values


def _convert_value(scalar: Any) -> Any:
    """Convert a pyarrow scalar to a Python value, with nested times by `_convert_time`."""
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
        candidate_types.append(pyarrow.timestamp(unit, kind.tz))
        candidate_types.append(pyarrow.timestamp(unit, kind.tz and "UTC"))
    elif is_fine:
        if pyarrow.types.is_duration(kind):
            candidate_types.append(pyarrow.duration("us"))
        else:
            candidate_types.append(pyarrow.time64("us"))
    for other in candidate_types:
        try:
            return scalar.cast(other, safe=False).as_py()
        except _UNREPRESENTABLE:
            continue
    return None


IMAGES_COLUMN = "images"

MAX_ROW_GROUP_BYTES = 256 * 2**20
"""Maximum number of bytes of a row group; larger ones are rewritten.

A process loads a full row group to read one row.
"""

TARGET_ROW_GROUP_BYTES = 4 * 2**20
"""Approximate number of bytes per row group of a rewritten file.

Cached indexes refer to these row groups: increase `INDEX_VERSION` when this value changes.
"""

MAX_GROUP_ROWS = 1024


_DAMAGE = (*_UNREPRESENTABLE, NotImplementedError, OSError, TypeError, MemoryError)
"""Exceptions that pyarrow raises for corrupt files."""


def import_extra(name: str, extra: str, path: Path) -> Any:
    """Import the module that reads a file from an optional dependency, on first use."""
    package = name.partition(".")[0]
    try:
        return import_module(package) and import_module(name)
    except ImportError as error:
        raise UserError(
            f"reading {path.name} needs {package}, which cannot be imported ({error})",
            where=str(path),
            expected=f"the package {package}, of the extra {extra}",
            remedy=f"pip install 'finesight[{extra}]'",
        ) from error


def import_parquet(path: Path) -> Any:
    """Import `pyarrow.parquet` on first use."""
    return import_extra("pyarrow.parquet", "hub", path)


def read_parquet_metadata(path: Path) -> Any:
    """Read the metadata of a Parquet file."""
    reject_special_file(path)
    with translate_parquet_errors(path, with_os_errors=True):
        return import_parquet(path).read_metadata(_open_non_utf8(path))


def open_parquet(path: Path, metadata: Any = None) -> Any:
    """Open a Parquet file and return its reader, which the caller must close.

    Raises:
        ValueError: The file is corrupt.
        OSError: The file is corrupt or unreadable.
    """
    return import_parquet(path).ParquetFile(_open_non_utf8(path), metadata=metadata)


def _open_non_utf8(path: Path) -> Any:
    """Return a path as text, or an open pyarrow file for a non-UTF-8 path."""
    if is_utf8(str(path)):
        return str(path)
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))


@contextmanager
def translate_parquet_errors(path: Path, *, with_os_errors: bool = False) -> Iterator[None]:
    """Convert pyarrow errors about a corrupt Parquet file to a UserError within the context."""
    try:
        yield
    except _DAMAGE as error:
        # pyarrow raises OSError without errno for corrupt files.
        if isinstance(error, OSError) and error.errno is not None and not with_os_errors:
            raise
        raise UserError(
            f"cannot be read as Parquet: {error}",
            where=str(path),
            expected="a complete Parquet file",
            remedy="download or export the file again",
        ) from error


def list_row_group_sizes(path: Path) -> tuple[int, ...]:
    """Return the number of rows of each row group, after large groups are split."""
    small_file = ensure_small_groups(path, _file_version(path))
    return _list_group_sizes(small_file, _file_version(small_file))


def read_text_columns(path: Path, group: int) -> Any:
    """Read all columns of a row group except the images, as a pyarrow table."""
    small_file = ensure_small_groups(path, _file_version(path))
    return _read_columns(small_file, _file_version(small_file), group, with_images=False)


def read_first_row(path: Path) -> dict[str, Any]:
    """Read the first row of a Parquet file without its images."""
    with open_parquet(path) as file:
        columns = _non_image_columns(file)
        return next(iter_records(next(file.iter_batches(1, columns=columns)), str(path)))


def has_images(path: Path) -> bool:
    """Return whether a Parquet file contains a column of images."""
    with translate_parquet_errors(path), open_parquet(path) as file:
        return IMAGES_COLUMN in file.schema_arrow.names


def read_parquet_image(path: Path, row: int, name: str) -> bytes:
    """Read the bytes of an image stored in a Parquet row.

    Args:
        row: Row number, 1-based.
        name: Name of the image or, for an image without a name, its 0-based index in the row.

    Raises:
        OSError: The image is missing or unreadable.
    """
    try:
        return _find_image(ensure_small_groups(path, _file_version(path)), row, name)
    except (ValueError, NotImplementedError, LookupError, OverflowError, MemoryError) as error:
        raise OSError(f"cannot be read as Parquet: {error}") from error


def _find_image(small_file: Path, row: int, name: str) -> bytes:
    version = _file_version(small_file)
    row_offset = 0
    for group, size in enumerate(_list_group_sizes(small_file, version)):
        if row_offset < row <= row_offset + size:
            table = _read_columns(small_file, version, group, with_images=True)
            images = table.column(IMAGES_COLUMN)[row - row_offset - 1].as_py() or ()
            for index, image in enumerate(images):
                if name == (image.get("path") or str(index)) and image.get("bytes") is not None:
                    return bytes(image["bytes"])
            raise FileNotFoundError(f"no image {name} in the row")
        row_offset += size
    raise FileNotFoundError(f"no row {row} among {row_offset}")


def _file_version(path: Path) -> int:
    """Return the modification time of a file as a cache key."""
    return path.stat().st_mtime_ns


@lru_cache(4)
def _read_columns(path: Path, version: int, group: int, *, with_images: bool) -> Any:
    with open_parquet(path, _read_metadata(path, version)) as file:
        columns = [IMAGES_COLUMN] if with_images else _non_image_columns(file)
        return file.read_row_group(group, columns=columns)


def _non_image_columns(file: Any) -> list[str]:
    return [name for name in file.schema_arrow.names if name != IMAGES_COLUMN]


@lru_cache(64)
def _read_metadata(path: Path, version: int) -> Any:
    """Read and cache Parquet metadata, which can be larger than a row group.

    A modified file has another `version`.
    """
    return import_parquet(path).read_metadata(_open_non_utf8(path))


@lru_cache(1024)
def _list_group_sizes(path: Path, version: int) -> tuple[int, ...]:
    return tuple(group.num_rows for group in _list_row_groups(path))


def _list_row_groups(path: Path) -> list[Any]:
    found = read_parquet_metadata(path)
    return [found.row_group(index) for index in range(found.num_row_groups)]


@lru_cache(1024)
def ensure_small_groups(path: Path, version: int) -> Path:
    """Return a Parquet file whose row groups are at most `MAX_ROW_GROUP_BYTES`.

    This is the file itself, or a copy with smaller row groups that is written to the cache once.
    """
    largest = max((group.total_byte_size for group in _list_row_groups(path)), default=0)
    if largest <= MAX_ROW_GROUP_BYTES:
        return path
    with path.open("rb") as file:
        folder = cache_folder("parquet") / hash_file_identity(file).hex()[:32]

    def write(staging: Path) -> None:
        num_bytes = sum(group.total_byte_size for group in _list_row_groups(path))
        purpose = f"{path} in small row groups, because one has {largest:,} bytes"
        require_free_space(
            folder, num_bytes, purpose, "free some space, or write the file with row_group_size=100"
        )
        print(f"{purpose} (written once)", file=sys.stderr)
        rewrite_row_groups(path, staging / path.name)

    write_folder_once(folder, write)
    return folder / path.name


def rewrite_row_groups(path: Path, target: Path) -> None:
    parquet = import_parquet(path)
    # Read page by page, so that no complete column of a large row group is in memory.
    with (
        translate_parquet_errors(path),
        parquet.ParquetFile(_open_non_utf8(path), pre_buffer=False, buffer_size=2**20) as file,
        parquet.ParquetWriter(target, file.schema_arrow) as writer,
    ):
        for group_index, group in enumerate(_list_row_groups(path)):
            rows = TARGET_ROW_GROUP_BYTES * group.num_rows // group.total_byte_size
            batch_size = max(1, min(MAX_GROUP_ROWS, rows))
            for batch in file.iter_batches(batch_size, row_groups=[group_index]):
                writer.write_batch(batch)
