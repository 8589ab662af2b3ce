"""Read rows of JSON, JSON Lines, CSV, TSV, TXT, XLSX, Parquet and WebDataset files.

JSON, JSON Lines, CSV and TSV files may be compressed by gzip: rows.jsonl.gz.

In a WebDataset, a tar, a sample is several adjacent files with the same stem: 0001.jpg, 0001.txt,
0001.json, 0002.jpg, and so on. A row contains the image as `image`, the content of text files under
their suffixes (`txt`, `cls`, `caption`), and the keys of the JSON object.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from finesight.errors import UserError, format_count
from finesight.files.archive import (
    MAX_COMPRESSION_RATIO,
    MAX_UNPACKED_BYTES,
    UNCHECKED_BYTES,
    TarArchive,
    open_tar,
)
from finesight.files.bounded_files import parse_unique_json, to_readable_name, translate_os_errors
from finesight.samples.image_file import IMAGE_SUFFIXES, MAX_MEMBER_BYTES, is_image_value
from finesight.samples.line_index import (
    MAX_LINE_BYTES,
    UTF8_BOM,
    enumerate_lines,
    open_data_file,
)
from finesight.samples.parquet_reader import (
    check_row_count,
    get_batch_size,
    import_extra,
    import_parquet,
    iter_records,
    open_parquet,
    read_parquet_metadata,
    translate_parquet_errors,
)
from finesight.samples.sample import check_json, is_video_path, read_data_file, translate_errors
from finesight.samples.tar_members import MemberGroup, iter_member_groups, split_member_name

Record = dict[str, Any]
"""A dataset row as JSON-like data; rows from Parquet may contain bytes."""

COMPRESSED_SUFFIXES = (".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
"""Suffixes of compressed row files, in lower case."""

JSON_LINES_SUFFIXES = (".ndjson", ".manifest")
"""Further suffixes of JSON Lines, in lower case."""

TEXT_TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
"""Suffixes of tables as text, in lower case, without that of a compression."""

MAX_LOADED_BYTES = 4 * 10**9
"""Maximum size of a compressed file that is read as a whole."""

MAX_XLSX_BYTES = 2**30
"""Maximum number of bytes of an Excel file after decompression."""

MAX_XLSX_CELLS = 5 * 10**7
"""Maximum number of cells of an Excel sheet, including empty rows and inner empty cells."""

MAX_CSV_CELL_CHARS = 2**26
"""Maximum number of characters in a cell of a CSV file, such as an image in base64."""

SNIFF_BYTES = 4096
"""Number of bytes read from the start of a file to detect its format."""

_BROKEN_AT = re.compile(r"(.*) at line ([0-9]+) column [0-9]+", re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A dataset row and its location in the source.

    Attributes:
        number: 1-based line number in JSON Lines, else 1-based row number.
        location: Location of the row for messages, such as "line 12".
        more_records: Further rows about the same image, each with an object.
    """

    number: int
    location: str
    record: Record
    stem: str
    more_records: tuple[Record, ...] = ()

    @property
    def id(self) -> str:
        """ID of the row: its `id`, else file stem and row number, as UTF-8."""
        own = str(self.record["id"]) if self.has_own_id else f"{self.stem}-{self.number}"
        return to_readable_name(own)

    @property
    def has_own_id(self) -> bool:
        """True if the row has an `id` that is a text or a number."""
        return isinstance(self.record.get("id"), str | int)


class ClassNames(list[Any]):
    """Names of all classes of one object, of a column of class numbers in Parquet."""


@dataclass(frozen=True, slots=True)
class RowReader:
    """Access to the rows of a dataset.

    Attributes:
        iter_range: Function that yields the rows from `start` to `stop` (exclusive), 0-based.
        eval_start: Index of the first row of the validation split of the source. None, or the
            number of rows, without such a split.
        text_format: Detected delimiter and encoding of a table, its sheet, or the classes of
            folders, for messages.
        other_keys: Number of keys of the source, outside of its rows, that its format does not use.
    """

    num_rows: int
    iter_range: Callable[[int, int], Iterator[SourceRow]]
    eval_start: int | None = None
    text_format: str = ""
    other_keys: Mapping[str, int] = field(default_factory=dict)


ItemT = TypeVar("ItemT")


def rows_from_items(
    items: Sequence[ItemT], make_row: Callable[[int, ItemT], SourceRow], text_format: str = ""
) -> RowReader:
    """Create a row reader that builds one row per item on access.

    Args:
        make_row: Function that builds a row from its 1-based number and its item.
    """

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        selected = itertools.islice(enumerate(items, start=1), start, stop)
        return (make_row(row_number, item) for row_number, item in selected)

    return RowReader(len(items), iter_range, text_format=text_format)


def concat_rows(files: Sequence[Path], readers: Sequence[RowReader]) -> RowReader:
    """Concatenate the rows of several files, with consecutive row numbers."""

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        row_offset = 0
        for file, reader in zip(files, readers, strict=True):
            last = max(0, min(reader.num_rows, stop - row_offset))
            for row in reader.iter_range(max(0, start - row_offset), last):
                location = f"{file.name}, {row.location}"
                yield SourceRow(row_offset + row.number, location, row.record, row.stem)
            row_offset += reader.num_rows

    other_keys: Counter[str] = Counter()
    for reader in readers:
        other_keys.update(reader.other_keys)
    num_rows = sum(reader.num_rows for reader in readers)
    return RowReader(num_rows, iter_range, None, readers[0].text_format, other_keys)


