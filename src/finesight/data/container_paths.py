"""Paths of images stored inside tar archives and Parquet files.

`shard.tar/@1536+20480/0001.jpg` refers to 20,480 bytes of `shard.tar` from byte 1,536, and
`part.parquet/@12/0001.jpg` to the image of this name in row 12 (1-based). Such a path is sufficient
to read the image without unpacking the container.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from finesight.data.parquet_row_groups import read_parquet_image
from finesight.digests import sha256_file

MAX_MEMBER_BYTES = 256 * 2**20
"""Maximum number of bytes of an image in a tar, read into memory at once."""

_TAR_MEMBER = re.compile(
    r"(?P<container>.+?)/@(?P<start>[0-9]{1,18})\+(?P<size>[0-9]{1,18})/.+", re.DOTALL
)
_PARQUET_ROW = re.compile(r"(?P<container>.+?)/@(?P<row>[0-9]{1,18})/(?P<name>.+)", re.DOTALL)


def tar_member_path(start: int, size: int, name: str) -> str:
    """Return the path suffix of a tar member at a byte offset.

    It follows the path of the archive; see the module docstring.
    """
    return f"@{start}+{size}/{name}"


def parquet_row_path(row: int, name: str) -> str:
    """Return the path suffix of an image in a Parquet row (1-based)."""
    return f"@{row}/{name}"


def split_container_path(path: str) -> tuple[str, str]:
    """Split a path into its tar or Parquet file and the path inside it.

    The second part is empty for a path that is not inside a container.
    """
    match = _TAR_MEMBER.fullmatch(path) or _PARQUET_ROW.fullmatch(path)
    return (path, "") if match is None else (match["container"], path[match.end("container") :])


def is_container_path(path: Path) -> bool:
    """Return whether a path refers to an image inside a tar or Parquet file."""
    return split_container_path(str(path))[1] != "" and not path.exists()


def resolve_content(path: Path) -> Path | io.BytesIO:
    """Return the path of a regular file, or the bytes of a container member.

    Raises:
        OSError: The container cannot be read, or ends before the end of the member.
    """
    text = str(path)
    if "/@" not in text or path.exists():
        return path
    if match := _TAR_MEMBER.fullmatch(text):
        return io.BytesIO(
            _read_range(Path(match["container"]), int(match["start"]), int(match["size"]))
        )
    if match := _PARQUET_ROW.fullmatch(text):
        return io.BytesIO(
            read_parquet_image(Path(match["container"]), int(match["row"]), match["name"])
        )
    return path


def sha256_content(path: Path) -> str:
    """Compute the SHA-256 of a file or container member in hexadecimal."""
    content = resolve_content(path)
    if isinstance(content, Path):
        return sha256_file(content)
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _read_range(container: Path, start: int, size: int) -> bytes:
    if size > MAX_MEMBER_BYTES:
        raise OSError(f"{size} bytes, more than {MAX_MEMBER_BYTES}")
    with container.open("rb") as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{container.name} ends before byte {start + size}")
    return data
