"""Preview of an import: roles of the keys and the first samples, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finesight.errors import UserError
from finesight.ingest.explanation import format_value
from finesight.ingest.formats.dataset_format import ImportContext
from finesight.ingest.import_source import ImportOptions, ImportSource, detect_columns, open_source
from finesight.ingest.mapped_rows import generalize_location, read_mapped_row
from finesight.ingest.mapping_draft import list_examples
from finesight.ingest.mapping_format import MappingFormat
from finesight.ingest.presets import with_preset
from finesight.ingest.record_files import read_preview_records
from finesight.ingest.role_proposal import UnassignedKeysError
from finesight.ingest.row_reader import Record, SourceRow
from finesight.samples.sample import Sample

MAX_READ_ROWS = 100
"""Number of rows of which the first samples are shown; rows without a sample are skipped."""

MAX_KEYS = 200
"""Maximum number of keys of a preview."""


@dataclass(frozen=True, slots=True)
class KeyRole:
    """Path in the records with its role and an example."""

    path: str
    role: str
    example: str


@dataclass(frozen=True, slots=True)
class ImportPreview:
    """What an import would write.

    Attributes:
        format: Name of the format with the reason of its detection; empty if it is not known.
        num_rows: Number of rows; 0 if they could not be opened.
        keys: Paths of the records with their roles; empty for folders and formats of turns.
        samples: First samples with absolute paths of images.
        problem: Error of the import, or of the first row without a sample.
        is_blocked: Whether the import fails with this error.
    """

    format: str
    num_rows: int
    keys: tuple[KeyRole, ...] = ()
    samples: tuple[Sample, ...] = ()
    problem: UserError | None = None
    is_blocked: bool = False


def preview_import(
    path: Path,
    options: ImportOptions,
    folder: Path,
    count: int = 5,
    *,
    wants_fields: bool = False,
) -> ImportPreview:
    """Read the first samples of a source without writing a data set.

    Args:
        folder: Existing folder for embedded images, which the samples name.
        count: Maximum number of samples.
        wants_fields: The user has chosen a task whose answer has all columns of text.

    Raises:
        UserError: The source cannot be read at all.
    """
    options = with_preset(path, options)
    proposal = None
    problem: UserError | None = None
    if options.is_detected and not options.row_files:
        try:
            detected = detect_columns(path, options)
            path = detected.path
            options = detected.options
            proposal = detected.proposal
            if proposal is not None and wants_fields:
                proposal = proposal.choose_fields()
                options = replace(options, columns=proposal.columns)
                proposal.check_unused(str(path))
            elif proposal is not None:
                proposal.check_columns(str(path))
        except UnassignedKeysError as error:
            problem = error
            proposal = error.proposal
            options = replace(options, ignorable_columns=None)  # samples without these columns
        except UserError as error:
            return _preview_keys(path, error)
    if problem is not None and not options.columns:
        assert proposal is not None, "set with the problem"
        return ImportPreview(
            "", 0, _list_keys(proposal.records, proposal.columns), (), problem, True
        )
    try:
        opened = open_source(path, options)
    except UserError as error:
        return _preview_keys(path, error)
    samples, row_error, keys = _read_samples(opened, options, folder, count)
    if not keys and opened.column_map:
        first = next(iter(opened.iter_rows()))
        records = [first.record] if proposal is None else proposal.records
        keys = _list_keys(records, opened.column_map)
    return ImportPreview(
        format=f"{opened.data_format.name} ({opened.detected_by})",
        num_rows=opened.row_bounds[1] - opened.row_bounds[0],
        keys=keys,
        samples=tuple(samples),
        problem=problem or row_error,
        is_blocked=problem is not None or not samples,
    )


def _preview_keys(path: Path, problem: UserError) -> ImportPreview:
    """Return the keys of records whose roles are not known. Raises the problem without records."""
    try:
        records = read_preview_records(path, MAX_READ_ROWS)
    except UserError:
        raise problem from None
    if not records:
        raise problem
    return ImportPreview("", 0, _list_keys(records, {}), problem=problem, is_blocked=True)


def _read_samples(
    opened: ImportSource, options: ImportOptions, folder: Path, count: int
) -> tuple[list[Sample], UserError | None, tuple[KeyRole, ...]]:
    """Read the first samples and the roles of a mapping."""
    context = opened.create_context(options, folder)
    samples: list[Sample] = []
    error: UserError | None = None
    keys: tuple[KeyRole, ...] = ()
    start, stop = opened.row_bounds
    for row in opened.rows.iter_range(start, min(stop, start + MAX_READ_ROWS)):
        if isinstance(opened.data_format, MappingFormat) and not keys:
            keys = _explain_mapping(row, context, opened.data_format)
        try:
            for example in opened.data_format.parse_examples(row, context):
                samples += example.to_train_samples()
        except UserError as found:
            found.where = found.where or f"{opened.path}, {row.location}"
            error = error or found
        if len(samples) >= count:
            break
    return samples[:count], error, keys


def _explain_mapping(
    row: SourceRow, context: ImportContext, data_format: MappingFormat
) -> tuple[KeyRole, ...]:
    """Return the roles of the values of a row in a mapping."""
    try:
        found = read_mapped_row(row, context, data_format.mapping)
    except UserError:
        return ()  # the row itself is reported
    keys: dict[str, KeyRole] = {}
    for reading in (*found.readings, *found.unused):
        path = generalize_location(reading.location)
        keys.setdefault(path, KeyRole(path, reading.role, format_value(reading.value)))
    return tuple(keys.values())[:MAX_KEYS]


def _list_keys(records: Sequence[Record], columns: Mapping[str, str]) -> tuple[KeyRole, ...]:
    """Return all paths of records with the role of their column."""
    roles: dict[str, str] = {}
    for role, column in columns.items():
        names = [column] if column in records[0] else column.split(",")
        roles.update(dict.fromkeys((name.strip() for name in names), role))
    keys: list[KeyRole] = []
    for path, value in list_examples(records).items():
        name = path.replace(".*", "")
        role = roles.get(name) or roles.get(name.partition(".")[0], "")
        keys.append(KeyRole(path, role, format_value(value)))
    return tuple(keys[:MAX_KEYS])
