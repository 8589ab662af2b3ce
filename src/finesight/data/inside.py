"""Files inside of files: what lies in a tar or in a row of a Parquet file has a path, too.

`shard.tar/@1536+20480/0001.jpg` is 20,480 bytes of the tar, from byte 1,536 on, and
`part.parquet/@12/0001.jpg` the picture with this name in row 12, counted from 1. Such a path says
all that reading takes: nothing is unpacked, and no process has to know an index.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from finesight.data.parquet_groups import picture
from finesight.digests import digest

LARGEST = 256 * 2**20
"""Bytes of a picture: it is read at once."""

_IN_TAR = re.compile(
    r"(?P<container>.+?)/@(?P<start>[0-9]{1,18})\+(?P<size>[0-9]{1,18})/.+", re.DOTALL
)
_IN_ROW = re.compile(r"(?P<container>.+?)/@(?P<row>[0-9]{1,18})/(?P<name>.+)", re.DOTALL)


def in_tar(start: int, size: int, name: str) -> str:
    """The path below a tar of so many bytes of it."""
    return f"@{start}+{size}/{name}"


def in_row(row: int, name: str) -> str:
    """The path below a Parquet file of a picture in this row."""
    return f"@{row}/{name}"


def container(path: str) -> tuple[str, str]:
    """The file that a path leads into, and what it names in there; the path itself and nothing, if
    it does not look like one."""
    found = _IN_TAR.fullmatch(path) or _IN_ROW.fullmatch(path)
    return (path, "") if found is None else (found["container"], path[found.end("container") :])


def is_inside(path: Path) -> bool:
    """Whether a path leads into a file."""
    return container(str(path))[1] != "" and not path.exists()


def content(path: Path) -> Path | io.BytesIO:
    """The path itself, or the bytes of what lies inside of a file. Raises OSError as opening does,
    also where less is there than the path says."""
    text = str(path)
    if "/@" not in text or path.exists():
        return path
    if found := _IN_TAR.fullmatch(text):
        return io.BytesIO(_bytes(Path(found["container"]), int(found["start"]), int(found["size"])))
    if found := _IN_ROW.fullmatch(text):
        return io.BytesIO(picture(Path(found["container"]), int(found["row"]), found["name"]))
    return path


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of what lies inside of one, in hexadecimal."""
    found = content(path)
    if isinstance(found, Path):
        return digest(found)
    return hashlib.sha256(found.getbuffer()).hexdigest()


def _bytes(container: Path, start: int, size: int) -> bytes:
    if size > LARGEST:
        raise OSError(f"{size} bytes, more than {LARGEST}")
    with container.open("rb") as file:
        file.seek(start)
        found = file.read(size)
    if len(found) < size:
        raise OSError(f"{container.name} ends before byte {start + size}")
    return found
