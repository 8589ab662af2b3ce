"""Draft of a mapping file for data whose roles are not known: all paths with an example."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finesight.errors import escape_unprintable, shorten
from finesight.files.storage import has_content, write_new_file
from finesight.ingest.field_path import EACH, format_key, join_location, quote_text
from finesight.ingest.formats.dataset_format import IMAGE_KEYS, VIDEO_KEYS, as_list
from finesight.ingest.formats.row_keys import UnfoundMediaError
from finesight.ingest.formats.table import (
    MEDIA_ROLES,
    UnknownRolesError,
    list_names,
    suggest_columns,
)
from finesight.ingest.import_source import (
    DetectedColumns,
    ImportOptions,
    detect_columns,
    find_only_table,
    find_table,
)
from finesight.ingest.mapping import MAPPING_VERSION
from finesight.ingest.name_template import TemplateSearch
from finesight.ingest.presets import with_preset
from finesight.ingest.record_files import open_record_files
from finesight.ingest.role_choices import add_folder, format_mapping, mark_optional
from finesight.ingest.role_proposal import RoleProposal, UnassignedKeysError
from finesight.ingest.row_reader import Record, RowReader, UnknownRowsError, open_row_file
from finesight.samples.image_file import is_image_value
from finesight.samples.sample import is_video_path

MAX_EXAMPLE_CHARS = 60
"""Maximum length of an example value in a draft."""

NUM_DRAFT_RECORDS = 100
"""Number of records of which a draft lists the keys."""

NUM_SEARCHED_RECORDS = 20
"""Number of records whose values must have a file each for a template of a draft."""

TURN_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Keys of role and text of a turn, by the key of the turns of a conversation."""

ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Role of a message by its name in a conversation."""

TEXT_KEYS = {
    "question": ("prompt", "question", "query", "instruction"),
    "answer": ("chosen", "completion", "response", "answer", "output"),
    "rejected": ("rejected", "rejected_response"),
}
"""Keys of the texts of a row, by their role."""

HEADER = """\
# Give each path below a role, or add it to meta (kept) or ignore (left out).
# Roles: images, videos, question, choices, answer, answers, fields, rejected, verdict, boxes,
# points, classes, messages, tools, calls, system, split, id. For a list of which each item becomes
# a sample, give sample, and begin paths of the record with $. (page Mapping files).
version: 1
"""


def detect_roles(
    path: Path,
    options: ImportOptions,
    out: Path,
    ask_question: Callable[[list[str]], str] | None = None,
) -> DetectedColumns:
    """Find the preset or the column roles of a source.

    Args:
        out: Folder of the import, beside which a draft is written if roles are not known.
        ask_question: See `detect_columns`.

    Raises:
        UnknownRolesError: The roles are not known. The remedy names the draft of a mapping.
    """
    options = with_preset(path, options)
    table = find_only_table(path) if options.is_detected and path.is_dir() else None
    if table is not None:
        table_options = with_preset(table, options)
        if table_options.mapping is not None:
            return DetectedColumns(table, table_options)
    if not options.is_detected or options.row_files:
        return DetectedColumns(find_table(path, options), options)
    try:
        return detect_columns(path, options, ask_question)
    except UnknownRowsError as error:
        if error.rows_key:
            records = error.records[:NUM_DRAFT_RECORDS]
            folder = _get_folder(_find_source(path))
            draft = write_draft(RoleProposal(records, {}), out, folder, error.rows_key)
            error.remedy = f"{error.remedy}; the draft {draft} lists the keys of the rows"
        raise
    except UnknownRolesError as error:
        _propose_draft(error, path, options, out)
        raise


def check_proposal(
    detected: DetectedColumns, out: Path, *, fields_are_chosen: bool = False
) -> None:
    """Raise UnassignedKeysError if guessed roles are not certain. The remedy names a draft.

    Args:
        out: Folder of the import, beside which the draft is written.
        fields_are_chosen: The user wants all columns as fields of the answer.
    """
    if detected.proposal is None:
        return
    try:
        if fields_are_chosen:
            detected.proposal.check_unused(str(detected.path))
        else:
            detected.proposal.check_columns(str(detected.path))
    except UnknownRolesError as error:
        _propose_draft(error, detected.path, detected.options, out)
        raise


def _propose_draft(error: UnknownRolesError, path: Path, options: ImportOptions, out: Path) -> None:
    """Write the draft of a mapping, and name it in the remedy of an error."""
    proposal = error.proposal if isinstance(error, UnassignedKeysError) else None
    source = _find_source(path)
    if proposal is None:
        reader: RowReader | None = None
        if source.is_dir():
            reader = open_record_files(source)
        elif source.is_file():
            reader = open_row_file(source, options.encoding, no_header=options.no_header)
        if reader is None:
            return
        rows = reader.iter_range(0, min(reader.num_rows, NUM_DRAFT_RECORDS))
        records = [row.record for row in rows]
        columns: dict[str, str] = {}
        if not all(map(str.isdecimal, records[0])):  # names, which suggest a role
            columns = suggest_columns(records)
        proposal = RoleProposal(records, columns)
    draft = write_draft(proposal, out, _get_folder(source))
    edit = f"edit {draft}, which lists all keys, and give --mapping {draft}"
    error.remedy = f"{error.remedy}; or {edit}"


def _find_source(path: Path) -> Path:
    """Return the only table of a folder without objects of images; other sources unchanged."""
    if path.is_dir() and open_record_files(path) is None:
        return find_only_table(path) or path
    return path


def _get_folder(source: Path) -> Path:
    """Return the folder in which the paths of a source start."""
    if source.is_dir():
        return source
    return source.parent


@contextmanager
def draft_of_unfound_media(path: Path, options: ImportOptions, out: Path) -> Iterator[None]:
    """Write a mapping for rows with the number of an image.

    The remedy of the error names it.
    """
    try:
        yield
    except UnfoundMediaError as error:
        record: Record = {}
        if path.is_file():
            (row,) = options.open_file(path).iter_range(0, 1)
            record = row.record
        mapping = _build_row_mapping(record, error.key)
        if mapping is not None:
            draft = _write_beside(out, format_mapping(mapping))
            error.remedy = (
                f"write the folder of the images instead of FOLDER in {draft}, and give --mapping"
                f" {draft}; or remove the key to train on the text alone"
            )
        raise


def _build_row_mapping(record: Record, media_key: str) -> dict[str, Any] | None:
    """Return the mapping of a conversation, or of a question with its answer.

    Other keys have no role: the import asks for them. Other rows have None.
    """
    mapping: dict[str, Any] = {"version": MAPPING_VERSION}
    mapping["images"] = {"template": f"FOLDER/{{{format_key(media_key)}}}.jpg"}
    for key, (role, content) in TURN_KEYS.items():
        turns = record.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            names = {"path": role, "values": ROLE_NAMES}
            mapping["messages"] = {"each": key, "role": names, "content": content}
            break
    else:
        for role, keys in TEXT_KEYS.items():
            found = next((key for key in keys if isinstance(record.get(key), str)), None)
            if found is not None:
                mapping[role] = found
    has_text = bool(mapping.keys() & {"messages", "answer"})
    if media_key not in record or not has_text or record.keys() & {*IMAGE_KEYS, *VIDEO_KEYS}:
        return None
    return mapping


def write_draft(proposal: RoleProposal, out: Path, folder: Path, rows: str = "") -> Path:
    """Write the draft of a mapping beside the folder of an import, and return its path.

    A file with other content is not changed: the draft gets another name.

    Args:
        folder: Folder of the data, in which files of images are searched.
        rows: Key of the records in a document; empty for rows of a file.
    """
    return _write_beside(out, format_draft(proposal, folder, rows))


def _write_beside(out: Path, text: str) -> Path:
    """Write a mapping beside the folder of an import, under a free name."""
    path = out.with_name(f"{out.name}-mapping.yaml")
    content = text.encode()
    number = 1
    while os.path.lexists(path) and not has_content(path, content):
        number += 1
        path = out.with_name(f"{out.name}-mapping-{number}.yaml")
    if not os.path.lexists(path):
        write_new_file(path, content)
    return path


def format_draft(proposal: RoleProposal, folder: Path, rows: str = "") -> str:
    """Format a mapping with the proposed roles; comments list all other paths with an example."""
    examples = list_examples(proposal.records)
    roles = _list_column_roles(proposal, examples)
    templates: dict[str, tuple[str, str]] = {}
    if not roles.keys() & {"images", "videos"}:
        templates = _find_templates(proposal.records, folder, roles)
    lines = [HEADER]
    if rows:
        lines.append(f"rows: {quote_text(format_key(rows))}\n")
    for role in ("images", "videos", "question", "answer"):
        if role in roles:
            value: object = roles[role]
            if proposal.image_folder is not None and role in ("images", "videos"):
                value = add_folder(list(map(str, as_list(value))), proposal.image_folder)
            lines.append(f"{role}: {quote_text(value)}\n")
        elif role in templates:
            path, template = templates[role]
            lines.append(f"{role}: {quote_text({'template': template})}\n")
            roles[role] = path
        elif role in ("question", "answer"):
            lines.append(f"{role}:\n")
    if "box" in proposal.columns:
        lines.append("# For boxes, see boxes and group on the page Mapping files.\n")
    repeated = _find_repeated_image(proposal.records, roles)
    if repeated is not None:
        example = f"group: {quote_text(repeated)}"
        lines.append(f"# Several rows have the same image. For one sample of them: {example},\n")
        lines.append("# and begin the other paths with rows.0. or rows.*.\n")
    lines.append("meta: []\nignore: []\n\n# Paths without a role, with an example:\n")
    lines += _list_unused(examples, roles)
    return "".join(lines)


def _list_unused(
    examples: Mapping[str, Any], roles: Mapping[str, str | list[str]]
) -> Iterator[str]:
    """Yield a comment for each path without a role, with an example."""
    used: list[str] = []
    for paths in roles.values():
        used += [str(path).removesuffix("?") for path in as_list(paths)]
    for location, value in examples.items():
        if location in used:
            continue
        text = json.dumps(value, ensure_ascii=False, default=str)
        example = shorten(escape_unprintable(text), MAX_EXAMPLE_CHARS)
        yield f"#   {location}: {example}\n"


def list_examples(records: Sequence[Record]) -> dict[str, Any]:
    """Return the first value at each path of records.

    Lists have the path `*`, and so have objects whose keys are identifiers.
    """
    examples: dict[str, Any] = {}
    for key in list_names(records):
        values = [record[key] for record in records if key in record]
        _add_examples(examples, values, format_key(key))
    return examples


def _list_column_roles(
    proposal: RoleProposal, examples: Mapping[str, Any]
) -> dict[str, str | list[str]]:
    """Return the paths of the proposed roles by role."""
    names = {"image": "images", "video": "videos"}
    roles: dict[str, str | list[str]] = {}
    for role, column in proposal.columns.items():
        paths = [format_key(name) for name in column.split(",")]
        if role not in (*MEDIA_ROLES, "question", "answer") or "box" in proposal.columns:
            continue
        if any(path not in examples for path in paths):
            continue
        if len(paths) == 1:
            path = paths[0]
            if role == "question":
                path = mark_optional(path, proposal.records)
            roles[names.get(role, role)] = path
        elif role in MEDIA_ROLES:
            roles[names.get(role, role)] = paths
    for location, value in examples.items():
        if not roles.keys() & {"images", "videos"} and is_image_value(value):
            roles["images"] = location
    return roles


def _find_templates(
    records: Sequence[Record], folder: Path, roles: Mapping[str, str | list[str]]
) -> dict[str, tuple[str, str]]:
    """Return the column whose values stand for files, and their template, by role.

    Nothing is returned for several such columns. Columns with a role are not searched.
    """
    search = TemplateSearch(folder)
    used = set(itertools.chain.from_iterable(map(as_list, roles.values())))
    found: list[dict[str, tuple[str, str]]] = []
    for key in records[0]:
        if format_key(str(key)) in used:
            continue
        values = [record.get(key) for record in records[:NUM_SEARCHED_RECORDS]]
        are_names = all(type(value) in (str, int) for value in values)
        if not are_names or not re.fullmatch(r"[\w .-]+", str(key)):
            continue
        template = search.find([str(value) for value in values])
        if template is not None:
            path = format_key(str(key))
            role = "videos" if is_video_path(template.after) else "images"
            found.append({role: (path, template.format(path))})
    return found[0] if len(found) == 1 else {}


def _find_repeated_image(
    records: Sequence[Record], roles: Mapping[str, str | list[str]]
) -> str | None:
    """Return the path of the image if several records name the same file, as rows of boxes do."""
    path = roles.get("images")
    names: list[str] = []
    for record in records:
        for key, value in record.items():
            if format_key(str(key)) == path and isinstance(value, str):
                names.append(value)
    return str(path) if len(set(names)) < len(names) else None


def _add_examples(examples: dict[str, Any], values: Sequence[Any], location: str) -> None:
    """Add the first value at each path inside of values that have the same location."""
    objects: list[dict[str, Any]] = []
    items: list[Any] = []
    for value in values:
        if isinstance(value, dict) and not is_image_value(value):
            objects.append(value)
        elif isinstance(value, list | tuple):
            items += value
        else:
            examples.setdefault(location, value)
    if _has_identifiers(objects):
        for one in objects:
            items += one.values()
        objects = []
    for key in list_names(objects):
        inner = [one[key] for one in objects if key in one]
        _add_examples(examples, inner, join_location(location, key))
    if items:
        _add_examples(examples, items, f"{location}.{EACH}")


def _has_identifiers(objects: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the keys of objects are identifiers of other objects.

    No key occurs twice, and all their objects have a key in common. Keys of a single object without
    digits are names, such as question and answer.
    """
    keys: list[str] = []
    common: set[str] | None = None
    for one in objects:
        keys += map(str, one)
        for value in one.values():
            if not isinstance(value, dict) or is_image_value(value):
                return False
            common = {*value} if common is None else common & value.keys()
    if len(objects) == 1 and not all(map(re.compile("[0-9]").search, keys)):
        return False
    return len(keys) > 1 and len({*keys}) == len(keys) and bool(common)
