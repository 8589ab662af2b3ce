"""First rows of a table of answers, for the page."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from finesight.errors import UserError, escape_unprintable, shorten
from finesight.evaluate.answer_tables import TABLE_COLUMNS, AnswerTable, build_table
from finesight.files.bounded_files import open_regular_file

MAX_PREVIEW_BYTES = 1 << 18
MAX_PREVIEW_ROWS = 5
MAX_PREVIEW_COLUMNS = 8
MAX_PREVIEW_CHARS = 160


def read_answer_preview(file: Path) -> AnswerTable | None:
    """Return the first answers of a JSONL file; None for other content.

    Rows have the name of the image and the fields of the answer, or the answer without fields.
    """
    records: list[dict[str, Any]] = []
    # The file may be that of another person.
    with contextlib.suppress(
        UserError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError
    ):
        with open_regular_file(file) as lines:
            content = lines.read(MAX_PREVIEW_BYTES)
        # The last line may be cut off.
        for line in content[: content.rfind(b"\n") + 1].splitlines()[:MAX_PREVIEW_ROWS]:
            records.append(json.loads(line))
        table = build_table(records)
        columns = [*range(len(TABLE_COLUMNS), len(table.header))][:MAX_PREVIEW_COLUMNS]
        if not columns:
            columns = [TABLE_COLUMNS.index("answer")]
        header = ["image", *(_shorten(table.header[number]) for number in columns)]
        rows: list[list[object]] = []
        for record, row in zip(records, table.rows, strict=True):
            name = Path(str(record.get("image") or record["id"])).name
            rows.append([_shorten(name), *(_shorten(row[number]) for number in columns)])
        return AnswerTable(header, rows) if rows else None
    return None


def _shorten(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape_unprintable(shorten(text, MAX_PREVIEW_CHARS))
