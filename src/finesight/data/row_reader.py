"""Read dataset rows from JSON, JSON Lines, CSV, TSV and Parquet files as dictionaries."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finesight.bounded_files import parse_json
from finesight.data.jsonl import read_data_file
from finesight.data.limits import check_json
from finesight.data.line_index import UTF8_BOM, enumerate_lines, open_data_file
from finesight.data.parquet_row_groups import (
    import_parquet,
    open_parquet,
    read_parquet_metadata,
    translate_parquet_errors,
)
from finesight.data.parquet_values import check_row_count, get_batch_size, iter_records
from finesight.errors import UserError
from finesight.file_name_encoding import to_readable_name

Record = dict[str, Any]
"""A dataset row as JSON-like data; rows from Parquet may contain bytes."""


SNIFF_BYTES = 4096
"""Number of bytes read to distinguish a JSON array from JSON Lines."""

_BROKEN_AT = re.compile(r"(.*) at line ([0-9]+) column [0-9]+", re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A dataset row and its location in the source.

    Attributes:
        number: 1-based line number in JSON Lines, else 1-based row number.
        location: Location of the row for messages, such as "line 12".
        record: Keys and values of the row.
        stem: Name of the source file without suffix, used for generated IDs.
    """

    number: int
    location: str
    record: Record
    stem: str

    @property
    def id(self) -> str:
        """ID of the row: its `id`, else file stem and row number, as UTF-8."""
        own = self.record.get("id")
        is_own = isinstance(own, str | int)
        return to_readable_name(str(own) if is_own else f"{self.stem}-{self.number}")


@dataclass(frozen=True, slots=True)
class RowReader:
    """Access to the rows of a dataset.

    Attributes:
        num_rows: Total number of rows.
        iter_range: Function that yields the rows from `start` to `stop` (exclusive), 0-based.
    """

    num_rows: int
    iter_range: Callable[[int, int], Iterator[SourceRow]]


ItemT = TypeVar("ItemT")


def rows_from_items(
    items: Sequence[ItemT], make_row: Callable[[int, ItemT], SourceRow]
) -> RowReader:
    """Create a row reader that builds one row per item on access.

    Args:
        items: Items such as file paths, one per row.
        make_row: Function that builds a row from its 1-based number and its item.
    """

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        selected = itertools.islice(enumerate(items, start=1), start, stop)
        return (make_row(row_number, item) for row_number, item in selected)

    return RowReader(len(items), iter_range)


def concat_rows(files: Sequence[Path], readers: Sequence[RowReader]) -> RowReader:
    """Concatenate the rows of several files, with consecutive row numbers."""

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        row_offset = 0
        for file, reader in zip(files, readers, strict=True):
            selected = reader.iter_range(
                max(0, start - row_offset), max(0, min(reader.num_rows, stop - row_offset))
            )
            for row in selected:
                location = f"{file.name}, {row.location}"
                yield SourceRow(row_offset + row.number, location, row.record, row.stem)
            row_offset += reader.num_rows

    return RowReader(sum(reader.num_rows for reader in readers), iter_range)


def open_row_file(source: Path) -> RowReader:
    """Open a .json, .jsonl, .csv, .tsv or .parquet file as rows.

    Raises:
        UserError: The suffix is unknown, or the file is unreadable or contains no rows.
    """
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        rows = _open_parquet(source)
    elif suffix in (".csv", ".tsv"):
        rows = _rows_from_list(
            _read_csv(source, "\t" if suffix == ".tsv" else _detect_delimiter(source))
        )
    elif suffix in (".json", ".jsonl"):
        rows = _open_json(source)
    else:
        raise UserError(
            f"a file of type {suffix or '(no suffix)'}",
            where=str(source),
            expected=".json, .jsonl, .csv, .tsv or .parquet",
            remedy="rename the file if it is one of these, or convert it",
        )
    if rows.num_rows == 0:
        raise UserError(
            "contains no rows", where=str(source), expected="at least one", remedy="check the file"
        )
    return rows


def _rows_from_list(rows: list[SourceRow]) -> RowReader:
    return RowReader(len(rows), lambda start, stop: itertools.islice(rows, start, stop))


def _read_text(source: Path) -> str:
    return _decode_utf8(read_data_file(source), source, 1)


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
    """Open a file that contains a JSON array of objects or one object per line.

    The content decides, not the suffix.
    """
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


