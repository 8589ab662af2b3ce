"""Decode file names that are not UTF-8, and find such files on disk.

Python represents such a name as text with a lone surrogate per invalid byte (PEP 383). This text
opens the file, but cannot be encoded as UTF-8. Archives from Chinese Windows have names in GBK;
unzip keeps these bytes or decodes them as code page 437.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CHINESE_ENCODING = "gb18030"
"""Encoding of Chinese file names; a superset of GBK and GB 2312."""

ZIP_ENCODING = "cp437"
"""Encoding of file names in a zip archive without the UTF-8 flag."""


def is_utf8(name: str) -> bool:
    """Return whether a file name or path can be encoded as UTF-8."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def to_readable_name(name: str) -> str:
    """Return a file name or path as text that can be encoded as UTF-8.

    Bytes in GBK are decoded, others are escaped as %XX. Two names may have the same result.
    """
    if is_utf8(name):
        return name
    return "/".join(map(_readable, name.split("/")))


def _readable(name: str) -> str:
    if is_utf8(name):
        return name
    try:
        return decode_name(name.encode("utf-8", "surrogateescape"))
    except UnicodeError:
        return "".join(f"%{ord(c) & 0xFF:02X}" if "\ud800" <= c <= "\udfff" else c for c in name)


def decode_name(content: bytes) -> str:
    """Decode the bytes of a file name as UTF-8 or GBK.

    Raises UnicodeDecodeError for other bytes.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        name = content.decode(CHINESE_ENCODING)
        if not name.isprintable():
            raise error from None
        return name


def iter_spellings(name: str) -> Iterator[str]:
    """Yield the spellings that a path may have on disk.

    The path itself is first. Backslashes of Windows paths become slashes. Chinese characters are
    also tried as GBK bytes, and as decoded by unzip.
    """
    yield name
    names = [name]
    if "\\" in name:
        names.append(name.replace("\\", "/"))
        yield names[-1]
    for path in names:
        if path.isascii() or not is_utf8(path):
            continue
        content = path.encode(CHINESE_ENCODING)
        yield os.fsdecode(content)
        yield content.decode(ZIP_ENCODING)


def find_existing(folder: Path, name: str) -> Path | None:
    """Return the first spelling of a path that exists below `folder`, or None."""
    candidates = (os.path.join(folder, spelling) for spelling in iter_spellings(name))
    return next((Path(path) for path in candidates if os.path.exists(path)), None)
