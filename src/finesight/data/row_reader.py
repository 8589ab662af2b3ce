"""Read rows of JSON, JSON Lines, CSV, TSV, XLSX, Parquet and WebDataset files.

In a WebDataset, a tar, a sample is several adjacent files with the same stem: 0001.jpg, 0001.txt,
0001.json, 0002.jpg, and so on. A row contains the image as `image`, the content of text files under
their suffixes (`txt`, `cls`, `caption`), and the keys of the JSON object.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import posixpath
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from finesight.bounded_files import parse_unique_json, to_readable_name, translate_os_errors
from finesight.data.image_file import IMAGE_SUFFIXES, MAX_MEMBER_BYTES, is_image_value
from finesight.data.line_index import UTF8_BOM, enumerate_lines, open_data_file
from finesight.data.parquet_reader import (
    check_row_count,
    get_batch_size,
    import_extra,
    import_parquet,
    iter_records,
    open_parquet,
    read_parquet_metadata,
    translate_parquet_errors,
)
from finesight.data.sample import check_json, read_data_file, translate_errors
from finesight.errors import UserError
from finesight.hub.archive import TarArchive, open_tar

Record = dict[str, Any]
"""A dataset row as JSON-like data; rows from Parquet may contain bytes."""


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

    text_format = readers[0].text_format
    return RowReader(sum(reader.num_rows for reader in readers), iter_range, None, text_format)


def open_row_file(
    source: Path, encoding: str | None = None, *, no_header: bool = False
) -> RowReader:
    """Open a .json, .jsonl, .csv, .tsv, .xlsx or .parquet file, or a WebDataset, as rows.

    Args:
        encoding: Encoding of a .csv or .tsv file, None to detect it.
        no_header: The first row of a table contains values; see `_name_columns`.
    """
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        rows = _open_parquet(source)
    elif suffix in (".csv", ".tsv"):
        rows = _open_csv(source, encoding, no_header)
    elif suffix == ".xlsx":
        rows = _open_xlsx(source, no_header)
    elif suffix in (".json", ".jsonl"):
        rows = _open_json(source)
    elif is_tar_file(source):
        return open_webdataset(source)
    else:
        remedy = "rename the file if it is one of these, or convert it"
        if suffix in (".xls", ".ods", ".xlsm", ".xlsb", ".numbers"):
            remedy = "save the table as .xlsx or .csv"
        elif suffix in IMAGE_SUFFIXES:
            remedy = f"give the folder of the images: {source.parent}"
        with translate_os_errors(source, expected="a file or folder", remedy=remedy):
            source.stat()
        raise UserError(
            f"a file of type {suffix or '(no suffix)'}",
            where=str(source),
            expected="a table (.json, .jsonl, .csv, .tsv, .xlsx, .parquet) or images",
            remedy=remedy,
        )
    if rows.num_rows == 0:
        raise UserError(
            "contains no rows",
            where=str(source),
            expected="at least one row (in a table, below the line of column names)",
            remedy="add the rows, or give another file",
        )
    return rows


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


def _open_json(source: Path) -> RowReader:
    """Open a JSON array of objects, or one object per line; the suffix does not matter."""
    with open_data_file(source) as file:
        head = file.read(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip()
    if head.startswith(b"["):
        array = _parse_json(read_data_file(source), source, 1)
        for number, record in enumerate(array, start=1):
            if not isinstance(record, dict):
                raise _no_object(record, f"row {number}", source)
        return rows_from_items(
            array, lambda number, one: SourceRow(number, f"row {number}", one, source.stem)
        )
    if source.suffix.lower() == ".json":
        _reject_single_object(source)
    num_rows = sum(1 for _ in _iter_json_lines(source))
    return RowReader(
        num_rows, lambda head, stop: itertools.islice(_iter_json_lines(source), head, stop)
    )


def read_first_records(source: Path, count: int) -> list[Record]:
    """Return the first records of a row file; those of JSON Lines without reading the others.

    Raises UserError if the file is not readable.
    """
    if source.suffix.lower() == ".jsonl":
        return [row.record for row in itertools.islice(_iter_json_lines(source), count)]
    reader = open_row_file(source)
    return [row.record for row in reader.iter_range(0, min(reader.num_rows, count))]


def _reject_single_object(source: Path) -> None:
    """Reject a JSON file that contains a single object over several lines.

    Only the first line is read if it is a complete object.
    """
    with open_data_file(source) as file:
        if is_object_text(next(enumerate_lines(file, source), (1, b""))[1]):
            return
    content = read_data_file(source)
    if is_object_text(content):
        raise UserError(
            f"one object with the keys {', '.join(parse_unique_json(content))[:80]}",
            where=str(source),
            expected="a JSON array of objects, or one object per line",
            remedy="write only the list of its rows to a file",
        )


def is_object_text(content: bytes | str) -> bool:
    """Return whether a text is a JSON object without duplicate keys."""
    try:
        return isinstance(parse_unique_json(content), dict)
    except ValueError:
        return False


def _iter_json_lines(source: Path) -> Iterator[SourceRow]:
    """Yield one row per non-blank line; memory is bounded by the longest line."""
    stem = source.stem
    with open_data_file(source) as file:
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

    Without such a delimiter, it is the most frequent one of the header.
    """
    num_columns: dict[str, int] = {}
    head = text[:DETECTION_BYTES]
    for delimiter in _DELIMITERS:
        with contextlib.suppress(csv.Error):
            rows = list(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter))
            complete = rows if len(text) == len(head) or len(rows) == 1 else rows[:-1]
            widths = {len(row) for row in complete if row}
            num_columns[delimiter] = widths.pop() if len(widths) == 1 else 0
    best = max(num_columns, key=lambda one: num_columns[one], default=",")
    if num_columns.get(best, 0) > 1:
        return best
    header = text.partition("\n")[0]
    default = "\t" if suffix == ".tsv" else ","
    return max((default, *_DELIMITERS), key=header.count)


