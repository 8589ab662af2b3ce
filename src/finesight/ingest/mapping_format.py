"""A mapping as a dataset format, so that an import reads records by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from finesight.errors import UserError
from finesight.ingest.field_path import FieldPath, PathStep
from finesight.ingest.formats.dataset_format import (
    DatasetFormat,
    ImportContext,
    ImportExample,
)
from finesight.ingest.joined_tables import (
    RECORDS,
    join_files,
    open_joined_records,
    reject_compressed,
)
from finesight.ingest.json_stream import JsonStream
from finesight.ingest.mapped_rows import parse_mapped_row
from finesight.ingest.mapping import (
    GROUPED_ROWS,
    Elements,
    JoinedTable,
    Lookup,
    MappingSection,
    RecordMapping,
    Value,
    load_mapping,
)
from finesight.ingest.record_values import (
    GroupedRows,
    Scope,
    list_item_steps,
    read_group,
    read_record,
)
from finesight.ingest.row_reader import RowReader, SourceRow, rows_from_items
from finesight.samples.line_index import open_data_file
from finesight.samples.sample import InvalidRowError


@dataclass(frozen=True)
class MappingFormat(DatasetFormat):
    """A dataset format that reads records by a mapping."""

    mapping: RecordMapping = field(kw_only=True)


def build_mapping_format(
    mapping: RecordMapping, name: str, *, is_preset: bool = False
) -> MappingFormat:
    """Build a dataset format that reads records by a mapping.

    Args:
        is_preset: Whether the keys of the records select the mapping, and not the user.
    """
    parse_row = partial(parse_mapped_row, mapping=mapping)
    if is_preset:
        parse_row = partial(_parse_preset_row, mapping=mapping, name=name)
    return MappingFormat(
        name=name,
        mapping=mapping,
        is_preset=is_preset,
        description=f"records with the keys of the mapping {name}",
        parse_row=parse_row,
        open_requested=partial(open_document, mapping=mapping),
        group_rows=_find_grouping(mapping),
        supported_options=frozenset({"prompt", "box_task"}),
        reads_raw_rows=True,
        states_split=mapping.split is not None,
        named_keys=list_columns(mapping),
    )


Steps = tuple[PathStep, ...]


def list_columns(mapping: RecordMapping) -> frozenset[str]:
    """Return the keys of a record that a mapping names: the columns of a table.

    The keys of a group are those of its rows. Keys inside of a column are none of a record.
    """
    columns: set[str] = set()
    for steps in _iter_steps(mapping, ()):
        if mapping.group is not None and steps[:1] and steps[0].key == GROUPED_ROWS:
            steps = steps[2:]
        columns.update(step.key for step in steps[:1] if not step.is_each)
    return frozenset(columns)


def _iter_steps(section: object, start: Steps) -> Iterator[Steps]:
    """Yield the steps from the record to each value of a section of a mapping.

    Args:
        start: Steps from the record to the value in which the paths of the section start.
    """
    if isinstance(section, FieldPath):
        yield section.steps if section.from_root else (*start, *section.steps)
    elif isinstance(section, JoinedTable):
        yield section.by.steps  # the other paths start at the rows of the table
    elif isinstance(section, MappingSection):
        if isinstance(section, Value):
            for template_field in section.template_fields().values():
                yield from _iter_steps(template_field.path, start)
        for name, inner in section:
            yield from _iter_steps(inner, _find_start(section, name, start))
    elif isinstance(section, tuple | dict):
        for inner in section.values() if isinstance(section, dict) else section:
            yield from _iter_steps(inner, start)


def _find_start(section: MappingSection, name: str, start: Steps) -> Steps:
    """Return the steps to the value in which a key of a section starts: an item of its list."""
    lists: list[FieldPath | None] = []
    if isinstance(section, RecordMapping) and name not in ("sample", "ignore", "split", "group"):
        sample = section.sample or Elements()
        lists = [sample.each, *(sample.zip or {}).values()]
    elif isinstance(section, Elements) and name not in ("each", "zip"):
        lists = [section.each, *(section.zip or {}).values()]
    elif isinstance(section, Lookup) and name != "list":
        lists = [section.list]
    for path in filter(None, lists):
        return (*(() if path.from_root else start), *list_item_steps(path))
    return start


def _find_grouping(mapping: RecordMapping) -> Callable[[RowReader, Path], RowReader] | None:
    """Return the function that groups rows or joins other files to them."""
    if mapping.group is not None:
        return partial(group_rows, path=mapping.group)
    if mapping.tables and mapping.rows is None:
        return partial(join_files, mapping=mapping)
    return None


def _parse_preset_row(
    row: SourceRow, context: ImportContext, mapping: RecordMapping, name: str
) -> list[ImportExample]:
    """Build the samples of a record; the remedy of an error names the preset."""
    try:
        return parse_mapped_row(row, context, mapping)
    except UserError as error:
        error.remedy = f"{error.remedy} (the keys match the preset {name}; to read the rows"
        error.remedy += " otherwise, give --format, --map or --mapping)"
        raise


def group_rows(reader: RowReader, _: Path, path: FieldPath) -> RowReader:
    """Group rows with the same value at a path to one row.

    Groups have the order of their first rows. All rows are held in memory. A row without the
    value is a group of its own: reading it is an error, so that an import may skip it.
    """
    groups: dict[str | int, list[SourceRow]] = {}
    for row in reader.iter_range(0, reader.num_rows):
        key: str | int = row.number
        with suppress(InvalidRowError):
            key = read_group(row.record, path)
        groups.setdefault(key, []).append(row)

    def make_row(_number: int, rows: list[SourceRow]) -> SourceRow:
        first = rows[0]
        location = first.location
        if len(rows) > 1:
            location = f"{location} with {len(rows) - 1} more"
        records = GroupedRows(row.record for row in rows)
        return replace(first, location=location, record={GROUPED_ROWS: records})

    note = f"{reader.num_rows} rows in {len(groups)} groups by {path.text}"
    text_format = f"{reader.text_format}; {note}" if reader.text_format else note
    grouped = rows_from_items(list(groups.values()), make_row, text_format)
    return replace(grouped, other_keys=reader.other_keys)


def open_document(source: Path, mapping: RecordMapping) -> tuple[RowReader, str] | None:
    """Open the records inside of a JSON document; None without `rows` in the mapping.

    Raises:
        UserError: The file is no JSON document, or has no list or object of records there.
    """
    rows = mapping.rows
    if rows is None:
        return None
    reason = f"records at {rows.path.text}"
    if source.is_dir():
        raise UserError(
            f"the mapping names {rows.path.text} of one document as rows",
            where=str(source),
            expected="a JSON file",
            remedy=f"give the file; for samples from each file of the folder, write sample:"
            f" {rows.path.text} instead of rows",
        )
    if mapping.tables:
        return open_joined_records(source, mapping), reason
    reject_compressed(source)
    with open_data_file(source) as file:
        stream = JsonStream(file, source)
        items = [item.scope for item in stream.iter_items({RECORDS: rows.path})]
    others: Counter[str] = Counter()
    for key, count in stream.unused_keys.items():
        others[f"{key} of the document"] = count
    if stream.named_lists and rows.key is None:
        others[f"keys of the objects at {rows.path.text}, not imported"] = len(items)

    def make_row(number: int, item: Scope) -> SourceRow:
        return SourceRow(number, item.location, read_record(item, rows), source.stem)

    reader = rows_from_items(items, make_row)
    return replace(reader, other_keys=others), reason


def load_mapping_format(path: Path) -> MappingFormat:
    """Load a mapping file as a dataset format. Raises UserError for an invalid file."""
    return build_mapping_format(load_mapping(path), str(path))
