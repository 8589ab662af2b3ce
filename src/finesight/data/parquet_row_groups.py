"""Row groups of Parquet files, the smallest unit that can be read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from finesight.data.index_cache import hash_file_identity
from finesight.data.parquet_values import iter_records
from finesight.errors import UserError
from finesight.file_name_encoding import is_utf8
from finesight.regular_file import reject_special_file
from finesight.storage import require_free_space, write_folder_once

IMAGES_COLUMN = "images"
"""Column with the images of a row: a list of structs of `path` and `bytes`."""

MAX_ROW_GROUP_BYTES = 256 * 2**20
"""Maximum number of bytes of a row group: each reading process loads the full group to
read a row."""

TARGET_ROW_GROUP_BYTES = 4 * 2**20
"""Approximate number of bytes of a group after large groups are divided. Indexes refer to these
groups: change the index version with this value."""

MAX_GROUP_ROWS = 1024
"""Maximum number of rows of a group."""


_DAMAGE = (
    *(ValueError, NotImplementedError, OSError, LookupError, OverflowError, TypeError),
    MemoryError,
)
"""Exceptions of pyarrow for invalid files."""


def import_parquet(path: Path) -> Any:
    """Import pyarrow.parquet. Raises UserError if it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"reading {path.name} needs pyarrow, which is not installed",
            where=str(path),
            remedy="pip install 'finesight[hub]'",
        ) from error
    return parquet


def read_parquet_metadata(path: Path) -> Any:
    """Read the file metadata. Raises UserError for a file of another format."""
    reject_special_file(path)
    try:
        return import_parquet(path).read_metadata(_open_non_utf8(path))
    except _DAMAGE as error:
        raise _build_parquet_error(path, error) from error


def open_parquet(path: Path, metadata: Any = None) -> Any:
    """Open a reader, to be closed by the caller. Raises ValueError or OSError for
    a corrupt file."""
    return import_parquet(path).ParquetFile(_open_non_utf8(path), metadata=metadata)


def _open_non_utf8(path: Path) -> Any:
    """Return the path for pyarrow, or an open file if the name is not UTF-8."""
    if is_utf8(str(path)):
        return str(path)
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))


@contextmanager
def translate_parquet_errors(path: Path) -> Iterator[None]:
    """Convert errors of a corrupt file in the block to a UserError."""
    try:
        yield
    except _DAMAGE as error:
        # pyarrow raises OSError without a number for what it cannot read.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _build_parquet_error(path, error) from error


def _build_parquet_error(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot be read as Parquet: {error}",
        where=str(path),
        expected="a complete Parquet file",
        remedy="download or export the file again",
    )


def list_row_group_sizes(path: Path) -> tuple[int, ...]:
    """Return the number of rows of each group. Raises UserError for a file of another format."""
    small_file = _ensure_small_groups(path, _file_version(path))
    return _list_group_sizes(small_file, _file_version(small_file))


def read_text_columns(path: Path, group: int) -> Any:
    """Read all columns of a group except the images as a pyarrow table."""
    small_file = _ensure_small_groups(path, _file_version(path))
    return _read_text_columns(small_file, _file_version(small_file), group)


def read_first_row(path: Path) -> dict[str, Any]:
    """Read all columns of the first row except the images."""
    with open_parquet(path) as file:
        columns = _non_image_columns(file)
        return next(iter_records(next(file.iter_batches(1, columns=columns)), str(path)))


def has_images(path: Path) -> bool:
    """Return whether the rows contain images."""
    with translate_parquet_errors(path), open_parquet(path) as file:
        return IMAGES_COLUMN in file.schema_arrow.names


def read_parquet_image(path: Path, row: int, name: str) -> bytes:
    """Read an image of a row by name, or by index among unnamed images. The row is 1-based.

    Raises:
        OSError: The image is missing or unreadable.
    """
    try:
        return _find_image(_ensure_small_groups(path, _file_version(path)), row, name)
    except (ValueError, NotImplementedError, LookupError, OverflowError, MemoryError) as error:
        raise OSError(f"cannot be read as Parquet: {error}") from error