XML_REMEDY = (
    "XML files of VOC start with <annotation>, and those of CVAT with <annotations>; convert others"
    " to a table with a row per box, such as file,xmin,ymin,xmax,ymax,label"
)
"""Remedy for XML files that no format reads."""


def open_row_file(
    source: Path,
    encoding: str | None = None,
    *,
    no_header: bool = False,
    named: Collection[str] = (),
) -> RowReader:
    """Open a file of JSON, JSON Lines, CSV, TSV, TXT, XLSX or Parquet, or a WebDataset, as rows.

    Args:
        encoding: Encoding of a table as text, None to detect it.
        no_header: The first row of a table contains values; see `_read_header`.
        named: Columns that the user names. They decide whether a table has a header.
    """
    suffix = get_row_suffix(source)
    if suffix == ".txt" and is_json_lines(source):
        rows = _open_json(source)
    elif suffix == ".parquet":
        rows = _open_parquet(source)
    elif suffix in TEXT_TABLE_SUFFIXES:
        rows = _open_csv(source, encoding, no_header, named)
    elif suffix == ".xlsx":
        rows = _open_xlsx(source, no_header, named)
    elif suffix in (".json", ".jsonl"):
        rows = _open_json(source)
    elif is_tar_file(source):
        return open_webdataset(source)
    else:
        rows = _open_unknown(source, suffix)
    if rows.num_rows == 0:
        raise UserError(
            "contains no rows",
            where=str(source),
            expected="at least one row (in a table, below the line of column names)",
            remedy="add the rows, or give another file",
        )
    return rows


def _open_unknown(source: Path, suffix: str) -> RowReader:
    """Open a file with an unknown suffix whose first line is a JSON object.

    Raises:
        UserError: The file has another content.
    """
    remedy = "rename the file if it is one of these, or convert it"
    if suffix in (".xls", ".ods", ".xlsm", ".xlsb", ".numbers"):
        remedy = "save the table as .xlsx or .csv"
    elif suffix == ".xml":
        remedy = XML_REMEDY
    elif suffix == ".gz":
        remedy = f"unpack it, or name it after its content: {', '.join(COMPRESSED_SUFFIXES)}"
    elif suffix in IMAGE_SUFFIXES:
        remedy = f"give the folder of the images: {source.parent}"
    with translate_os_errors(source, expected="a file or folder", remedy=remedy):
        source.stat()
    if not _has_json_line(source):
        raise UserError(
            f"a file of type {suffix or '(no suffix)'}",
            where=str(source),
            expected="a table (.json, .jsonl, .csv, .tsv, .txt, .xlsx, .parquet) or images",
            remedy=remedy,
        )
    return replace(_open_json(source), text_format="JSON Lines, by the first line")


def get_row_suffix(path: Path) -> str:
    """Return the suffix of a row file in lower case, without that of its compression.

    The suffix of JSON Lines is `.jsonl`.
    """
    if is_compressed(path):
        return Path(path.stem).suffix.lower()
    suffix = path.suffix.lower()
    return ".jsonl" if suffix in JSON_LINES_SUFFIXES else suffix


def is_compressed(path: Path) -> bool:
    """Return whether a path has the suffix of a compressed row file."""
    return path.name.lower().endswith(COMPRESSED_SUFFIXES)


def _get_stem(source: Path) -> str:
    """Return the name of a row file without its suffixes."""
    return Path(source.stem).stem if is_compressed(source) else source.stem


class _BoundedStream(io.RawIOBase):
    """Decompressed content of a file, whose bytes are counted: headers can be forged."""

    def __init__(self, stream: gzip.GzipFile, source: Path, compressed_bytes: int) -> None:
        super().__init__()
        self._stream = stream
        self._source = source
        self._max_bytes = min(
            MAX_UNPACKED_BYTES, max(UNCHECKED_BYTES, MAX_COMPRESSION_RATIO * compressed_bytes)
        )
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        content = self._stream.read(len(buffer))
        self._num_bytes += len(content)
        if self._num_bytes > self._max_bytes:
            raise UserError(
                f"it would unpack to more than {self._max_bytes:,} bytes",
                where=str(self._source),
                expected=f"at most {MAX_UNPACKED_BYTES:,} bytes, and {MAX_COMPRESSION_RATIO} times"
                " the compressed ones",
                remedy="use it only if you trust its author: unpack it with another program",
            )
        buffer[: len(content)] = content
        return len(content)


