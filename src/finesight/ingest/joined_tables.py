"""Tables whose rows are inserted into the records that refer to them by a key.

Records of a document and rows of tables are stored in a temporary database on disk.
"""

from __future__ import annotations

import json
import os
import sqlite3
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import is_utf8, parse_json
from finesight.ingest.json_stream import JsonStream
from finesight.ingest.mapping import JoinedTable, RecordMapping, Rows, TableClasses
from finesight.ingest.record_values import (
    MISSING,
    Scope,
    build_type_error,
    check_key,
    find_value,
    read_record,
    replace_at,
    to_text,
)
from finesight.ingest.row_reader import Record, RowReader, SourceRow, open_row_file
from finesight.samples.line_index import open_data_file
from finesight.samples.sample import InvalidRowError

RECORDS = ""
"""Name of the records among the lists of a document; tables have other names."""

MAX_CACHED_KEYS = 1000
"""Number of keys of which the parsed rows are cached, such as those of classes."""

CACHE_KIB = 32 * 1024
"""Size in KiB of the cache of the database in memory."""


class StoredRow(NamedTuple):
    """A row in the database.

    Attributes:
        table: Name of its table; empty for records.
        key: Text by which a row is found; the number of a record, counted from 0.
        content: JSON of the row.
    """

    table: str
    key: str | int
    location: str
    content: str


class FoundRow(NamedTuple):
    """A row that was found by its key, and its number in the database."""

    number: int
    record: Record


class RowStore:
    """Temporary database of rows, which are found by table and key.

    SQLite removes its file when the store is no longer used, also after the end of the process.
    """

    def __init__(self) -> None:
        # A database without a name is a temporary file. Only one thread at a time reads a source.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        weakref.finalize(self, self._database.close)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._database.execute(
            "CREATE TABLE rows (number INTEGER PRIMARY KEY, list TEXT, key, location, content)"
        )

    def add(self, rows: Iterable[StoredRow]) -> None:
        """Add rows."""
        with _translate_database_errors():
            self._database.execute("BEGIN")
            insert = "INSERT INTO rows (list, key, location, content) VALUES (?, ?, ?, ?)"
            self._database.executemany(insert, rows)
            self._database.execute("COMMIT")

    def build_index(self) -> None:
        """Sort the rows by their keys. The last row was added before."""
        with _translate_database_errors():
            self._database.execute("CREATE INDEX by_key ON rows (list, key)")

    def count(self, table: str) -> int:
        """Return the number of rows of a table."""
        ((found,),) = self._select("SELECT count(*) FROM rows WHERE list = ?", table)
        return int(found)

    def count_all(self) -> int:
        """Return the number of rows of all lists."""
        ((found,),) = self._select("SELECT count(*) FROM rows")
        return int(found)

    def find(self, table: str, key: str) -> list[FoundRow]:
        """Return the rows of a table with a key, in the order of their file."""
        if not is_utf8(key):
            return []
        query = "SELECT number, content FROM rows WHERE list = ? AND key = ? ORDER BY number"
        found = self._select(query, table, key)
        return [FoundRow(number, parse_json(content)) for number, content in found]

    def iter_records(self, start: int, stop: int) -> Iterator[tuple[int, str, Record]]:
        """Yield the records from `start` to `stop` (exclusive) with number and location."""
        query = (
            "SELECT key, location, content FROM rows"
            " WHERE list = ? AND key >= ? AND key < ? ORDER BY key"
        )
        for number, location, content in self._select(query, RECORDS, start, stop):
            yield number, location, parse_json(content)

    def iter_rows(self, table: str) -> Iterator[tuple[str, Record]]:
        """Yield the rows of a table in the order of their file with their locations."""
        query = "SELECT location, content FROM rows WHERE list = ? ORDER BY number"
        for location, content in self._select(query, table):
            yield location, parse_json(content)

    def iter_keys(self, table: str) -> Iterator[tuple[int, str]]:
        """Yield number and key of the rows of a table."""
        query = "SELECT number, key FROM rows WHERE list = ? ORDER BY number"
        yield from self._select(query, table)

    def find_repeated(self, table: str) -> tuple[str, list[str]] | None:
        """Return a key of several rows with the locations of the first two."""
        query = "SELECT key FROM rows WHERE list = ? GROUP BY key HAVING count(*) > 1 LIMIT 1"
        found = next(self._select(query, table), None)
        if found is None:
            return None
        query = "SELECT location FROM rows WHERE list = ? AND key = ? ORDER BY number LIMIT 2"
        locations = [one for (one,) in self._select(query, table, *found)]
        return found[0], locations

    def _select(self, query: str, *values: object) -> Iterator[Any]:
        """Yield the rows that a query returns."""
        with _translate_database_errors():
            yield from self._database.execute(query, values)