def _reject_single_object(source: Path) -> None:
    """Reject a JSON file that contains a single object over several lines.

    Only the first line is read if it is a complete object.

    Raises:
        UserError: The file contains a single object.
    """
    with open_data_file(source) as file:
        if _is_object(next(enumerate_lines(file, source), (1, b""))[1]):
            return
    content = read_data_file(source)
    if _is_object(content):
        raise UserError(
            f"one object with the keys {', '.join(parse_json(content))[:80]}",
            where=str(source),
            expected="a JSON array of objects, or one object per line",
            remedy="write only the list of its rows to a file",
        )


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(parse_json(content), dict)
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
    """Parse JSON that starts at line `line` of a file.

    Raises:
        UserError: The JSON is invalid. The error names the line of the problem.
    """
    try:
        return parse_json(content)
    except ValueError as error:
        raise _broken(content, str(error), source, line) from error


def _broken(content: bytes, problem: str, source: Path, line: int) -> UserError:
    _decode_utf8(content, source, line)
    found = _BROKEN_AT.fullmatch(problem)
    what, at = (found[1], line + int(found[2]) - 1) if found else (problem, line)
    if "hex escape" in what and _HALF.search(content):
        return UserError(
            "text with a lone surrogate",
            where=f"{source}:{at}",
            expected="escapes such as \\ud83d\\ude00 in pairs",
            remedy="correct the row: it was probably truncated within a character",
        )
    return UserError(
        f"broken JSON: {what}",
        where=f"{source}:{at}",
        expected="a JSON array of objects, or one object per line",
        remedy="correct this line or the one above it",
    )


def _no_object(record: object, location: str, source: Path) -> UserError:
    return UserError(
        f"holds {type(record).__name__} {str(record)[:60]!r}",
        where=f"{source}, {location}",
        expected="an object",
        remedy="correct the row",
    )


def _detect_delimiter(source: Path) -> str:
    """Detect the delimiter of a CSV file (comma or semicolon) from its header.

    Spreadsheet programs write semicolons in many locales.
    """
    head = _read_text(source).partition("\n")[0]
    return ";" if ";" in head and "," not in head else ","


def _read_csv(source: Path, delimiter: str) -> list[SourceRow]:
    rows = []
    text = io.StringIO(_read_text(source), newline="")
    # Strict: an unclosed quote would otherwise consume the rest of the file.
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        _reject_duplicate_columns(reader.fieldnames or (), source)
        for row_number, record in enumerate(reader, start=1):
            if None in record or None in record.values():
                raise UserError(
                    f"row {row_number} has more or fewer cells than the table header",
                    where=f"{source}:{reader.line_num}",
                    expected=f"{len(reader.fieldnames or ())} cells",
                    remedy="put cells that contain a separator or a line break in double quotes",
                )
            rows.append(SourceRow(row_number, f"row {row_number}", record, source.stem))
    except csv.Error as error:
        raise UserError(
            f"broken CSV: {error}",
            where=f"{source}:{reader.reader.line_num}",
            expected="cells of at most 131072 characters, quoted with double quotes",
            remedy="correct the line, or save the table as JSONL or Parquet",
        ) from error
    return rows


def _reject_duplicate_columns(names: Sequence[str], source: Path) -> None:
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(
            f"duplicate column name {duplicates[0]!r}",
            where=f"{source}:1",
            expected="a unique name per column",
            remedy="rename the columns in the first line",
        )


def _open_parquet(source: Path) -> RowReader:
    import_parquet(source)
    if not source.exists():
        read_data_file(source)  # raises a UserError
    found = read_parquet_metadata(source)
    check_row_count(source, found.num_rows)

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        with translate_parquet_errors(source), open_parquet(source) as parquet_file:
            position = 0
            for group in range(parquet_file.num_row_groups):
                size = parquet_file.metadata.row_group(group).num_rows
                if position < stop and start < position + size:
                    yield from iter_batches(parquet_file, group, position, start, stop)
                position += size

    def iter_batches(
        parquet_file: Any, group: int, position: int, start: int, stop: int
    ) -> Iterator[SourceRow]:
        rows = get_batch_size(parquet_file.metadata.row_group(group))
        for batch in parquet_file.iter_batches(batch_size=rows, row_groups=[group]):
            for record in iter_records(batch, str(source)):
                if start <= position < stop:
                    yield SourceRow(position + 1, f"row {position + 1}", record, source.stem)
                position += 1

    return RowReader(found.num_rows, iter_range)
