"""File names that are not UTF-8: read for people, and looked for on the disk.

Python holds such a name as text with a lone surrogate for each byte that is not UTF-8 (PEP 383),
which opens the file but cannot be written into a file. Archives made on Chinese Windows have their
names in GBK; unzip leaves these bytes as they are, or reads them as code page 437.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CHINESE = "gb18030"
"""The encoding that holds all of GBK and GB 2312."""

DOS = "cp437"
"""The encoding of names in a zip archive that does not say UTF-8."""


def is_utf8(name: str) -> bool:
    """Return whether a name or path can be written as UTF-8."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def readable_name(name: str) -> str:
    """Return a name or path as text that can be written: GBK as its characters, else escapes.

    Bytes that are neither UTF-8 nor GBK become %XX. Two names may become the same text.
    """
    if is_utf8(name):
        return name
    return "/".join(map(_readable, name.split("/")))


def _readable(name: str) -> str:
    if is_utf8(name):
        return name
    try:
        return decoded_name(name.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return "".join(f"%{ord(c) & 0xFF:02X}" if "\ud800" <= c <= "\udfff" else c for c in name)


def decoded_name(content: bytes) -> str:
    """Return the bytes of a name as text: UTF-8 or GBK. Raises UnicodeDecodeError for others."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        name = content.decode(CHINESE)
        if not name.isprintable():
            raise error from None
        return name


def spellings(name: str) -> Iterator[str]:
    """Yield a path as it stands, then as a disk may spell it.

    A path with backslashes, as Windows writes it, is tried with slashes as well, and one with
    Chinese characters by its bytes in GBK and as unzip misreads these.
    """
    yield name
    names = [name]
    if "\\" in name:
        names.append(name.replace("\\", "/"))
        yield names[-1]
    for path in names:
        if path.isascii() or not is_utf8(path):
            continue
        content = path.encode(CHINESE)
        yield os.fsdecode(content)
        yield content.decode(DOS)


def existing(folder: Path, name: str) -> Path | None:
    """Return the first spelling of a path below `folder` that exists, None without one."""
    places = (os.path.join(folder, spelling) for spelling in spellings(name))
    return next((Path(place) for place in places if os.path.exists(place)), None)
