"""Read untrusted files with limits on type, size and depth, and decode file names.

Only regular files are read, since named pipes block and devices can be infinite.

Python represents a file name that is not UTF-8 as text with a lone surrogate per invalid byte (PEP
383). This text opens the file, but cannot be encoded as UTF-8. Archives from Chinese Windows have
names in GBK; unzip keeps these bytes or decodes them as code page 437.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from pydantic_core import from_json

from finesight.errors import Remedy, UserError, shorten, suggest_similar_path

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class SpecialFileError(UserError):
    """Raised for a path that is a named pipe, a socket or a device."""


def _reject_special_mode(path: Path, mode: int) -> None:
    """Raise SpecialFileError unless an `st_mode` is that of a regular file or a folder."""
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SpecialFileError(
            f"{_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file",
            where=str(path),
            expected="a regular file, or a link to one",
            remedy="copy its content to a file, or remove it from the folder",
        )


def reject_special_file(path: Path) -> None:
    """Raise SpecialFileError for an existing path that is neither a regular file nor a folder.

    Called before a library opens a file by its path. Missing and inaccessible paths are accepted,
    since opening them raises an error.
    """
    with suppress(OSError, ValueError):
        _reject_special_mode(path, os.stat(path).st_mode)


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file for reading; never block on a named pipe.

    Raises:
        SpecialFileError: The path is a named pipe, a socket or a device.
        OSError: The file cannot be opened.
    """
    reject_special_file(path)  # some devices act when they are opened
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null character in the name
        raise OSError(errno.EINVAL, str(error)) from error
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    _reject_special_mode(path, mode)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


MAX_FILE_BYTES = 40 * 2**20
"""Maximum size in bytes of a file that is read at once.

Tokenizer files have up to 35 MB. Parsed JSON takes up to 30 times its size in memory.
"""

MAX_LINE_BYTES = 8 * 2**20


def read_bytes(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_FILE_BYTES
) -> bytes:
    """Read a regular file of at most `max_bytes` bytes.

    Folders, named pipes, devices and larger files are rejected before they are read.
    """
    with translate_os_errors(path, expected, remedy), open_regular_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        what = f"has more than {max_bytes:,} bytes"
        raise UserError(what, where=str(path), expected=expected, remedy=remedy)
    return content


