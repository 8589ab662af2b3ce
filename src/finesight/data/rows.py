"""Rows of foreign files: JSON, JSON Lines, CSV and Parquet as plain records."""

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
from finesight.data.jsonl import read_bytes
from finesight.data.limits import check_json
from finesight.data.lines import MARK, numbered_lines, opened
from finesight.data.parquet_groups import metadata, open_parquet, parquet_module, undamaged
from finesight.data.parquet_values import batch_rows, check_rows, records
from finesight.errors import UserError
from finesight.file_names import readable_name

Record = dict[str, Any]
"""One row as JSON-like data; Parquet adds bytes."""


LOOKED_AT = 4096
"""Bytes at the start of a file of JSON that tell an array from lines."""

_BROKEN_AT = re.compile(r"(.*) at line ([0-9]+) column [0-9]+", re.DOTALL)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands: `number` from 1 is its line (JSONL) or its place."""

    number: int
    place: str
    record: Record
    stem: str

    @property
    def id(self) -> str:
        """The record's own id, or one made of the file's name and the row's number; as text that
        can be written, also where it is the name of a file."""
        own = self.record.get("id")
        is_own = isinstance(own, str | int)
        return readable_name(str(own) if is_own else f"{self.stem}-{self.number}")


@dataclass(frozen=True, slots=True)
class Rows:
    """A file of rows; `select(start, stop)` gives those from `start` (0 is the first) on."""

    total: int
    select: Callable[[int, int], Iterator[Row]]


Item = TypeVar("Item")


def rows_of(items: Sequence[Item], row: Callable[[int, Item], Row]) -> Rows:
    """A row for each item, made by `row` from its number (from 1) when it is asked for."""

    def select(start: int, stop: int) -> Iterator[Row]:
        chosen = itertools.islice(enumerate(items, start=1), start, stop)
        return (row(number, item) for number, item in chosen)

    return Rows(len(items), select)


def joined(files: Sequence[Path], parts: Sequence[Rows]) -> Rows:
    """The rows of several files as one sequence, numbered through."""

    def select(start: int, stop: int) -> Iterator[Row]:
        before = 0
        for file, part in zip(files, parts, strict=True):
            inner = part.select(max(0, start - before), max(0, min(part.total, stop - before)))
            for row in inner:
                place = f"{file.name}, {row.place}"
                yield Row(before + row.number, place, row.record, row.stem)
            before += part.total

    return Rows(sum(part.total for part in parts), select)


def open_rows(source: Path) -> Rows:
    """The rows of a .json, .jsonl, .csv, .tsv or .parquet file.

    Raises UserError for another suffix, a file that cannot be read, and one without rows.
    """
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet(source)
    elif suffix in (".csv", ".tsv"):
        rows = _in_memory(_csv(source, "\t" if suffix == ".tsv" else _separator(source)))
    elif suffix in (".json", ".jsonl"):
        rows = _json(source)
    else:
        raise UserError(
            f"a file of type {suffix or '(no suffix)'}",
            where=str(source),
            expected=".json, .jsonl, .csv, .tsv or .parquet",
            remedy="rename the file if it is one of these, or convert it",
        )
    if rows.total == 0:
        raise UserError(
            "holds no rows", where=str(source), expected="at least one", remedy="check the file"
        )
    return rows


def _in_memory(rows: list[Row]) -> Rows:
    return Rows(len(rows), lambda start, stop: itertools.islice(rows, start, stop))


def _text(source: Path) -> str:
    return _decoded(read_bytes(source), source, 1)


def _decoded(content: bytes, source: Path, line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        raise UserError(
            f"byte {len(before[-1])} of the line is not UTF-8 text",
            where=f"{source}:{line + len(before) - 1}",
            expected="a file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def _json(source: Path) -> Rows:
    """A JSON array of objects, or one object a line, whatever the suffix says."""
    with opened(source) as file:
        start = file.read(LOOKED_AT).removeprefix(MARK).lstrip()
    if start.startswith(b"["):
        array = _parsed(read_bytes(source), source, 1)
        for number, record in enumerate(array, start=1):
            if not isinstance(record, dict):
                raise _no_object(record, f"row {number}", source)
        return rows_of(array, lambda number, one: Row(number, f"row {number}", one, source.stem))
    if source.suffix.lower() == ".json":
        _refuse_one_object(source)
    total = sum(1 for _ in _json_lines(source))
    return Rows(total, lambda start, stop: itertools.islice(_json_lines(source), start, stop))


def _refuse_one_object(source: Path) -> None:
    """Raise UserError for a file that is one object over several lines, and neither rows nor lines.

    A file whose first line is whole is not read any further.
    """
    with opened(source) as file:
        if _is_object(next(numbered_lines(file, source), (1, b""))[1]):
            return
    content = read_bytes(source)
    if _is_object(content):
        raise UserError(
            f"one object with the keys {', '.join(parse_json(content))[:80]}",
            where=str(source),
            expected="a JSON array of objects, or one object on each line",
            remedy="write the list of its rows alone into a file",
        )


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(parse_json(content), dict)
    except ValueError:
        return False


def _json_lines(source: Path) -> Iterator[Row]:
    """One line at a time: a file of any size takes no more memory than its longest line."""
    stem = source.stem
    with opened(source) as file:
        for number, line in numbered_lines(file, source):
            if line.strip():
                check_json(line, f"{source}:{number}")
                record = _parsed(line.removesuffix(b"\n"), source, number)
                if not isinstance(record, dict):
                    raise _no_object(record, f"line {number}", source)
                yield Row(number, f"line {number}", record, stem)


def _parsed(content: bytes, source: Path, line: int) -> Any:
    """The data of JSON that begins at a line of a file. Raises UserError naming the broken line."""
    try:
        return parse_json(content)
    except ValueError as error:
        raise _broken(content, str(error), source, line) from error


def _broken(content: bytes, problem: str, source: Path, line: int) -> UserError:
    _decoded(content, source, line)
    found = _BROKEN_AT.fullmatch(problem)
    what, at = (found[1], line + int(found[2]) - 1) if found else (problem, line)
    if "hex escape" in what and _HALF.search(content):
        return UserError(
            "text with half of a character",
            where=f"{source}:{at}",
            expected="escapes such as \\ud83d\\ude00 in pairs",
            remedy="correct the row: it was probably cut in the middle of a character",
        )
    return UserError(
        f"broken JSON: {what}",
        where=f"{source}:{at}",
        expected="a JSON array of objects, or one object on each line",
        remedy="correct this line or the one above it",
    )


def _no_object(record: object, place: str, source: Path) -> UserError:
    return UserError(
        f"holds {type(record).__name__} {str(record)[:60]!r}",
        where=f"{source}, {place}",
        expected="an object with named values",
        remedy="correct the row",
    )


def _separator(source: Path) -> str:
    """A comma or, in a head without one, the semicolon of spreadsheets in many countries."""
    head = _text(source).partition("\n")[0]
    return ";" if ";" in head and "," not in head else ","


def _csv(source: Path, delimiter: str) -> list[Row]:
    rows = []
    text = io.StringIO(_text(source), newline="")
    # Strict, as a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        _refuse_twins(reader.fieldnames or (), source)
        for number, record in enumerate(reader, start=1):
            if None in record or None in record.values():
                raise UserError(
                    f"row {number} has more or fewer cells than the head of the table",
                    where=f"{source}:{reader.line_num}",
                    expected=f"{len(reader.fieldnames or ())} cells",
                    remedy="put cells that hold a separator or a line break in double quotes",
                )
            rows.append(Row(number, f"row {number}", record, source.stem))
    except csv.Error as error:
        raise UserError(
            f"broken CSV: {error}",
            where=f"{source}:{reader.reader.line_num}",
            expected="cells of at most 131072 characters, quoted with double quotes",
            remedy="correct the line, or save the table as JSONL or Parquet",
        ) from error
    return rows


def _refuse_twins(names: Sequence[str], source: Path) -> None:
    twins = [name for name, uses in Counter(names).items() if uses > 1]
    if twins:
        raise UserError(
            f"more than one column is called {twins[0]!r}",
            where=f"{source}:1",
            expected="a name of its own for each column",
            remedy="rename the columns in the first line",
        )


def _parquet(source: Path) -> Rows:
    parquet_module(source)
    if not source.exists():
        read_bytes(source)  # says it in our words
    found = metadata(source)
    check_rows(source, found.num_rows)

    def select(start: int, stop: int) -> Iterator[Row]:
        with undamaged(source), open_parquet(source) as table:
            position = 0
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if position < stop and start < position + size:
                    yield from _batches(table, group, position, start, stop)
                position += size

    def _batches(table: Any, group: int, position: int, start: int, stop: int) -> Iterator[Row]:
        rows = batch_rows(table.metadata.row_group(group))
        for batch in table.iter_batches(batch_size=rows, row_groups=[group]):
            for record in records(batch, str(source)):
                if start <= position < stop:
                    yield Row(position + 1, f"row {position + 1}", record, source.stem)
                position += 1

    return Rows(found.num_rows, select)