def _find_image(small_file: Path, row: int, name: str) -> bytes:
    version, row_offset = _file_version(small_file), 0
    for group, size in enumerate(_list_group_sizes(small_file, version)):
        if row_offset < row <= row_offset + size:
            return _get_image_bytes(
                _read_images(small_file, version, group)[row - row_offset - 1].as_py() or (), name
            )
        row_offset += size
    raise FileNotFoundError(f"no row {row} among {row_offset}")


def _get_image_bytes(images: Sequence[dict[str, Any]], name: str) -> bytes:
    for image_index, image in enumerate(images):
        if name == (image.get("path") or str(image_index)) and image.get("bytes") is not None:
            content: bytes = image["bytes"]
            return content
    raise FileNotFoundError(f"no image {name} in the row")


def _file_version(path: Path) -> int:
    """Return a cache key that changes when the file is modified."""
    return path.stat().st_mtime_ns


@lru_cache(2)
def _read_text_columns(path: Path, version: int, group: int) -> Any:
    with _open_parquet(path, version) as file:
        return file.read_row_group(group, columns=_non_image_columns(file))


def _non_image_columns(file: Any) -> list[str]:
    return [name for name in file.schema_arrow.names if name != IMAGES_COLUMN]


@lru_cache(2)
def _read_images(path: Path, version: int, group: int) -> Any:
    with _open_parquet(path, version) as file:
        return file.read_row_group(group, columns=[IMAGES_COLUMN]).column(IMAGES_COLUMN)


def _open_parquet(path: Path, version: int) -> Any:
    return open_parquet(path, _read_metadata(path, version))


@lru_cache(64)
def _read_metadata(path: Path, version: int) -> Any:
    """Read and cache the metadata, which can be larger than a group."""
    return import_parquet(path).read_metadata(_open_non_utf8(path))


@lru_cache(1024)
def _list_group_sizes(path: Path, version: int) -> tuple[int, ...]:
    return tuple(group.num_rows for group in _list_row_groups(path))


def _list_row_groups(path: Path) -> list[Any]:
    file_metadata = read_parquet_metadata(path)
    return [
        file_metadata.row_group(group_index) for group_index in range(file_metadata.num_row_groups)
    ]


@lru_cache(1024)
def _ensure_small_groups(path: Path, version: int) -> Path:
    """Return the file, or a cached copy if a row group is too large.

    Raises:
        UserError: The disk has not enough free space.
    """
    largest = max((group.total_byte_size for group in _list_row_groups(path)), default=0)
    if largest <= MAX_ROW_GROUP_BYTES:
        return path
    with path.open("rb") as file:
        folder = regrouped_folder() / hash_file_identity(file).hex()[:32]

    def write(staging: Path) -> None:
        num_bytes = sum(group.total_byte_size for group in _list_row_groups(path))
        purpose = f"{path} in small row groups, because one has {largest:,} bytes"
        require_free_space(
            folder, num_bytes, purpose, "free some space, or write the file with row_group_size=100"
        )
        print(f"{purpose} (written once)", file=sys.stderr)
        _rewrite_row_groups(path, staging / path.name)

    write_folder_once(folder, write)
    return folder / path.name


def regrouped_folder() -> Path:
    """Return the cache folder of files with smaller row groups."""
    # Imported here: it is slow to import.
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "finesight" / "parquet"


def _rewrite_row_groups(path: Path, target: Path) -> None:
    parquet = import_parquet(path)
    # Page by page: no complete column of a large group is in memory.
    with (
        translate_parquet_errors(path),
        parquet.ParquetFile(_open_non_utf8(path), pre_buffer=False, buffer_size=2**20) as file,
        parquet.ParquetWriter(target, file.schema_arrow) as writer,
    ):
        for group_index, group in enumerate(_list_row_groups(path)):
            rows = max(
                1,
                min(
                    MAX_GROUP_ROWS, TARGET_ROW_GROUP_BYTES * group.num_rows // group.total_byte_size
                ),
            )
            for batch in file.iter_batches(rows, row_groups=[group_index]):
                writer.write_batch(batch)