def read_text(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_FILE_BYTES
) -> str:
    """Read a regular UTF-8 file of at most `max_bytes` bytes.

    Raises UserError like `read_bytes`.
    """
    with translate_os_errors(path, expected=expected, remedy=remedy):
        return read_bytes(path, expected=expected, remedy=remedy, max_bytes=max_bytes).decode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of at most 200 nested levels.

    NaN and infinity are valid, as in `json.loads`. Deeper nesting and lone surrogates raise
    ValueError; RecursionError is never raised.
    """
    try:
        return from_json(text)
    except TypeError as error:  # text with a lone surrogate is no text to the parser
        raise ValueError("a character that UTF-8 cannot encode") from error


class DuplicateKeyError(ValueError):
    """Raised for a JSON object with two values under one key."""


def reject_duplicates(pairs: list[tuple[str, Any]]) -> None:
    """Raise DuplicateKeyError for an object in which a key occurs twice, as a hook of a decoder."""
    if len(dict(pairs)) == len(pairs):
        return
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise DuplicateKeyError(f"the key {key[:60]!r} occurs twice in one object")
        seen.add(key)


_DUPLICATE_KEY_DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicates)


def parse_unique_json(text: str | bytes) -> Any:
    """Parse JSON like `parse_json`, and reject objects in which a key occurs twice.

    A parser would silently drop the first of the two values.

    Raises:
        DuplicateKeyError: A key occurs twice.
    """
    value = parse_json(text)
    try:
        _DUPLICATE_KEY_DECODER.decode(text if isinstance(text, str) else text.decode())
    except DuplicateKeyError:
        raise
    except ValueError:  # an integer too long for this parser
        pass
    return value


def is_object_text(content: bytes | str) -> bool:
    """Return whether a text is a JSON object without duplicate keys."""
    try:
        return isinstance(parse_unique_json(content), dict)
    except ValueError:
        return False


def read_json(
    path: Path,
    *,
    expected: str = "JSON",
    remedy: str = "restore the file",
    max_bytes: int = MAX_FILE_BYTES,
) -> Any:
    """Read a JSON file with limits on size and depth.

    Raises UserError like `read_bytes`, and for invalid JSON.
    """
    content = read_bytes(path, expected=expected, remedy=remedy, max_bytes=max_bytes)
    try:
        return parse_json(content)
    except ValueError as error:
        what = f"not readable as JSON: {error}"
        raise UserError(what, where=str(path), expected=expected, remedy=remedy) from error


def read_json_object(
    path: Path,
    *,
    expected: str = "a JSON object",
    remedy: str = "restore the file",
    max_bytes: int = MAX_FILE_BYTES,
) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises UserError like `read_json`, and for other JSON values.
    """
    content = read_json(path, expected=expected, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(content, dict):
        what = f"contains a {type(content).__name__}, not an object"
        raise UserError(what, where=str(path), expected=expected, remedy=remedy)
    return content


def read_lines(
    path: Path, *, expected: str, remedy: str = "restore the file", max_bytes: int = MAX_LINE_BYTES
) -> Iterator[bytes]:
    """Yield the lines of a regular file of any size, with their line ends.

    A line of more than `max_bytes` bytes is truncated and has no line end.
    """
    with translate_os_errors(path, expected, remedy), open_regular_file(path) as file:
        while line := file.readline(max_bytes):
            yield line
            while len(line) == max_bytes and not line.endswith(b"\n"):
                line = file.readline(max_bytes)


def read_edge_lines(
    path: Path, max_bytes: int, *, expected: str, remedy: str = "restore the file"
) -> Iterator[bytes]:
    """Yield the first and the last lines of a regular file, of `max_bytes` bytes together.

    Lines have their ends. The lines in the middle of a larger file are left out.
    """
    with translate_os_errors(path, expected, remedy), open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= max_bytes:
            content = file.read(max_bytes)
        else:
            num_edge_bytes = max_bytes // 2
            start = file.read(num_edge_bytes)
            # With the byte before, which may end a line.
            file.seek(size - num_edge_bytes - 1)
            end = file.read(num_edge_bytes + 1)
            # The line at each edge of the gap may be incomplete.
            content = start[: start.rfind(b"\n") + 1] + end.partition(b"\n")[2]
    # Like `read_lines`, without lines that end with a carriage return alone.
    yield from BytesIO(content)


@contextmanager
def translate_os_errors(
    path: Path, expected: str, remedy: Remedy, error_class: type[UserError] = UserError
) -> Iterator[None]:
    """Convert an error of reading or decoding a file to an `error_class` about `path`."""
    try:
        yield
    except (SpecialFileError, UnicodeDecodeError, OSError) as error:
        if isinstance(error, SpecialFileError):
            what = error.what
        elif isinstance(error, UnicodeDecodeError):
            what = f"byte {error.start} is not UTF-8 text"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            what = "no such file"
            remedy = suggest_similar_path(path)
        else:
            what = f"cannot be read: {error.strerror or error}"
        raise error_class(what, where=str(path), expected=expected, remedy=remedy) from error


CHINESE_ENCODING = "gb18030"
"""Encoding of Chinese file names; a superset of GBK and GB 2312."""

ZIP_ENCODING = "cp437"
"""Encoding of file names in a zip archive without the UTF-8 flag."""


_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_SPELLINGS = 64
"""Maximum number of tried combinations of composed and decomposed names in a path."""


def is_utf8(name: str) -> bool:
    """Return whether a file name or path can be encoded as UTF-8."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def to_readable_name(name: str) -> str:
    """Return a file name or path as text that can be encoded as UTF-8.

    Bytes in GBK are decoded, others are escaped as %XX. Two names may have the same result.
    """
    return "/".join(map(_readable, name.split("/")))


def _readable(name: str) -> str:
    if is_utf8(name):
        return name
    with suppress(UnicodeError):
        return decode_name(name.encode("utf-8", "surrogateescape"))
    return _SURROGATE.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", name)


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

    The path itself is first. Backslashes of Windows paths become slashes, and percent signs are
    decoded. Accented characters are tried composed (NFC) and decomposed (NFD, macOS) in each folder
    name, Chinese characters as GBK bytes and as decoded by unzip.
    """
    names = [*dict.fromkeys((name, name.replace("\\", "/"), unquote(name)))]
    yield from names
    for path in names:
        if path.isascii() or not is_utf8(path):
            continue
        forms = [_list_normal_forms(part) for part in path.split("/")]
        for parts in itertools.islice(itertools.product(*forms), 1, MAX_SPELLINGS):
            yield "/".join(parts)
        content = path.encode(CHINESE_ENCODING)
        yield os.fsdecode(content)
        yield content.decode(ZIP_ENCODING)


def _list_normal_forms(name: str) -> list[str]:
    """List a name and its different forms with composed and decomposed characters."""
    composed = unicodedata.normalize("NFC", name)
    decomposed = unicodedata.normalize("NFD", name)
    return list(dict.fromkeys((name, composed, decomposed)))


def find_existing(folder: Path, name: str) -> Path | None:
    """Return the first spelling of a path that exists below `folder`, or None."""
    for spelling in iter_spellings(name):
        path = os.path.join(folder, spelling)
        if os.path.exists(path):
            return Path(path)
    return None


MAX_DEPTH = 64

MAX_ALIASED_VALUES = 100_000
"""Maximum number of values that aliases expand to.

Without a limit, nine lines of aliases can expand to a billion values.
"""

MAX_VALUES = 100_000
"""Maximum number of values, including keys; parsing takes up to 15 microseconds per value."""

MAX_INT_BITS = 1024
"""Maximum size of an integer in bits; Python may refuse to print larger ones."""

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def load_yaml(text: str | bytes) -> Any:
    """Load YAML text as Python data of the standard types.

    Raises YAMLError for any error, including malformed values (0x_, month 13) and exceeded limits.
    """
    return ComposedYaml(text).data()


class TooManyValuesError(yaml.MarkedYAMLError):
    """Raised when a YAML text has more values than the limit."""


class RecursiveAliasError(yaml.MarkedYAMLError):
    """Raised for an alias of a group in which it is."""


class ComposedYaml:
    """A parsed YAML text: its syntax tree with line numbers, and its data.

    Attributes:
        root: Root node of the syntax tree; None for an empty text.
        num_values: Number of parsed values, including keys.

    Raises:
        yaml.YAMLError: See `load_yaml`.
    """

    def __init__(self, text: str | bytes, values: int = MAX_VALUES) -> None:
        self._loader = _BoundedLoader(text, values)
        self.root: yaml.Node | None = self._loader.get_single_node()
        self.num_values = self._loader.num_nodes

    def data(self) -> Any:
        """Convert the syntax tree to Python data. Raises YAMLError for a malformed value."""
        return None if self.root is None else self._loader.construct_document(self.root)


class _BoundedLoader(yaml.composer.Composer, yaml.CSafeLoader):
    """A YAML loader for the standard data tags, like CSafeLoader, with limits."""

    def __init__(self, stream: str | bytes, values: int) -> None:
        super().__init__()
        text = stream.encode("utf-8", "surrogatepass") if isinstance(stream, str) else stream
        yaml.CSafeLoader.__init__(self, text)
        self._depth = self._num_values = self._num_aliased = self.num_nodes = 0
        self._most = values
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Parse the next node. Raises YAMLError above the limits on depth, values and aliases."""
        event: Any = self.peek_event()
        num_before = self._num_values
        is_alias = isinstance(event, yaml.AliasEvent)
        if self._depth >= MAX_DEPTH:
            raise _build_error(f"more than {MAX_DEPTH} nested groups or lists", event)
        self.num_nodes += 1
        if self.num_nodes > self._most:
            raise _build_error(f"more than {self._most:,} values", event, TooManyValuesError)
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        if node is None:
            return None
        if is_alias:
            if node not in self._sizes:
                # Readers of the data would never end.
                raise _build_error("a group contains itself", event, RecursiveAliasError)
            self._num_values += self._sizes[node]
            self._num_aliased += self._sizes[node]
        else:
            self._num_values += 1
            self._sizes[node] = self._num_values - num_before
        if self._num_aliased > MAX_ALIASED_VALUES:
            problem = f"aliases that expand to more than {MAX_ALIASED_VALUES} values"
            raise _build_error(problem, event)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Convert a node to a Python value, and any exception to a YAMLError."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            shown = shorten(repr(node.value), 60)
            _, _, kind = node.tag.rpartition(":")
            raise _build_error(f"{shown} cannot be read as {kind}", node) from error
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise _build_error(f"a number of {value.bit_length()} bits", node)
        if isinstance(value, str) and _UNWRITABLE.search(value):
            shown = shorten(repr(value), 60)
            raise _build_error(f"{shown} has a character that is invalid in file names", node)
        return value


def _build_error(
    problem: str, location: Any, kind: type[yaml.MarkedYAMLError] = yaml.MarkedYAMLError
) -> yaml.MarkedYAMLError:
    return kind(problem=problem, problem_mark=location.start_mark)
