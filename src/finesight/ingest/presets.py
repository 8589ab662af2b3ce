"""Presets: mapping files of formats and public data sets, in the folder `presets`."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from finesight.bounded_files import load_yaml
from finesight.data.folder_listing import is_json_file
from finesight.data.import_source import NUM_DETECTION_ROWS, ImportOptions
from finesight.data.row_reader import Record, read_first_records
from finesight.data.sample import InvalidRowError
from finesight.errors import UserError
from finesight.ingest.mapping import Mapping, parse_mapping
from finesight.ingest.mapping_format import MappingFormat, build_mapping_format, read_document
from finesight.ingest.record_values import RecordValues, Scope, parse_texts

PRESETS_FOLDER = "presets"

PRESET_SUFFIXES = (".json", ".jsonl", ".parquet")
"""Suffixes of files of public data sets; columns of other tables have names of their own."""


@functools.cache
def load_presets() -> dict[str, Mapping]:
    """Load all presets by their names, which are those of their files."""
    folder = importlib.resources.files("finesight.ingest") / PRESETS_FOLDER
    presets: dict[str, Mapping] = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            content = load_yaml(file.read_text(encoding="utf-8"))
            presets[name] = parse_mapping(content, f"preset {name}")
    return presets


def with_preset(path: Path, options: ImportOptions) -> ImportOptions:
    """Return options with the preset that matches a file, if they name neither format nor roles."""
    first_file = options.row_files[0] if options.row_files else path
    if not options.is_detected or not first_file.is_file():
        return options
    found = find_preset(first_file)
    return options if found is None else replace(options, mapping=found)


def find_preset(path: Path) -> MappingFormat | None:
    """Return the preset that matches the records of a file; None without one."""
    if is_json_file(path, b"{") and path.suffix.lower() == ".json":
        try:
            document = read_document(path)
        except UserError:
            return None  # JSON Lines or invalid: the row reader reports it
        for name, mapping in load_presets().items():
            if mapping.rows is not None and matches(mapping, _list_records(mapping, document)):
                return build_mapping_format(mapping, name)
        return None
    if path.suffix.lower() not in PRESET_SUFFIXES:
        return None
    try:
        records = read_first_records(path, NUM_DETECTION_ROWS)
    except UserError:
        return None  # reported when the source is opened
    for name, mapping in load_presets().items():
        if mapping.rows is None and matches(mapping, records):
            return build_mapping_format(mapping, name)
    return None


def _list_records(mapping: Mapping, document: Any) -> list[Record]:
    """Return the first records of a document at the path of a preset."""
    assert mapping.rows is not None, "checked by the caller"
    values = RecordValues(Scope(document, ""))
    try:
        items = values.list_items(mapping.rows.path, values.root)
    except InvalidRowError:
        return []
    records: list[Record] = []
    for item in islice(items, NUM_DETECTION_ROWS):
        if not isinstance(item.value, dict):
            return []
        records.append(item.value)
    return records


def matches(mapping: Mapping, records: Sequence[Record]) -> bool:
    """Return whether all records have the signature of a preset, and no further keys."""
    signature = mapping.match
    if signature is None or not records:
        return False
    known = {path.steps[0].key for path in signature.keys} | set(signature.optional)
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
    return True
