"""Draft of a mapping file for data whose roles are not known: all paths with an example."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from finesight.data.formats.table import UnassignedKeysError
from finesight.data.image_file import is_image_value
from finesight.data.import_source import ImportOptions, detect_columns
from finesight.data.row_reader import Record
from finesight.errors import escape_unprintable, shorten
from finesight.ingest.field_path import EACH, join_location
from finesight.ingest.presets import with_preset
from finesight.storage import write_new_file

MAX_EXAMPLE_CHARS = 60
"""Maximum length of an example value in a draft."""

HEADER = """\
# Give each path below a role, or add it to meta (kept) or ignore (left out).
# Roles: images, videos, question, choices, answer, answers, fields, rejected, verdict, boxes,
# points, messages, system, id. See the page Mapping files of the documentation.
version: 1
"""


def detect_roles(
    path: Path,
    options: ImportOptions,
    out: Path,
    ask_question: Callable[[list[str]], str] | None = None,
) -> tuple[Path, ImportOptions]:
    """Return the file or folder to import, with the preset or the column roles of its records.

    Args:
        out: Folder of the import, beside which a draft is written if roles are not known.
        ask_question: See `detect_columns`.

    Raises:
        UnassignedKeysError: Texts inside of lists or objects have no role. The remedy names the
            draft of a mapping file.
    """
    options = with_preset(path, options)
    if not options.is_detected or options.row_files:
        return path, options
    try:
        return detect_columns(path, options, ask_question)
    except UnassignedKeysError as error:
        draft = write_draft(error.records, out)
        error.remedy = f"edit {draft}, which lists all keys, and give --mapping {draft}; or"
        error.remedy += " name the columns by --map, which leaves out all others"
        raise


def write_draft(records: Sequence[Record], out: Path) -> Path:
    """Write the draft of a mapping beside the folder of an import, and return its path.

    An existing file is not changed.
    """
    path = out.with_name(f"{out.name}-mapping.yaml")
    if not path.exists():
        write_new_file(path, format_draft(records).encode())
    return path


def format_draft(records: Sequence[Record]) -> str:
    """Format a mapping whose comments list the paths of all values with an example."""
    examples: dict[str, Any] = {}
    for record in records:
        for location, value in _iter_values(record, ""):
            examples.setdefault(location, value)
    lines = [HEADER]
    for location, value in examples.items():
        if is_image_value(value):
            lines.append(f"images: {json.dumps(location, ensure_ascii=False)}\n")
            del examples[location]
            break
    lines.append("question:\nanswer:\nmeta: []\nignore: []\n\n# Paths with an example:\n")
    for location, value in examples.items():
        text = json.dumps(value, ensure_ascii=False, default=str)
        example = shorten(escape_unprintable(text), MAX_EXAMPLE_CHARS)
        lines.append(f"#   {location}: {example}\n")
    return "".join(lines)


def _iter_values(value: Any, location: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each value that is no list or object; lists have the path `*`."""
    if isinstance(value, dict) and not is_image_value(value):
        for key, item in value.items():
            yield from _iter_values(item, join_location(location, key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _iter_values(item, f"{location}.{EACH}")
    else:
        yield location, value