@contextlib.contextmanager
def _open_content(source: Path) -> Iterator[BinaryIO]:
    """Open the content of a row file, decompressed within limits."""
    with open_data_file(source) as file:
        if not is_compressed(source):
            yield file
            return
        compressed_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                stream = _BoundedStream(unpacked, source, compressed_bytes)
                yield io.BufferedReader(stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(
                f"cannot be decompressed: {str(error)[:200]}",
                where=str(source),
                expected="a complete file, compressed by gzip",
                remedy="download or create it again",
            ) from error


def _read_content(source: Path) -> bytes:
    """Read the content of a row file without its byte order mark."""
    with _open_content(source) as file:
        if not is_compressed(source):
            return file.read().removeprefix(UTF8_BOM)
        content = file.read(MAX_LOADED_BYTES + 1)
    if len(content) > MAX_LOADED_BYTES:
        raise UserError(
            f"more than {MAX_LOADED_BYTES / 1e9:g} GB after unpacking",
            where=str(source),
            expected="a table that fits in memory",
            remedy="unpack it, or write it as .jsonl.gz, which is read row by row",
        )
    return content.removeprefix(UTF8_BOM)


def _decode_utf8(content: bytes, source: Path, line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        preceding_lines = content[: error.start].split(b"\n")
        raise UserError(
            f"byte {len(preceding_lines[-1])} of the line is not UTF-8 text",
            where=f"{source}:{line + len(preceding_lines) - 1}",
            expected="a file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def is_json_lines(source: Path) -> bool:
    """Return whether a text file begins with a JSON object, as JSON Lines do."""
    with _open_content(source) as file:
        head = file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip()
    return re.match(rb'\{\s*"', head) is not None


def _has_json_line(source: Path) -> bool:
    """Return whether the first line of a file with another suffix is a JSON object."""
    if not source.is_file() or not is_json_lines(source):
        return False
    with _open_content(source) as file:
        line = file.readline(MAX_LINE_BYTES).removeprefix(UTF8_BOM)
    try:
        check_json(line, str(source))
        return isinstance(parse_unique_json(line), dict)
    except ValueError:
        return False


def _open_json(source: Path) -> RowReader:
    """Open a JSON array of objects, a document with rows, or one object per line.

    The suffix matters only for a document, which is a .json file.
    """
    with _open_content(source) as file:
        head = file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip()
    if head.startswith(b"["):
        array = _parse_json(_read_content(source), source, 1)
        return _rows_from_records(array, source)
    if get_row_suffix(source) == ".json":
        rows = _open_document(source)
        if rows is not None:
            return rows
    return RowReader(
        _count_json_lines(source),
        lambda head, stop: itertools.islice(_iter_json_lines(source), head, stop),
    )


def _rows_from_records(records: Sequence[Any], source: Path, text_format: str = "") -> RowReader:
    """Create rows from parsed records. Raises UserError if one of them is no object."""
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise _no_object(record, f"row {number}", source)
    stem = _get_stem(source)
    return rows_from_items(
        records, lambda number, one: SourceRow(number, f"row {number}", one, stem), text_format
    )


def read_first_records(source: Path, count: int) -> list[Record]:
    """Return the first records of a row file; those of JSON Lines without reading the others.

    Raises UserError if the file is not readable.
    """
    if get_row_suffix(source) == ".jsonl":
        return [row.record for row in itertools.islice(_iter_json_lines(source), count)]
    reader = open_row_file(source)
    return [row.record for row in reader.iter_range(0, min(reader.num_rows, count))]


class UnknownRowsError(UserError):
    """Raised for a document whose keys beside the rows may be a part of each row.

    Attributes:
        rows_key: Key of the rows; empty if they are no list.
        records: The rows.
    """

    rows_key: str = ""
    records: Sequence[Record] = ()


def _open_document(source: Path) -> RowReader | None:
    """Open the rows inside of a single JSON object; None for one object per line.

    The rows are the only list of objects, or a table by IDs: objects with mostly the same keys.
    An object in a single line without such rows is a row itself.

    Raises:
        UserError: The object has no rows or several lists, or a key that the rows may depend on.
    """
    with _open_content(source) as file:
        first_line = file.readline(MAX_LINE_BYTES + 1).removeprefix(UTF8_BOM)
        document = _parse_object(first_line)
        is_one_line = document is not None
        others = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
        if is_one_line and any(line.strip() for line in others):
            return None
    if document is None:
        document = _parse_object(_read_content(source))
    if document is None:
        return None
    if _is_row_table(document):
        records, num_names = _add_ids(document)
        rows = _rows_from_records(records, source, "rows by their IDs")
        return replace(rows, other_keys=+Counter({NOTE_ROW_NAMES: num_names}))
    tables = {key: value for key, value in document.items() if _is_table(value)}
    has_media = any(_has_media(value) for key, value in document.items() if key not in tables)
    if has_media or not tables:
        if is_one_line:
            return None
        raise UserError(
            f"one object with the keys {', '.join(document)[:80]}",
            where=str(source),
            expected="a JSON array of objects, one object per line, or one list of objects"
            " under a key",
            remedy="write only the list of its rows to a file",
        )
    if len(tables) > 1:
        raise _build_tables_error(source, tables)
    ((key, table),) = tables.items()
    for name, value in document.items():
        if name != key and _may_describe_rows(name, value):
            error = UnknownRowsError(
                f"the key {name!r} beside the rows under {key!r} may be a part of each row",
                where=str(source),
                expected="keys beside the rows that do not change them, such as version or license",
                remedy=f"write it into each row where it applies, and remove {name!r}; or name the"
                f" rows in a mapping file (--mapping): rows: {key}",
            )
            if isinstance(table, list):
                error.rows_key = key
                error.records = table
            raise error
    unused = Counter(f"{name} of the document" for name in document if name != key)
    records = table
    if isinstance(table, dict):
        records, num_names = _add_ids(table)
        unused += Counter({NOTE_ROW_NAMES: num_names})
    rows = _rows_from_records(records, source, f"rows under the key {key!r}")
    return replace(rows, other_keys=unused)


def _build_tables_error(source: Path, tables: Mapping[str, Any]) -> UnknownRowsError:
    """Return the error of a document with several lists, whose samples may be in any of them."""
    names: list[str] = []
    with_media: list[str] = []
    first_keys: set[str] = set()
    for name, table in tables.items():
        names.append(f"{name} ({format_count(len(table), 'row')})")
        if _has_media(table):
            with_media.append(name)
        first_keys.add(str(list(table[0])) if isinstance(table, list) else name)
    remedy = "write each list to a file of its own; or name the list of the samples in a mapping"
    remedy += " file (--mapping), with rows: KEY, and the others under tables"
    if len(first_keys) == 1:
        remedy += '; or all of them, with rows: "*.*"; or, if their names are values of the'
        remedy += ' samples, with rows: {path: "*", key: name} and sample: rows'
    error = UnknownRowsError(
        f"several lists of rows: {', '.join(names)[:200]}",
        where=str(source),
        expected="rows under one key",
        remedy=remedy,
    )
    if len(with_media) == 1 and isinstance(tables[with_media[0]], list):
        error.rows_key = with_media[0]
        error.records = tables[with_media[0]]
    return error


NOTE_ROW_NAMES = "keys of rows with an `id` of their own"

_TURN_KEYS = frozenset({"role", "from"})
"""Keys of the turns of a conversation, which is a single row."""

_PART_KEYS = frozenset({"text", "image", "image_url", "video", "video_url"})
"""Keys of content parts with a `type`, which belong to a single row."""

_HARMLESS_TEXT = """
    name description info task note notes
    version license licenses licence date year month author authors contributor contributors
    organization copyright citation source url homepage link created updated modified generated
    time timestamp count counts num number total size length split dataset title revision
    encoding schema id uuid hash checksum
"""
_HARMLESS_WORDS = frozenset(_HARMLESS_TEXT.split())
"""Last words of keys beside the rows of a document that describe the data set, not its rows."""

_KEY_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


def _is_table(value: object) -> bool:
    return _is_row_list(value) or _is_row_table(value)


def _is_row_list(value: object) -> bool:
    """Return whether a value is a list of objects that are no turns and no content parts."""
    if not isinstance(value, list) or not value:
        return False
    for item in value:
        if not isinstance(item, dict) or not _TURN_KEYS.isdisjoint(item):
            return False
        if "type" in item and not _PART_KEYS.isdisjoint(item):
            return False
    return True


def _is_row_table(value: object) -> bool:
    """Return whether all values of an object are objects with mostly the same keys."""
    if not isinstance(value, dict) or len(value) < 2:
        return False
    counts: Counter[str] = Counter()
    for record in value.values():
        if not isinstance(record, dict):
            return False
        counts.update(record.keys())
    common = {key for key, count in counts.items() if 2 * count > len(value)}
    if not common or all(
        isinstance(record.get(key), dict) for record in value.values() for key in common
    ):
        return False  # such as splits of tables
    return all(2 * len(common & record.keys()) >= len(common) for record in value.values())


def _add_ids(table: Mapping[str, Record]) -> tuple[list[Record], int]:
    """Return the rows of a table by IDs, and the number of lost IDs."""
    records: list[Record] = []
    num_lost = 0
    for key, record in table.items():
        if "id" in record:
            num_lost += str(record["id"]) != key
            records.append(record)
        else:
            records.append({"id": key, **record})
    return records, num_lost


def _is_media_name(value: object) -> bool:
    is_name = isinstance(value, str) and not re.search(r"\s", value)
    return is_name and (is_image_value(value) or is_video_path(str(value)))


def _has_media(value: object) -> bool:
    """Return whether a value is or contains an image or a video, such as that of all its rows."""
    if isinstance(value, dict):
        return is_image_value(value) or any(map(_has_media, value.values()))
    if isinstance(value, list):
        return any(map(_has_media, value))
    return isinstance(value, str) and (is_image_value(value) or is_video_path(value))


def _may_describe_rows(name: str, value: object) -> bool:
    """Return whether the value of a key beside rows may change their meaning.

    Only keys that describe a data set, such as version and license, do not.
    """
    if value is None or value in ("", [], {}):
        return False
    words = [word.lower() for word in _KEY_WORDS.findall(name)]
    if words and (words[-1] in _HARMLESS_WORDS or words[0] == "dataset"):
        return False
    if isinstance(value, dict):
        return any(_may_describe_rows(key, one) for key, one in value.items())
    return True


def _parse_object(content: bytes | str) -> Record | None:
    """Return a JSON object without duplicate keys; None for other texts."""
    try:
        value = parse_unique_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _count_json_lines(source: Path) -> int:
    """Count the rows of a file, which are validated once."""
    with open_data_file(source) as file:
        stat = os.fstat(file.fileno())
    version = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return _count_valid_lines(source, version)


@lru_cache(maxsize=100)
def _count_valid_lines(source: Path, version: tuple[int, ...]) -> int:
    # An import opens its source several times: to detect the format, then the columns.
    return sum(1 for _ in _iter_json_lines(source))


def _iter_json_lines(source: Path) -> Iterator[SourceRow]:
    """Yield one row per non-blank line; memory is bounded by the longest line."""
    stem = _get_stem(source)
    with _open_content(source) as file:
        for line_number, line in enumerate_lines(file, source):
            if line.strip():
                check_json(line, f"{source}:{line_number}")
                record = _parse_json(line.removesuffix(b"\n"), source, line_number)
                if not isinstance(record, dict):
                    raise _no_object(record, f"line {line_number}", source)
                yield SourceRow(line_number, f"line {line_number}", record, stem)


def _parse_json(content: bytes, source: Path, line: int) -> Any:
    try:
        return parse_unique_json(content)
    except ValueError as error:
        _decode_utf8(content, source, line)
        found = _BROKEN_AT.fullmatch(str(error))
        what, at = (found[1], line + int(found[2]) - 1) if found else (str(error), line)
        expected = "a JSON array of objects, or one object per line"
        remedy = "correct this line or the one above it"
        problem = f"broken JSON: {what}"
        if "hex escape" in what and _HALF.search(content):
            problem, expected = (
                "text with a lone surrogate",
                "escapes such as \\ud83d\\ude00 in pairs",
            )
            remedy = "correct the row: it was probably truncated within a character"
        where = f"{source}:{at}"
        raise UserError(problem, where=where, expected=expected, remedy=remedy) from error


def _no_object(record: object, location: str, source: Path) -> UserError:
    return UserError(
        f"holds {type(record).__name__} {str(record)[:60]!r}",
        where=f"{source}, {location}",
        expected="an object",
        remedy="correct the row",
    )


_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}

_LATIN_LETTERS = {
    "cp1252": "äöüßàâçéèêëîïìôòùûœæñáíóúåøã¿¡",
    "cp1254": "çğıöşüâîûi̇",
    "cp1250": "ąćęłńóśźżáčďéěíňřšťúůýžőűöüßăâîşţ",
}
"""Accented letters of the languages that use each of these similar encodings, in lower case."""

_ENCODINGS = (*_LATIN_LETTERS, "gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "cp1253")
"""Encodings that are tried for a table that is neither UTF-8 nor UTF-16."""

DETECTION_BYTES = 2**17


def _detect_encoding(content: bytes) -> str:
    """Detect the encoding of a table: UTF-8, UTF-16, or the most probable of `_ENCODINGS`."""
    from charset_normalizer import from_bytes

    with contextlib.suppress(UnicodeDecodeError):
        if b"\0" not in content[:SNIFF_BYTES]:
            content.decode()
            return "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = content[:SNIFF_BYTES]
    if b"\0" in head:
        return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    text = content.decode(errors="replace")
    if 10 * text.count("\ufffd") < sum(char > "\x7f" for char in text):
        return "utf-8"  # with invalid bytes, which are reported
    # Lines of ASCII text are equal in all encodings.
    lines = [line for line in content.splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines)[:DETECTION_BYTES]

    def count_letters(encoding: str) -> int:
        text = sample.decode(encoding, errors="replace").lower()
        return sum(char in _LATIN_LETTERS[encoding] for char in text if not char.isascii())

    best = from_bytes(sample, cp_isolation=list(_ENCODINGS)).best()
    # In Latin encodings, single accented letters are between ASCII letters.
    runs = re.findall(rb"[\x80-\xff]+", sample)
    is_latin = sum(len(run) == 1 for run in runs) > 0.8 * len(runs)
    if is_latin or (best is not None and best.encoding in _LATIN_LETTERS):
        return max(_LATIN_LETTERS, key=count_letters)
    return "utf-8" if best is None else best.encoding


def _detect_delimiter(text: str, suffix: str) -> str:
    """Detect the delimiter of a table: the one that yields most columns, equal in all first rows.

    A delimiter that separates images from other cells has precedence. Without a delimiter, it is
    the most frequent one of the header. Files other than .csv are separated by tabs if their first
    line contains one: JSON and sentences in their cells contain commas.
    """
    header = text.partition("\n")[0]
    if suffix != ".csv" and "\t" in header:
        return "\t"
    ranks: dict[str, tuple[bool, int]] = {}
    head = text[:DETECTION_BYTES]
    for delimiter in _DELIMITERS:
        with contextlib.suppress(csv.Error):
            rows = list(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter))
            complete = rows if len(text) == len(head) or len(rows) == 1 else rows[:-1]
            widths = {len(row) for row in complete if row}
            width = widths.pop() if len(widths) == 1 else 0
            has_images = width > 1 and any(map(is_image_value, complete[-1]))
            ranks[delimiter] = (has_images, width)
    best = max(ranks, key=lambda one: ranks[one], default=",")
    if ranks.get(best, (False, 0))[1] > 1:
        return best
    default = "\t" if suffix == ".tsv" else ","
    return max((default, *_DELIMITERS), key=header.count)


def _open_csv(
    source: Path, encoding: str | None, no_header: bool, named: Collection[str]
) -> RowReader:
    content = _read_content(source)
    guessed = encoding or _detect_encoding(content)
    try:
        text = content.decode(guessed)
        if encoding is not None and "\0" in text:
            raise UnicodeError("it contains NUL characters, as UTF-16 does")
    except UnicodeError as error:
        if encoding is not None:
            raise UserError(
                f"not {encoding} text: {error}",
                where=str(source),
                expected="a file in the encoding of --encoding",
                remedy="give another encoding, or remove --encoding to detect it",
            ) from error
        text = _decode_utf8(content, source, 1)
    text = text.removeprefix("\ufeff")
    suffix = get_row_suffix(source)
    delimiter = _detect_delimiter(text, suffix)
    if suffix == ".txt":
        _check_text_columns(text, source, delimiter)
    table = _check_csv(text, source, delimiter, no_header, named)
    if suffix == ".txt" and delimiter != "\t" and not (named or no_header):
        _require_media(table, source)
    if suffix == ".txt" and delimiter == "\t":
        _check_text_quotes(text, source, table.header)
    is_certain = encoding is not None or guessed in ("utf-8", "utf-16")
    note = "" if is_certain else "encoding guessed: "
    encoding_name = guessed.upper().replace("_", "-")
    text_format = f"{_DELIMITERS[delimiter]}-separated, {note}{encoding_name}{table.header.note}"
    return RowReader(table.num_rows, table.iter_range, text_format=text_format)


def _require_media(table: _CsvTable, source: Path) -> None:
    """Reject a .txt file without tabs whose first row names no image or video, such as prose."""
    for row in table.iter_range(0, 1):
        if not any(_has_media(cell) for cell in row.record.values()):
            raise UserError(
                f"a text without images in its first row: {str(row.record)[:80]}",
                where=str(source),
                expected="a table, such as lines with an image path, a tab and a text",
                remedy="name the columns by --map or --mapping, such as --map image=1"
                " --map answer=2, or save the table as .csv",
            )


def _check_text_columns(text: str, source: Path, delimiter: str) -> None:
    """Reject a .txt file without columns, such as prose or a list of images."""
    first_line = text.lstrip("\r\n").partition("\n")[0]
    if delimiter not in first_line:
        raise UserError(
            f"a text without columns: {first_line[:60]!r}",
            where=str(source),
            expected="a table, such as lines with an image path, a tab and a text",
            remedy="separate the columns by tabs; for a list of images, give their folder",
        )


def _check_text_quotes(text: str, source: Path, header: _Header) -> None:
    """Reject quotes in a .txt table of tabs without header.

    Tools for text recognition do not quote cells, but spreadsheets do.
    """
    quoted = re.search(r'(?:^|\t)"', text, re.MULTILINE)
    if header.is_missing and quoted is not None:
        line_number = text.count("\n", 0, quoted.start() + 1) + 1
        raise UserError(
            "a cell begins with a quote, which may enclose the cell or be a part of its text",
            where=f"{source}:{line_number}",
            expected="a .txt table without such quotes",
            remedy="if quotes enclose cells, name the file .tsv; if they are text, write such a"
            ' cell as """text""" and name the file .tsv',
        )


def _open_xlsx(source: Path, no_header: bool, named: Collection[str]) -> RowReader:
    """Open the active sheet of an Excel workbook; its first non-empty row names the columns.

    Rows have the numbers of the sheet.
    """
    openpyxl = import_extra("openpyxl", "xlsx", source)
    content = io.BytesIO(read_data_file(source))
    try:
        with zipfile.ZipFile(content) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
        if num_bytes > MAX_XLSX_BYTES:
            raise ValueError(f"{num_bytes:,} bytes unpacked, more than {MAX_XLSX_BYTES:,}")
        workbook = openpyxl.load_workbook(content, read_only=True, data_only=True)
        sheet = workbook.active or workbook.worksheets[0]
        cells = list(_iter_sheet_rows(sheet))
    except Exception as error:  # openpyxl raises various exceptions on corrupt files
        raise UserError(
            f"cannot be read as an Excel file ({type(error).__name__}: {error})",
            where=str(source),
            expected="an unencrypted .xlsx file with a table in its active sheet",
            remedy="save the table again, or as CSV",
        ) from error
    header = _read_header(cells[0][1] if cells else [], no_header, named, source)
    numbered_rows = cells if header.is_missing else cells[1:]
    if header.is_padded:
        numbered_rows = [(number, _strip_texts(row)) for number, row in numbered_rows]
    filled = {n for _, row in numbered_rows for n, value in enumerate(row) if value is not None}
    all_names = [*header.names]
    all_names += [None] * (max(filled, default=-1) + 1 - len(all_names))
    names = [
        f"unnamed column {n + 1}" if name is None and n in filled else name
        for n, name in enumerate(all_names)
    ]

    def make_row(_: int, numbered_values: tuple[int, list[Any]]) -> SourceRow:
        row_number, values = numbered_values
        padded = zip(names, itertools.chain(values, itertools.repeat(None)), strict=False)
        record = {name: value for name, value in padded if name is not None}
        return SourceRow(row_number, f"row {row_number}", record, source.stem)

    others = [name for name in workbook.sheetnames if name != sheet.title]
    text_format = f"sheet {sheet.title!r}" + (f", not {', '.join(others)}" if others else "")
    return rows_from_items(numbered_rows, make_row, f"{text_format}{header.note}")


def _iter_sheet_rows(sheet: Any) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number and values of each non-empty row.

    Trailing empty cells are removed. A date without time becomes text such as 2026-05-17.
    """
    sheet.reset_dimensions()  # the dimensions stated in a file may be wrong
    num_cells = 0
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        num_cells += 1 + len(row)
        if num_cells > MAX_XLSX_CELLS:
            raise ValueError(f"more than {MAX_XLSX_CELLS:,} cells")
        values = [
            value.date().isoformat()
            if isinstance(value, datetime) and value.time() == time.min
            else value
            for value in row
        ]
        while values and values[-1] is None:
            values.pop()
        if values:
            yield number, values


@dataclass(frozen=True, slots=True)
class _CsvTable:
    """Text of a table whose rows were checked.

    Rows are parsed again on access: their text takes much less memory than their cells.
    """

    content: str
    delimiter: str
    header: _Header
    columns: list[str]
    num_rows: int
    stem: str

    def iter_range(self, start: int, stop: int) -> Iterator[SourceRow]:
        """Yield the rows from `start` to `stop` (exclusive), 0-based."""
        lines = filter(None, _create_csv_reader(self.content, self.delimiter))
        if not self.header.is_missing:
            next(lines, None)
        selected = itertools.islice(enumerate(lines, start=1), start, stop)
        for number, cells in selected:
            record = dict(zip(self.columns, cells, strict=True))
            yield SourceRow(number, f"row {number}", record, self.stem)


def _check_csv(
    content: str, source: Path, delimiter: str, no_header: bool, named: Collection[str]
) -> _CsvTable:
    """Check the rows of a table. Raises UserError for one with other cells than the header."""
    csv.field_size_limit(MAX_CSV_CELL_CHARS)
    reader = _create_csv_reader(content, delimiter)
    try:
        lines = filter(None, reader)
        first: list[str] = next(lines, [])
        header = _read_header(first, no_header, named, source)
        if header.is_padded:
            content = _strip_cells(content, delimiter)
            reader = _create_csv_reader(content, delimiter)
            lines = filter(None, reader)
            first = next(lines, [])
            header = replace(_read_header(first, no_header, named, source), is_padded=True)
        columns = [name or f"unnamed column {n}" for n, name in enumerate(header.names, start=1)]
        num_rows = 0
        for cells in itertools.chain([first] if header.is_missing else [], lines):
            num_rows += 1
            if len(cells) != len(columns):
                raise UserError(
                    f"row {num_rows} has more or fewer cells than the table header",
                    where=f"{source}:{reader.line_num}",
                    expected=f"{len(columns)} cells",
                    remedy="put cells that contain a separator or a line break in double quotes",
                )
    except csv.Error as error:
        raise UserError(
            f"broken CSV: {error}",
            where=f"{source}:{reader.line_num}",
            expected=f"cells of at most {MAX_CSV_CELL_CHARS} characters, quoted with double quotes",
            remedy="correct the line, or save the table as JSONL or Parquet",
        ) from error
    return _CsvTable(content, delimiter, header, columns, num_rows, _get_stem(source))


def _create_csv_reader(content: str, delimiter: str) -> Any:
    # Strict: an unclosed quote would otherwise consume the rest of the file.
    return csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)


def _strip_cells(content: str, delimiter: str) -> str:
    """Remove the spaces around all cells of a table, but not those inside of quotes."""
    blank = "[ ]" if delimiter == "\t" else "[ \t]"
    end = re.escape(delimiter)
    word = rf"[^ \t{end}\r\n]++" if delimiter != "\t" else r"[^ \t\r\n]++"
    quoted = r'"(?:[^"]++|"")*+"'
    # Possessive: a long run of spaces inside of a cell is read once.
    unquoted = rf'(?!"){word}(?:{blank}++{word})*+'
    return re.sub(
        rf"{blank}*+((?:{quoted}|{unquoted})?){blank}*+({end}|\r?\n|\r|\Z)", r"\1\2", content
    )


def _strip_texts(cells: Sequence[Any]) -> list[Any]:
    return [cell.strip() if isinstance(cell, str) else cell for cell in cells]


@dataclass(frozen=True, slots=True)
class _Header:
    """Names of table columns, None for those without a name.

    Attributes:
        is_missing: The first row contains values. The columns are named 1, 2 and so on.
        is_padded: Names or cells of the first row are padded by spaces, which are not a part of
            the cells of the table.
    """

    names: list[str | None]
    is_missing: bool
    is_padded: bool

    @property
    def note(self) -> str:
        """Return the notes about the header for the summary, empty without one."""
        notes = ""
        if self.is_missing:
            notes += f"; no header, columns 1 to {len(self.names)}"
        if self.is_padded:
            notes += "; spaces around cells removed"
        return notes


def _read_header(
    first_row: Sequence[Any], no_header: bool, named: Collection[str], source: Path
) -> _Header:
    """Return the header of a table from its first row.

    A row with an image or its file name contains values. Columns that the user names decide
    otherwise: their names are in the first row, or they are numbers.
    """
    texts = ["" if cell is None else str(cell) for cell in first_row]
    numbers = [str(number) for number in range(1, len(texts) + 1)]
    names_of_row = {text.strip() for text in texts}
    if not names_of_row.isdisjoint(set(named).difference(numbers)):
        has_values = no_header
    elif not set(named).intersection(numbers) <= names_of_row:
        has_values = True
    else:
        is_media = any(is_image_value(cell) or _is_media_name(cell) for cell in first_row)
        has_values = no_header or is_media
    # The separator has a space on one side in the complete row.
    is_padded = len(texts) > 1 and (
        all(text.startswith(" ") for text in texts[1:])
        or all(text.endswith(" ") for text in texts[:-1])
    )
    if first_row and has_values:
        return _Header([*numbers], is_missing=True, is_padded=is_padded)
    stripped = [text.strip() for text in texts]
    _reject_duplicate_columns(
        [name for name in stripped if name],
        f"{source}:1",
        "rename the columns in the first line, or if it contains values, import the file with"
        " --no-header",
    )
    return _Header([name or None for name in stripped], is_missing=False, is_padded=is_padded)


def _reject_duplicate_columns(names: Sequence[str], where: str, remedy: str) -> None:
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(
            f"duplicate column name {duplicates[0]!r}",
            where=where,
            expected="a unique name per column",
            remedy=remedy,
        )


def _open_parquet(source: Path) -> RowReader:
    import_parquet(source)
    if not source.exists():
        read_data_file(source)  # raises a UserError
    found = read_parquet_metadata(source)
    check_row_count(source, found.num_rows)
    with translate_parquet_errors(source):
        schema = found.schema.to_arrow_schema()
    _reject_duplicate_columns(schema.names, str(source), "rename the columns")
    features: Any = {}
    with contextlib.suppress(LookupError, TypeError, ValueError):
        features = parse_unique_json(schema.metadata[b"huggingface"])["info"]["features"]

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        with translate_parquet_errors(source), open_parquet(source) as parquet_file:
            end = 0
            for index in range(parquet_file.num_row_groups):
                group = parquet_file.metadata.row_group(index)
                first, end = end, end + group.num_rows
                if first >= stop or start >= end:
                    continue
                batches = parquet_file.iter_batches(get_batch_size(group), row_groups=[index])
                records = (one for batch in batches for one in iter_records(batch, str(source)))
                for number, record in enumerate(records, start=first + 1):
                    if start < number <= stop:
                        record = _name_classes(record, features) if features else record
                        yield SourceRow(number, f"row {number}", record, source.stem)

    return RowReader(found.num_rows, iter_range)


def _name_classes(value: Any, feature: Any) -> Any:
    """Replace class numbers by names, as the features of the datasets library describe them."""
    feature = {"feature": feature[0]} if isinstance(feature, list) and feature else feature
    if not isinstance(feature, dict):
        return value
    inner = feature.get("feature", feature)
    if isinstance(value, list):
        names = [_name_classes(one, inner) for one in value]
        is_class = isinstance(inner, dict) and inner.get("_type") == "ClassLabel"
        return ClassNames(names) if is_class else names
    if isinstance(value, dict):
        fields = inner if isinstance(inner, dict) else {}
        return {key: _name_classes(one, fields.get(key)) for key, one in value.items()}
    class_names = feature.get("names")
    is_class = feature.get("_type") == "ClassLabel"
    if is_class and isinstance(class_names, list) and type(value) is int:
        return str(class_names[value]) if 0 <= value < len(class_names) else value
    return value


TEXT_SUFFIXES = frozenset({"txt", "text", "caption", "transcript", "cls", "id", "index"})


CONTENT_SUFFIXES = frozenset({*TEXT_SUFFIXES, "json"})
"""Suffixes of the files of a sample whose content is read; `gt.txt` and `box.json` are, too."""

_PLAIN_IMAGE_SUFFIXES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


def is_tar_file(path: Path) -> bool:
    """Return whether a file has the suffix of an uncompressed tar."""
    return path.suffix.lower() == ".tar"


def is_webdataset(path: Path) -> bool:
    """Return whether each sample in a tar has an image and text or JSON.

    Other tar files, including those with annotations in JSON, are archives to unpack.
    """
    with open_tar(path) as tar:
        first_record = None
        for members in iter_member_groups(tar):
            suffixes = {split_member_name(member)[1] for member in members}
            has_text = not suffixes.isdisjoint(CONTENT_SUFFIXES)
            # Stems of other files may have dots: `page.1.png` and `page.1.txt`.
            if not has_text and not suffixes.isdisjoint(_PLAIN_IMAGE_SUFFIXES):
                has_text = any(_get_last_suffix(one) in CONTENT_SUFFIXES for one in suffixes)
            if not has_text or not any(map(_is_image_suffix, suffixes)):
                return False
            first_record = first_record or _build_record(tar, members)
        return first_record is not None and "imagePath" not in first_record


def open_webdataset(source: Path) -> RowReader:
    """Open a WebDataset tar as rows, one per sample."""
    with open_data_file(source), open_tar(source) as tar:
        num_samples = sum(1 for _ in iter_member_groups(tar))
    if num_samples == 0:
        raise UserError(
            "contains no samples",
            where=str(source),
            expected="a WebDataset: 0001.jpg, 0001.txt, 0002.jpg, ...",
            remedy="check the file",
        )

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        with open_tar(source) as tar:
            selected = itertools.islice(enumerate(iter_member_groups(tar), start=1), start, stop)
            for row_number, members in selected:
                key = split_member_name(members[0])[0]
                record = _build_record(tar, members)
                yield SourceRow(row_number, f"sample {key}", record, source.stem)

    return RowReader(num_samples, iter_range)


def _is_image_suffix(suffix: str) -> bool:
    return f".{_get_last_suffix(suffix)}" in IMAGE_SUFFIXES


def _get_last_suffix(suffix: str) -> str:
    """Return the part of a suffix after its last dot."""
    return suffix.rpartition(".")[2]


def _build_record(tar: TarArchive, members: MemberGroup) -> Record:
    """Build a row from the files of a sample, with their suffixes as keys.

    A single image has the key `image`. Files of other types are represented by their names, and
    keys of the JSON that clash with a file have the prefix `json.`.
    """
    names = [posixpath.basename(member.name) for member in members]
    record: Record = {"id": split_member_name(members[0])[0]}
    by_suffix = [(split_member_name(member)[1], member) for member in members]
    image_members = {suffix: member for suffix, member in by_suffix if _is_image_suffix(suffix)}
    for suffix, member in image_members.items():
        record["image" if len(image_members) == 1 else suffix] = _read_member(tar, member)
    for suffix, member in by_suffix:
        if _get_last_suffix(suffix) in CONTENT_SUFFIXES and suffix not in image_members:
            path, remedy = Path(f"{tar.archive}, {member.name}"), "create the tar again"
            with translate_os_errors(path, expected="a text in UTF-8", remedy=remedy):
                text = _read_member(tar, member).decode().rstrip("\r\n")
            content: Any = text
            if _get_last_suffix(suffix) == "json":
                content = _parse_member_json(text, member, tar.archive)
            values: Record = {suffix: content}
            if suffix == "json" and isinstance(content, dict):
                values = content
            clashing = {key: value for key, value in values.items() if key in record}
            record = {**values, **record}
            for key, value in clashing.items():
                if value != record[key] and value not in names:
                    record[f"json.{key}"] = value
        elif suffix not in image_members:
            record.setdefault(suffix, posixpath.basename(member.name))
    return record


def _parse_member_json(text: str, member: tarfile.TarInfo, source: Path) -> Any:
    check_json(text.encode(), f"{source}, {member.name}")
    what, expected = f"{member.name}: broken JSON", "JSON in each .json file"
    with translate_errors(what, expected, "create the tar again", str(source)):
        return parse_unique_json(text)


def _read_member(tar: TarArchive, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{member.name} has {member.size} bytes",
            where=str(tar.archive),
            expected=f"files of at most {MAX_MEMBER_BYTES} bytes",
            remedy="create the tar again without it",
        )
    return tar.read_member(member)