@contextmanager
def _translate_database_errors() -> Iterator[None]:
    """Convert an error of the database to a UserError."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"the temporary database of the tables cannot be written or read: {error}",
            where="tables of the mapping",
            expected="free space for the rows in the folder of temporary files",
            remedy="free space, or set TMPDIR to a folder with more of it",
        ) from error


class UnjoinedRecord(dict[str, Any]):
    """A record without the rows of its tables.

    They are inserted when the record is read, so that an import may skip it after an error.
    """

    def __init__(self, record: Record, tables: JoinedTables) -> None:
        super().__init__(record)
        self.tables = tables


@dataclass(frozen=True, slots=True)
class JoinedTables:
    """Tables of a mapping with their rows.

    Attributes:
        find_row: `RowStore.find` of tables with single rows, which many records refer to.
        used_rows: A byte for each row by its number, which is 1 if a record refers to the row.
        classes: Class names, if the mapping has them from a table.
    """

    tables: Mapping[str, JoinedTable]
    store: RowStore
    find_row: Callable[[str, str], list[FoundRow]]
    used_rows: bytearray
    classes: tuple[str, ...] = ()

    def join(self, record: Record) -> Record:
        """Return a record with the rows of all tables.

        Raises:
            InvalidRowError: The record has no key, or no row of a table with single rows has it.
        """
        for name, table in self.tables.items():
            insert_rows = partial(self._insert_rows, name=name, table=table)
            record = replace_at(record, table.by, table.holder_steps, insert_rows)
        return record

    def _insert_rows(self, holder: Any, location: str, name: str, table: JoinedTable) -> Any:
        """Return an object with the rows that have the key beside them."""
        scope = Scope(holder, location)
        if not isinstance(holder, dict):
            raise build_type_error(scope, table.by, "an object, whose key names the rows")
        if name in holder:
            raise InvalidRowError(
                f"{location or 'the record'} has a key {name} of its own",
                "another name for the table",
                f"rename the table {name} in the mapping",
            )
        value = find_value(scope, table.by.steps[-1:], table.by)
        found: list[FoundRow] = []
        key = ""
        if value is not MISSING:
            key = check_key(value, table.by, f"by of the table {name}")
            find = self.find_row if table.group is None else self.store.find
            found = find(name, key)
        for row in found:
            self.used_rows[row.number] = 1
        if table.group is not None:
            return {**holder, name: [row.record for row in found]}
        if found:
            return {**holder, name: found[0].record}
        if table.by.steps[-1].is_optional:
            return holder
        raise InvalidRowError(
            f"no row of the table {name} has the {table.key_path.text} {key[:60]!r}, which is"
            f" {table.by.text} of {location or 'the record'}",
            "a row with this key",
            f"add the row, or write by: {table.by.text}? if records may lack it",
        )

    def count_unused(self, *, is_complete: bool) -> Counter[str]:
        """Count the rows to which no record refers.

        Args:
            is_complete: Whether there are records, all of which could be joined.

        Returns:
            Number of rows by description.

        Raises:
            UserError: All records were joined, and none of them has a row of a table with lists.
        """
        unused: Counter[str] = Counter()
        for name, table in self.tables.items():
            num_rows = 0
            num_unused = 0
            example = ""
            for number, key in self.store.iter_keys(name):
                num_rows += 1
                if not self.used_rows[number]:
                    num_unused += 1
                    example = example or f"such as {table.key_path.text} {key[:60]!r}"
            has_no_record = num_unused == num_rows
            if table.group is None:
                if has_no_record:
                    unused[f"rows of the table {name}, none of which a record has"] = num_rows
            elif num_rows and has_no_record and is_complete:
                raise UserError(
                    f"no record has a {table.by.text} that is the {table.key_path.text} of one of"
                    f" the {num_rows} rows, {example}",
                    where=f"the table {name} of the mapping",
                    expected="records and rows with equal keys",
                    remedy="correct group and by of the table",
                )
            else:
                unused[f"rows of the table {name} without a record, {example}"] = num_unused
        return +unused  # without counts of 0


def open_joined_records(source: Path, mapping: RecordMapping) -> RowReader:
    """Open the records of a JSON document with their tables.

    Raises:
        UserError: A file is not readable, or a table is not valid.
    """
    assert mapping.rows is not None, "checked by the caller"
    lists = {RECORDS: mapping.rows}
    for name, table in mapping.tables.items():
        if table.file is None and table.source is not None:
            lists[name] = table.source
    store = RowStore()
    other_keys = _add_document(store, source, lists, mapping)
    tables = _load_tables(store, source, mapping, other_keys)

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        for number, location, record in store.iter_records(start, stop):
            yield SourceRow(number + 1, location, UnjoinedRecord(record, tables), source.stem)

    return _count_unused(RowReader(store.count(RECORDS), iter_range), tables, other_keys)


def join_files(reader: RowReader, source: Path, mapping: RecordMapping) -> RowReader:
    """Join the tables of other files to the rows of a reader.

    Raises:
        UserError: A file is not readable, or a table is not valid.
    """
    other_keys = Counter(reader.other_keys)
    tables = _load_tables(RowStore(), source, mapping, other_keys)

    def iter_range(start: int, stop: int) -> Iterator[SourceRow]:
        for row in reader.iter_range(start, stop):
            yield replace(row, record=UnjoinedRecord(row.record, tables))

    return _count_unused(replace(reader, iter_range=iter_range), tables, other_keys)


def _count_unused(reader: RowReader, tables: JoinedTables, other_keys: Counter[str]) -> RowReader:
    """Join all records once to count the unused rows of tables."""
    is_complete = reader.num_rows > 0
    for row in reader.iter_range(0, reader.num_rows):
        try:
            tables.join(row.record)
        except InvalidRowError:  # raised again when the record is read
            is_complete = False
    counts: list[str] = []
    for name in tables.tables:
        counts.append(f"{name} ({format_count(tables.store.count(name), 'row')})")
    note = f"joined tables {', '.join(counts)}"
    return replace(
        reader,
        text_format=f"{reader.text_format}; {note}" if reader.text_format else note,
        other_keys=other_keys + tables.count_unused(is_complete=is_complete),
    )


def _load_tables(
    store: RowStore, source: Path, mapping: RecordMapping, other_keys: Counter[str]
) -> JoinedTables:
    """Load the tables of other files. The store has those of the document with the records."""
    documents: dict[Path, dict[str, Rows]] = {}
    for name, table in mapping.tables.items():
        if table.file is None:
            continue
        path = _resolve_file(source, table.file)
        if table.source is None:
            reader = open_row_file(path)
            other_keys.update(reader.other_keys)
            store.add(_iter_file_rows(reader, path, name, table))
        else:
            documents.setdefault(path, {})[name] = table.source
    for path, lists in documents.items():
        other_keys.update(_add_document(store, path, lists, mapping))
    store.build_index()
    for name, table in mapping.tables.items():
        repeated = store.find_repeated(name) if table.group is None else None
        if repeated is not None:
            key, locations = repeated
            raise UserError(
                f"{' and '.join(locations)} have the same {table.key_path.text} {key[:60]!r}",
                where=f"the table {name} of the mapping",
                expected="a single row for each key",
                remedy="correct the rows, or give group instead of key for a list of rows",
            )
    classes: tuple[str, ...] = ()
    if isinstance(mapping.classes, TableClasses):
        classes = _read_classes(store, mapping.classes)
    find_row = lru_cache(MAX_CACHED_KEYS)(store.find)
    return JoinedTables(mapping.tables, store, find_row, bytearray(store.count_all() + 1), classes)


def _read_classes(store: RowStore, classes: TableClasses) -> tuple[str, ...]:
    """Return the class names of a table, each of them once."""
    names: dict[str, None] = {}
    for location, record in store.iter_rows(classes.table):
        try:
            value = find_value(Scope(record, location), classes.value.steps, classes.value)
            names[to_text(value, f"class name {classes.value.text} of {location}")] = None
        except InvalidRowError as error:
            error.where = f"the table {classes.table} of the mapping"
            error.remedy = "add it to the row, or correct value under classes of the mapping"
            raise
    return tuple(names)


def _resolve_file(source: Path, file: str) -> Path:
    """Return the path of the file of a table. Raises UserError if it is outside of the folder."""
    folder = source if source.is_dir() else source.parent
    path = folder / file
    real_folder = Path(os.path.realpath(folder))
    if not Path(os.path.realpath(path)).is_relative_to(real_folder):
        raise UserError(
            "a link to a file outside of the folder of the data file",
            where=str(path),
            expected=f"a file in {folder}",
            remedy="copy the file into the folder",
        )
    return path


def _iter_file_rows(
    reader: RowReader, path: Path, name: str, table: JoinedTable
) -> Iterator[StoredRow]:
    """Yield the rows of a row file as rows of a table."""
    for row in reader.iter_range(0, reader.num_rows):
        location = f"{path}, {row.location}"
        key = _read_key(row.record, table, location)
        try:
            content = json.dumps(row.record, ensure_ascii=False, default=_write_value)
            content.encode()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a value that a joined row cannot have: {error}",
                where=location,
                expected="texts and numbers",
                remedy="give the file with embedded images as the data file, and the other one as"
                " the table",
            ) from error
        yield StoredRow(name, key, location, content)


def _write_value(value: object) -> str:
    """Return a value that JSON does not have as text, such as a date."""
    if isinstance(value, bytes):
        raise TypeError(f"{len(value)} bytes")
    return str(value)


def reject_compressed(path: Path) -> None:
    """Raise UserError for a compressed document, which is not unpacked while it is read."""
    if path.suffix.lower() == ".gz":
        raise UserError(
            "a compressed document, in which the mapping names lists",
            where=str(path),
            expected="a JSON document that is not compressed",
            remedy="unpack it by gunzip, and name the unpacked file instead",
        )


def _add_document(
    store: RowStore, path: Path, lists: Mapping[str, Rows], mapping: RecordMapping
) -> Counter[str]:
    """Add the items of lists in a document.

    Returns the counts of its other keys.
    """
    reject_compressed(path)
    other_keys: Counter[str] = Counter()
    with open_data_file(path) as file:
        stream = JsonStream(file, path)
        store.add(_iter_items(stream, path, lists, mapping))
    suffix = "" if RECORDS in lists else f" {path.name}"
    for key, count in stream.unused_keys.items():
        other_keys[f"{key} of the document{suffix}"] = count
    for name in stream.named_lists:
        rows = lists[name]
        if rows.key is None:
            note = f"keys of the objects at {rows.path.text}, not imported"
            other_keys[note] = store.count(name)
    return other_keys


def _iter_items(
    stream: JsonStream, path: Path, lists: Mapping[str, Rows], mapping: RecordMapping
) -> Iterator[StoredRow]:
    """Yield the items of lists in a document as rows of the store."""
    num_records = 0
    paths = {name: rows.path for name, rows in lists.items()}
    for name, item, text in stream.iter_items(paths):
        try:
            record = read_record(item, lists[name])
        except InvalidRowError as error:
            error.where = str(path)
            raise
        content = text if record is item.value else json.dumps(record)
        key: str | int = num_records
        if name == RECORDS:
            num_records += 1
        else:
            key = _read_key(record, mapping.tables[name], f"{path}, {item.location}")
        yield StoredRow(name, key, item.location, content)


def _read_key(record: Record, table: JoinedTable, location: str) -> str:
    """Return the key of a row of a table. Raises InvalidRowError if it has none."""
    path = table.key_path
    role = "key" if table.group is None else "group"
    try:
        return check_key(find_value(Scope(record, ""), path.steps, path), path, role)
    except InvalidRowError as error:
        error.where = location
        # The path cannot be optional, unlike other paths.
        error.remedy = f"add it to the row, or correct {role} of the table in the mapping"
        raise
