"""Read files that others wrote: regular files of bounded size, JSON of bounded depth."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from finesight.errors import UserError, look_beside

LARGEST = 40 * 2**20
"""Bytes of a file that is read whole: tokenizers have up to 13 MB, those of families with large
vocabularies up to 35 MB. Parsed, JSON takes up to 30 times its size in memory."""

LARGEST_LINE = 8 * 2**20
"""Bytes of one line of a JSON Lines file."""


def read_bytes(
    path: Path, *, expected: str, remedy: str = "restore the file", most: int = LARGEST
) -> bytes:
    """Read a regular file of at most `most` bytes.

    Folders, named pipes, devices and larger files are refused before they are read.

    Raises:
        UserError: The file cannot be read, and `expected` and `remedy` say what to do.
    """
    with _explained(path, expected, remedy), _opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(
            f"has more than {most:,} bytes", where=str(path), expected=expected, remedy=remedy
        )
    return content


def read_text(
    path: Path, *, expected: str, remedy: str = "restore the file", most: int = LARGEST
) -> str:
    """Read a regular UTF-8 file of at most `most` bytes. Raises UserError as `read_bytes` does."""
    content = read_bytes(path, expected=expected, remedy=remedy, most=most)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected=expected,
            remedy=remedy,
        ) from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of at most 200 nested levels; NaN and infinity are numbers.

    Unlike `json.loads`, text that nests deeper is refused by a ValueError, never a RecursionError,
    and so are lone surrogates, which no file can hold.
    """
    try:
        return from_json(text)
    except TypeError as error:  # text with a lone surrogate is no text to the parser
        raise ValueError("a character that UTF-8 cannot hold") from error


def read_json(path: Path, *, expected: str = "JSON", remedy: str = "restore the file") -> Any:
    """Read a JSON file of bounded size and depth. Raises UserError as `read_bytes` does."""
    content = read_bytes(path, expected=expected, remedy=remedy)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(
            f"not readable as JSON: {error}", where=str(path), expected=expected, remedy=remedy
        ) from error


def read_json_object(
    path: Path, *, expected: str = "a JSON object", remedy: str = "restore the file"
) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises UserError as `read_json` does."""
    content = read_json(path, expected=expected, remedy=remedy)
    if not isinstance(content, dict):
        raise UserError(
            f"holds a {type(content).__name__}, not an object",
            where=str(path),
            expected=expected,
            remedy=remedy,
        )
    return content


def read_lines(
    path: Path, *, expected: str, remedy: str = "restore the file", most: int = LARGEST_LINE
) -> Iterator[bytes]:
    """Yield the lines of a regular file of any size, one at a time, with their line ends.

    Of a line of more than `most` bytes only the first `most` are given, without a line end.

    Raises:
        UserError: The file cannot be read, and `expected` and `remedy` say what to do.
    """
    with _explained(path, expected, remedy), _opened(path) as file:
        while line := file.readline(most):
            yield line
            while len(line) == most and not line.endswith(b"\n"):
                line = file.readline(most)


@contextmanager
def _explained(path: Path, expected: str, remedy: str) -> Iterator[None]:
    """Turn an OSError into a UserError about `path`."""
    try:
        yield
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise UserError(
            "no such file" if missing else f"cannot be read: {error.strerror or error}",
            where=str(path),
            expected=expected,
            remedy=look_beside(path) if missing else remedy,
        ) from error


def _opened(path: Path) -> BinaryIO:
    """Open a regular file. Raises OSError for other kinds; a named pipe does not block."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(number, "rb")
    os.close(number)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder")
    raise OSError(errno.EINVAL, "it is not a regular file")