def _open_csv(source: Path, encoding: str | None, no_header: bool) -> RowReader:
    content = read_data_file(source)
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
    delimiter = _detect_delimiter(text, source.suffix.lower())
    table, header_note = _parse_csv(text, source, delimiter, no_header)
    is_certain = encoding is not None or guessed in ("utf-8", "utf-16")
    note = "" if is_certain else "encoding guessed: "
    encoding_name = guessed.upper().replace("_", "-")
    text_format = f"{_DELIMITERS[delimiter]}-separated, {note}{encoding_name}{header_note}"
    return rows_from_items(table, lambda _, row: row, text_format)


def _open_xlsx(source: Path, no_header: bool) -> RowReader:
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
    header, header_note = _name_columns(cells[0][1] if cells else [], no_header, source)
    numbered_rows = cells if header_note else cells[1:]
    filled = {n for _, row in numbered_rows for n, value in enumerate(row) if value is not None}
    header += [None] * (max(filled, default=-1) + 1 - len(header))
    names = [
        f"unnamed column {n + 1}" if name is None and n in filled else name
        for n, name in enumerate(header)
    ]

    def make_row(_: int, numbered_values: tuple[int, list[Any]]) -> SourceRow:
        row_number, values = numbered_values
        padded = zip(names, itertools.chain(values, itertools.repeat(None)), strict=False)
        record = {name: value for name, value in padded if name is not None}
        return SourceRow(row_number, f"row {row_number}", record, source.stem)

    others = [name for name in workbook.sheetnames if name != sheet.title]
    text_format = f"sheet {sheet.title!r}" + (f", not {', '.join(others)}" if others else "")
    return rows_from_items(numbered_rows, make_row, f"{text_format}{header_note}")


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


def _parse_csv(
    content: str, source: Path, delimiter: str, no_header: bool
) -> tuple[list[SourceRow], str]:
    """Return the rows of a table, and a note about a missing header."""
    rows, header_note = [], ""
    csv.field_size_limit(MAX_CSV_CELL_CHARS)
    # Strict: an unclosed quote would otherwise consume the rest of the file.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = filter(None, reader)
        first = next(lines, [])
        names, header_note = _name_columns(first, no_header, source)
        columns = [name or f"unnamed column {n}" for n, name in enumerate(names, start=1)]
        values = itertools.chain([first] if header_note else [], lines)
        for row_number, cells in enumerate(values, start=1):
            if len(cells) != len(columns):
                raise UserError(
                    f"row {row_number} has more or fewer cells than the table header",
                    where=f"{source}:{reader.line_num}",
                    expected=f"{len(columns)} cells",
                    remedy="put cells that contain a separator or a line break in double quotes",
                )
            record = dict(zip(columns, cells, strict=True))
            rows.append(SourceRow(row_number, f"row {row_number}", record, source.stem))
    except csv.Error as error:
        raise UserError(
            f"broken CSV: {error}",
            where=f"{source}:{reader.line_num}",
            expected=f"cells of at most {MAX_CSV_CELL_CHARS} characters, quoted with double quotes",
            remedy="correct the line, or save the table as JSONL or Parquet",
        ) from error
    return rows, header_note


