"""Presets: mapping files of formats and public data sets, in the folder `presets`."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finesight.errors import UserError
from finesight.files.bounded_files import load_yaml, parse_unique_json
from finesight.files.storage import temporary_folder
from finesight.ingest.folder_listing import is_json_file
from finesight.ingest.formats.dataset_format import ImportContext
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.import_source import NUM_DETECTION_ROWS, ImportOptions, open_table_folder
from finesight.ingest.mapped_rows import read_mapped_row
from finesight.ingest.mapping import RecordMapping, parse_mapping
from finesight.ingest.mapping_format import MappingFormat, build_mapping_format
from finesight.ingest.record_files import read_preview_records
from finesight.ingest.record_values import RecordValues, Scope, parse_texts, read_record
from finesight.ingest.row_reader import SNIFF_BYTES, Record, SourceRow, get_row_suffix
from finesight.samples.image_file import CorruptImageError
from finesight.samples.line_index import MAX_LINE_BYTES, UTF8_BOM, open_data_file
from finesight.samples.sample import InvalidRowError, read_data_file

PRESETS_FOLDER = "presets"

NUM_READ_RECORDS = 5
"""Number of records of which a preset must account for all values."""

PRESET_SUFFIXES = (".json", ".jsonl", ".parquet")
"""Suffixes of files of public data sets; columns of other tables have names of their own."""


@functools.cache
def load_presets() -> dict[str, RecordMapping]:
    """Load all presets by their names, which are those of their files."""
    folder = importlib.resources.files("finesight.ingest") / PRESETS_FOLDER
    presets: dict[str, RecordMapping] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            content = load_yaml(file.read_text(encoding="utf-8"))
            presets[name] = parse_mapping(content, f"preset {name}")
    return presets


def with_preset(path: Path, options: ImportOptions) -> ImportOptions:
    """Return options with the preset that matches a file, if they name neither format nor roles."""
    first_file = options.row_files[0] if options.row_files else path
    if not options.is_detected or not first_file.exists():
        return options
    found = find_preset(first_file)
    return options if found is None else replace(options, mapping=found)


def find_preset(path: Path) -> MappingFormat | None:
    """Return the preset that matches the records of a file or a folder; None without one."""
    is_object = is_json_file(path, b"{") and path.suffix.lower() == ".json"
    if is_object and not _has_json_lines(path):
        return _find_document_preset(path)
    if not path.is_dir() and get_row_suffix(path) not in PRESET_SUFFIXES:
        return None
    if path.is_file() and path.suffix.lower() == ".jsonl" and _is_single_object(path):
        document_preset = _find_document_preset(path)  # HierText
        if document_preset is not None:
            return document_preset
    folder = path if path.is_dir() else path.parent
    try:
        records = read_preview_records(path, NUM_DETECTION_ROWS)
        if path.is_dir() and not records:
            records = _read_table_folder(path)
    except UserError:
        return None  # reported when the source is opened
    for name, mapping in load_presets().items():
        if mapping.rows is None and matches(mapping, records, folder):
            return build_mapping_format(mapping, name, is_preset=True)
    return None


def _has_json_lines(path: Path) -> bool:
    """Return whether each of the first two lines of a file is an object, as in JSON Lines."""
    with open_data_file(path) as file:
        first = file.readline(MAX_LINE_BYTES).strip()
        second = file.readline(SNIFF_BYTES).lstrip()
    return first.endswith(b"}") and second.startswith(b"{")


def _is_single_object(path: Path) -> bool:
    """Return whether a file is an object in one line. The line may be long."""
    with open_data_file(path) as file:
        if not file.readline(SNIFF_BYTES).removeprefix(UTF8_BOM).lstrip().startswith(b"{"):
            return False
        file.seek(0)
        while block := file.readline(MAX_LINE_BYTES):
            if block.endswith(b"\n"):
                break
        return not file.read(SNIFF_BYTES).strip()


def _read_table_folder(folder: Path) -> list[Record]:
    """Return the first records of an ImageFolder; none of another folder."""
    records: list[Record] = []
    rows = open_table_folder(folder)
    if rows is not None:
        for row in rows.iter_range(0, NUM_DETECTION_ROWS):
            records.append(row.record)
    return records


def _find_document_preset(path: Path) -> MappingFormat | None:
    """Return the preset that matches a JSON document, which is parsed only if it has its keys."""
    content = read_data_file(path)
    candidates: dict[str, RecordMapping] = {}
    for name, mapping in load_presets().items():
        if mapping.rows is not None and mapping.match is not None:
            keys: list[str] = []
            for key_path in mapping.match.keys:
                keys += [step.key for step in key_path.steps if not step.is_each]
            if all(json.dumps(key).encode() in content for key in keys if not key.isdecimal()):
                candidates[name] = mapping
    if not candidates:
        return None
    try:
        document = parse_unique_json(content)
    except ValueError:
        return None  # JSON Lines or invalid: the row reader reports it
    for name, mapping in candidates.items():
        if matches(mapping, _list_records(mapping, document), path.parent):
            return build_mapping_format(mapping, name, is_preset=True)
    return None


def _list_records(mapping: RecordMapping, document: Any) -> list[Record]:
    """Return the first records of a document at the path of a preset."""
    assert mapping.rows is not None, "checked by the caller"
    values = RecordValues(Scope(document, ""))
    try:
        items = values.list_items(mapping.rows.path, values.root)
        return [read_record(item, mapping.rows) for item in items[:NUM_DETECTION_ROWS]]
    except InvalidRowError:
        return []


def matches(mapping: RecordMapping, records: Sequence[Record], image_folder: Path) -> bool:
    """Return whether all records have the signature of a preset, and no further keys.

    The first records must also have no value without a role, at any depth.
    """
    signature = mapping.match
    if signature is None or not records:
        return False
    known = {path.steps[0].key for path in signature.keys} | set(signature.optional)
    if mapping.rows is not None and mapping.rows.key is not None:
        known.add(mapping.rows.key)
    for record in records:
        if not known.issuperset(map(str, record)):
            return False
        try:
            parsed = parse_texts(record, mapping.list_parse_paths())
            values = RecordValues(Scope(parsed, ""))
            for path in signature.keys:
                values.read(path, values.root, "match")
        except UserError:
            return False
    with temporary_folder("preset") as folder:
        images = ImageResolver(image_folder, folder, validate=False)
        for number, record in enumerate(records[:NUM_READ_RECORDS], start=1):
            row = SourceRow(number, f"row {number}", record, "preset")
            context = ImportContext(images, prompt="", lenient=True)
            try:
                unused = read_mapped_row(row, context, mapping).unused
            except CorruptImageError:
                continue  # a missing image says nothing about the keys
            except UserError:
                return False
            if unused:
                return False
    return True
