"""Row groups of Parquet files: the least that such a file can be read by."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from finesight.data.index_files import identity
from finesight.data.parquet_values import records
from finesight.errors import UserError
from finesight.file_names import is_utf8
from finesight.regular_file import refuse_special
from finesight.storage import require_room, write_folder_once

PICTURES = "images"
"""The column of a row's pictures: a list of structs of `path` and `bytes`."""

LARGEST = 256 * 2**20
"""Bytes of a row group: all of it is in memory when a row is read, in each process that reads."""

SMALL = 4 * 2**20
"""Bytes of a group, about, where larger ones are divided. An index knows samples by these groups:
with another number it has another FORMAT."""

MOST_ROWS = 1024
"""Of such a group."""


_DAMAGE = (
    *(ValueError, NotImplementedError, OSError, LookupError, OverflowError, TypeError),
    MemoryError,
)
"""What pyarrow raises for files that say what cannot be."""


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
    refuse_special(path)
    try:
        return parquet_module(path).read_metadata(_named(path))
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def open_parquet(path: Path, metadata: Any = None) -> Any:
    """pyarrow's reader of a file, to be closed. Raises ValueError or OSError for a damaged one."""
    return parquet_module(path).ParquetFile(_named(path), metadata=metadata)


def _named(path: Path) -> Any:
    """A path as pyarrow takes it; the file itself, where a name is not UTF-8."""
    if is_utf8(str(path)):
        return str(path)
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn what is raised in the block because of a damaged file into a UserError."""
    try:
        yield
    except _DAMAGE as error:
        # pyarrow raises OSError without a number for what it cannot read.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot be read as Parquet: {error}",
        where=str(path),
        expected="a whole Parquet file",
        remedy="fetch or export the file again",
    )


def group_sizes(path: Path) -> tuple[int, ...]:
    """Rows of each group that is read at once. Raises UserError for a file that is no Parquet."""
    small = _divided(path, _version(path))
    return _sizes(small, _version(small))


def texts(path: Path, group: int) -> Any:
    """All columns of such a group but the pictures, as a table of pyarrow's."""
    small = _divided(path, _version(path))
    return _texts(small, _version(small), group)


def first_text(path: Path) -> dict[str, Any]:
    """All columns of the first row but the pictures, of a file that has rows."""
    with open_parquet(path) as file:
        names = _but_pictures(file)
        return next(records(next(file.iter_batches(1, columns=names)), str(path)))


def has_pictures(path: Path) -> bool:
    """Whether the rows bring their pictures along."""
    with undamaged(path), open_parquet(path) as file:
        return PICTURES in file.schema_arrow.names


def picture(path: Path, row: int, name: str) -> bytes:
    """The picture of this name, or of this number among those without, in a row, counted from 1.
    Raises OSError where there is none, or none that can be read."""
    try:
        return _found(_divided(path, _version(path)), row, name)
    except (ValueError, NotImplementedError, LookupError, OverflowError, MemoryError) as error:
        raise OSError(f"cannot be read as Parquet: {error}") from error


def _found(small: Path, row: int, name: str) -> bytes:
    version, before = _version(small), 0
    for group, size in enumerate(_sizes(small, version)):
        if before < row <= before + size:
            return _picture(_pictures(small, version, group)[row - before - 1].as_py() or (), name)
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
    return open_parquet(path, _metadata(path, version))


@lru_cache(64)
def _metadata(path: Path, version: int) -> Any:
    """Read once: that of many groups takes longer to read than a group."""
    return parquet_module(path).read_metadata(_named(path))


@lru_cache(1024)
def _sizes(path: Path, version: int) -> tuple[int, ...]:
    return tuple(group.num_rows for group in _groups(path))


def _groups(path: Path) -> list[Any]:
    found = metadata(path)
    return [found.row_group(number) for number in range(found.num_row_groups)]


@lru_cache(1024)
def _divided(path: Path, version: int) -> Path:
    """The file itself or, where a group of it is too large to be read again and again, one with the
    same rows in small groups: written once, and kept. Raises UserError where there is no room."""
    largest = max((group.total_byte_size for group in _groups(path)), default=0)
    if largest <= LARGEST:
        return path
    with path.open("rb") as file:
        folder = divided_folder() / identity(file).hex()[:32]

    def write(staging: Path) -> None:
        size = sum(group.total_byte_size for group in _groups(path))
        told = f"{path} in small row groups, as one of it has {largest:,} bytes"
        require_room(folder, size, told, "free some, or write the file with row_group_size=100")
        print(f"{told}: written once", file=sys.stderr)
        _divide(path, staging / path.name)

    write_folder_once(folder, write)
    return folder / path.name


def divided_folder() -> Path:
    """Where files with smaller groups are kept."""
    # Imported here: it is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "parquet"


def _divide(path: Path, target: Path) -> None:
    parquet = parquet_module(path)
    # Page by page: no column of a large group is in memory as a whole.
    with (
        undamaged(path),
        parquet.ParquetFile(_named(path), pre_buffer=False, buffer_size=2**20) as file,
        parquet.ParquetWriter(target, file.schema_arrow) as writer,
    ):
        for number, group in enumerate(_groups(path)):
            rows = max(1, min(MOST_ROWS, SMALL * group.num_rows // group.total_byte_size))
            for batch in file.iter_batches(rows, row_groups=[number]):
                writer.write_batch(batch)