def _name_columns(
    first_row: Sequence[Any], no_header: bool, source: Path
) -> tuple[list[str | None], str]:
    """Return the names of table columns, and a note if the first row contains values.

    Such columns are named 1, 2 and so on. A row with an image or its file name contains values.
    """
    if first_row and (no_header or any(map(is_image_value, first_row))):
        names = [str(number) for number in range(1, len(first_row) + 1)]
        return [*names], f"; no header, columns {names[0]} to {names[-1]}"
    header = [None if name is None or not str(name).strip() else str(name) for name in first_row]
    remedy = "rename the columns in the first line, or if it contains values, import the file"
    _reject_duplicate_columns([*filter(None, header)], f"{source}:1", f"{remedy} with --no-header")
    return header, ""


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
        return [_name_classes(one, inner) for one in value]
    if isinstance(value, dict):
        fields = inner if isinstance(inner, dict) else {}
        return {key: _name_classes(one, fields.get(key)) for key, one in value.items()}
    names = feature.get("names")
    if feature.get("_type") == "ClassLabel" and isinstance(names, list) and type(value) is int:
        return str(names[value]) if 0 <= value < len(names) else value
    return value


MemberGroup = list[tarfile.TarInfo]

TEXT_SUFFIXES = frozenset({"txt", "text", "caption", "transcript", "cls", "id", "index"})


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
            if not any(map(_is_image_suffix, suffixes)) or not suffixes & {*TEXT_SUFFIXES, "json"}:
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


def iter_member_groups(tar: TarArchive) -> Iterator[MemberGroup]:
    """Yield the tar members of each sample: adjacent files with the same stem.

    Hidden files are skipped.
    """
    files = (
        member
        for member in tar.iter_headers()
        if member.isreg()
        and not posixpath.basename(member.name.rstrip("/")).startswith((".", "__"))
    )
    for _, members in itertools.groupby(files, key=lambda member: split_member_name(member)[0]):
        yield list(members)


def split_member_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Split a tar member path into stem and suffix at the first dot."""
    folder, slash, name = member.name.rpartition("/")
    stem, _, suffix = name.partition(".")
    return _normalize_folder(folder or slash) + stem, to_readable_name(suffix.lower())


@lru_cache(1024)
def _normalize_folder(folder: str) -> str:
    """Return a folder as a path prefix with trailing slash, without leading `./`."""
    path = str(PurePosixPath(folder))
    return "" if path == "." else f"{path.rstrip('/')}/"


def _is_image_suffix(suffix: str) -> bool:
    return f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES


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
        if suffix in TEXT_SUFFIXES or suffix == "json":
            path, remedy = Path(f"{tar.archive}, {member.name}"), "create the tar again"
            with translate_os_errors(path, expected="a text in UTF-8", remedy=remedy):
                text = _read_member(tar, member).decode().rstrip("\r\n")
            values: Record = {suffix: text}
            if suffix == "json":
                values = _parse_member_json(text, member, tar.archive)
            clashing = {key: value for key, value in values.items() if key in record}
            record = {**values, **record}
            for key, value in clashing.items():
                if value != record[key] and value not in names:
                    record[f"json.{key}"] = value
        elif suffix not in image_members:
            record.setdefault(suffix, posixpath.basename(member.name))
    return record


def _parse_member_json(text: str, member: tarfile.TarInfo, source: Path) -> Record:
    check_json(text.encode(), f"{source}, {member.name}")
    what, expected = f"{member.name}: broken JSON", "JSON in each .json file"
    with translate_errors(what, expected, "create the tar again", str(source)):
        content = parse_unique_json(text)
    return content if isinstance(content, dict) else {"json": content}


def _read_member(tar: TarArchive, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{member.name} has {member.size} bytes",
            where=str(tar.archive),
            expected=f"files of at most {MAX_MEMBER_BYTES} bytes",
            remedy="create the tar again without it",
        )
    return tar.read_member(member)
