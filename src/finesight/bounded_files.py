"""Read untrusted files with limits on their type, size and JSON depth.

Only regular files are read, since named pipes block and devices can be infinite.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from finesight.errors import UserError, suggest_similar_path
from finesight.regular_file import SpecialFileError, open_regular_file

MAX_FILE_BYTES = 40 * 2**20
"""Maximum size in bytes of a file that is read at once.

Tokenizer files have up to 35 MB. Parsed JSON takes up to 30 times its size in memory.
"""

MAX_LINE_BYTES = 8 * 2**20
"""Maximum size of a line in a JSON Lines file, in bytes."""


def read_bytes(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_FILE_BYTES
) -> bytes:
    """Read a regular file of at most `max_bytes` bytes.

    Folders, named pipes, devices and larger files are rejected before they are read.

    Raises:
        UserError: The file is unreadable; the error contains `expected` and `remedy`.
    """
    with (
        translate_os_errors(path, expected=expected, remedy=remedy),
        open_regular_file(path) as file,
    ):
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(
            f"has more than {max_bytes:,} bytes", where=str(path), expected=expected, remedy=remedy
        )
    return content


def read_text(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_FILE_BYTES
) -> str:
    """Read a regular UTF-8 file of at most `max_bytes` bytes.

    Raises UserError like `read_bytes`.
    """
    content = read_bytes(path, expected=expected, remedy=remedy, max_bytes=max_bytes)
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
    """Parse JSON of at most 200 nested levels.

    NaN and infinity are valid, as in `json.loads`. Deeper nesting and lone surrogates raise
    ValueError; RecursionError is never raised.
    """
    try:
        return from_json(text)
    except TypeError as error:  # text with a lone surrogate is no text to the parser
        raise ValueError("a character that UTF-8 cannot encode") from error


def read_json(path: Path, *, expected: str = "JSON", remedy: str = "restore the file") -> Any:
    """Read a JSON file with limits on size and depth.

    Raises UserError like `read_bytes`, and for invalid JSON.
    """
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
    """Read a JSON file that contains an object.

    Raises UserError like `read_json`, and for other JSON values.
    """
    content = read_json(path, expected=expected, remedy=remedy)
    if not isinstance(content, dict):
        raise UserError(
            f"contains a {type(content).__name__}, not an object",
            where=str(path),
            expected=expected,
            remedy=remedy,
        )
    return content


def read_lines(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """Yield the lines of a regular file of any size, with their line ends.

    A line of more than `max_bytes` bytes is truncated and has no line end.

    Raises:
        UserError: The file is unreadable; the error contains `expected` and `remedy`.
    """
    with (
        translate_os_errors(path, expected=expected, remedy=remedy),
        open_regular_file(path) as file,
    ):
        while line := file.readline(max_bytes):
            yield line
            while len(line) == max_bytes and not line.endswith(b"\n"):
                line = file.readline(max_bytes)


@contextmanager
def translate_os_errors(
    path: Path, *, expected: str, remedy: str, error_class: type[UserError] = UserError
) -> Iterator[None]:
    """Convert an OSError or a SpecialFileError to an `error_class` about `path`."""
    try:
        yield
    except SpecialFileError as error:
        raise error_class(error.what, where=str(path), expected=expected, remedy=remedy) from error
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise error_class(
            "no such file" if missing else f"cannot be read: {error.strerror or error}",
            where=str(path),
            expected=expected,
            remedy=suggest_similar_path(path) if missing else remedy,
        ) from error
