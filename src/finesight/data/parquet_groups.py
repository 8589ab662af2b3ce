"""Row groups of Parquet files: the least that such a file can be read by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from finesight.errors import UserError

PICTURES = "images"
"""The column of a row's pictures: a list of structs of `path` and `bytes`."""

LARGEST = 256 * 2**20
"""Bytes of a row group: all of it is in memory when a row is read, in each process that reads."""


def parquet_module(path: Path) -> Any:
    """pyarrow's. Raises UserError where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"reading {path.name} needs pyarrow, which is not installed",
            where=str(path),
            remedy="pip install 'finesight[hub]'",
        ) from error
    return parquet


def metadata(path: Path) -> Any:
    """What the file says of itself. Raises UserError for one that is no Parquet."""
    try:
        return parquet_module(path).read_metadata(path)
    except (ValueError, OSError) as error:
        raise UserError(
            f"cannot be read as Parquet: {error}",
            where=str(path),
            expected="a whole Parquet file",
            remedy="fetch or export the file again",
        ) from error


def group_sizes(path: Path) -> tuple[int, ...]:
    """Rows of each group. Raises UserError for a file that is no Parquet, and for groups that are
    too large to be read again and again."""
    found = metadata(path)
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    for number, group in enumerate(groups, start=1):
        if group.total_byte_size > LARGEST:
            raise UserError(
                f"row group {number} has {group.num_rows} rows and {group.total_byte_size} bytes",
                where=str(path),
                expected=f"row groups of at most {LARGEST} bytes: to read a sample is to read one",
                remedy="write it with smaller ones, for example row_group_size=100",
            )
    return tuple(group.num_rows for group in groups)


def texts(path: Path, group: int) -> Any:
    """All columns of a row group but the pictures, as a table of pyarrow's."""
    return _texts(path, _version(path), group)


def first_text(path: Path) -> dict[str, Any]:
    """All columns of the first row but the pictures, of a file that has rows."""
    with parquet_module(path).ParquetFile(path) as file:
        names = _but_pictures(file)
        record: dict[str, Any] = next(file.iter_batches(1, columns=names)).to_pylist()[0]
        return record


def has_pictures(path: Path) -> bool:
    """Whether the rows bring their pictures along."""
    return PICTURES in parquet_module(path).read_schema(path).names


def picture(path: Path, row: int, name: str) -> bytes:
    """The picture of this name, or of this number among those without, in a row, counted from 1.
    Raises OSError where there is none."""
    version, before = _version(path), 0
    for group, size in enumerate(_sizes(path, version)):
        if before < row <= before + size:
            return _picture(_pictures(path, version, group)[row - before - 1].as_py() or (), name)
        before += size
    raise FileNotFoundError(f"no row {row} among {before}")


def _picture(pictures: Sequence[dict[str, Any]], name: str) -> bytes:
    for number, found in enumerate(pictures):
        if name == (found.get("path") or str(number)) and found.get("bytes") is not None:
            content: bytes = found["bytes"]
            return content
    raise FileNotFoundError(f"no picture {name} in the row")


def _version(path: Path) -> int:
    """With it, what is remembered of a file is not that of an older one."""
    return path.stat().st_mtime_ns


@lru_cache(2)
def _texts(path: Path, version: int, group: int) -> Any:
    with _opened(path, version) as file:
        return file.read_row_group(group, columns=_but_pictures(file))


def _but_pictures(file: Any) -> list[str]:
    return [name for name in file.schema_arrow.names if name != PICTURES]


@lru_cache(2)
def _pictures(path: Path, version: int, group: int) -> Any:
    with _opened(path, version) as file:
        return file.read_row_group(group, columns=[PICTURES]).column(PICTURES)


def _opened(path: Path, version: int) -> Any:
    return parquet_module(path).ParquetFile(path, metadata=_metadata(path, version))


@lru_cache(64)
def _metadata(path: Path, version: int) -> Any:
    """Read once: that of many groups takes longer to read than a group."""
    return parquet_module(path).read_metadata(path)


@lru_cache(1024)
def _sizes(path: Path, version: int) -> tuple[int, ...]:
    return group_sizes(path)
