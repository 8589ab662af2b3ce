"""Tables of answers for spreadsheets: CSV, and Excel workbooks with thumbnails of the images.

Answers, field names and file names come from images and from a model, so a cell is never a formula.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.errors import UserError, escape_surrogates
from finesight.samples.image_file import CorruptImageError
from finesight.vision.image_processing import load_image

if TYPE_CHECKING:
    from finesight.infer.prediction import Prediction

TABLE_COLUMNS = ("id", "image", "prompt", "answer")
"""First columns of a table."""

CSV_FILE, JSONL_FILE, XLSX_FILE = "answers.csv", "answers.jsonl", "answers.xlsx"
ANSWER_FILES = (XLSX_FILE, CSV_FILE, JSONL_FILE)
"""Files in a folder of answers. The workbook needs the extra `xlsx`."""

TABLE_SUFFIXES = tuple(Path(name).suffix for name in ANSWER_FILES)

MAX_FIELDS = 100
"""Maximum number of columns for fields: the most frequent ones."""

MAX_SHEET_ROWS = (1 << 20) - 1
"""Maximum number of answers in a sheet of Excel, below the header."""

MAX_CELL_CHARS = 32_767
MAX_EXACT_INTEGER = 10**15
"""Integers of more digits are texts in a workbook, since Excel would round them."""

MAX_THUMBNAILS = 5000
"""Maximum number of thumbnails in a workbook, about 50 MB."""

THUMBNAIL_SIDE = 120
THUMBNAIL_QUALITY = 80
POINTS_PER_PIXEL = 0.75

COLUMN_WIDTHS = {"thumbnail": 18, "id": 18, "image": 30, "prompt": 24, "answer": 48}
DEFAULT_WIDTH = 18

# Spreadsheets evaluate such texts, in some languages also after a full-width sign. Signed values
# are no formulas. Where lists have semicolons, a spreadsheet begins a cell after each semicolon of
# a text, and after each line break, since it does not know the quotes of the commas.
_FORMULA_START = re.compile(
    r"""
    (?: ^ | (?<=[;\t\r\n]) )
    (?= [\t\r] | "* (?: [=@\uff1d\uff0b\uff0d\uff20] | [+\-](?! [\d.,]* (?: [;\t\r\n] | $ ) ) ) )
    """,
    re.VERBOSE,
)
_INVALID_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_XML_ESCAPE = re.compile(r"_(?=x[0-9A-Fa-f]{4}_)")


@dataclass(frozen=True, slots=True)
class AnswerTable:
    """Header and rows of a table. A field of a JSON answer has a column of its own."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


def build_table(records: Sequence[Mapping[str, Any]]) -> AnswerTable:
    """Build the table of predictions, as `Prediction.as_json` returns them.

    The 100 most frequent fields of answers that are JSON objects are further columns.
    """
    from finesight.samples.boxes import iter_json_values

    fields: list[dict[str, Any]] = []
    for record in records:
        values = [found.value for found in iter_json_values(record["answer"])]
        if len(values) == 1 and isinstance(values[0], dict):
            fields.append(values[0])
        else:
            fields.append({})
    names = [name for name, _ in Counter(chain(*fields)).most_common(MAX_FIELDS)]
    header = [*TABLE_COLUMNS]
    for name in names:
        header.append(f"answer.{name}" if name in TABLE_COLUMNS else name)
    rows: list[Sequence[object]] = []
    for record, own in zip(records, fields, strict=True):
        cells: list[object] = []
        for column in TABLE_COLUMNS:
            value = record.get(column)
            cells.append(", ".join(value) if isinstance(value, list) else value)
        rows.append((*cells, *map(own.get, names)))
    return AnswerTable(header, rows)


def format_csv(table: AnswerTable) -> str:
    """Format a table as CSV with a byte order mark and without formulas."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(map(_format_csv_cell, table.header))
    for row in table.rows:
        writer.writerow(map(_format_csv_cell, row))
    return escape_surrogates(f"\ufeff{stream.getvalue()}")


def _format_csv_cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value)
    text = str(value)
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    return _FORMULA_START.sub("'", text)


def can_write_workbooks() -> bool:
    """Return whether the package for Excel workbooks is installed."""
    return find_spec("openpyxl") is not None


def build_package_error(where: str) -> UserError:
    """Build the error of a workbook without the package that writes it."""
    return UserError(
        "an Excel workbook needs openpyxl, which is not installed",
        where=where,
        expected="the package openpyxl, of the extra xlsx",
        remedy="pip install 'finesight[xlsx]', or write a table with the suffix .csv",
    )


def format_workbook(
    table: AnswerTable,
    images: Sequence[Sequence[Path]],
    on_note: Callable[[str], object],
) -> bytes:
    """Format a table as an Excel workbook with thumbnails.

    Args:
        images: Images of each row, of which the first readable one is shown.
        on_note: Called with a sentence for what the workbook leaves out.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.drawing.image import Image as SheetImage
    from openpyxl.styles import Alignment, Font
    from openpyxl.utils import get_column_letter

    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("answers")
    sheet.freeze_panes = "B2"
    names = ("thumbnail", *table.header)
    for number, name in enumerate(names, 1):
        width = COLUMN_WIDTHS.get(name, DEFAULT_WIDTH)
        sheet.column_dimensions[get_column_letter(number)].width = width

    alignment = Alignment(vertical="top", wrap_text=True)

    def make_cell(value: object, *, is_header: bool = False) -> Any:
        content = _convert_cell(value)
        cell = WriteOnlyCell(sheet, content)
        cell.alignment = alignment
        if isinstance(content, str):
            # Otherwise openpyxl writes a text with an equals sign as a formula. The prefix
            # preserves the text when the cell is edited.
            cell.data_type = "s"
            cell.quotePrefix = True
        if is_header:
            cell.font = Font(bold=True)
        return cell

    sheet.append([make_cell(name, is_header=True) for name in names])
    num_thumbnails = 0
    for number, row in enumerate(table.rows[:MAX_SHEET_ROWS], 2):
        thumbnail = None
        if num_thumbnails < MAX_THUMBNAILS:
            thumbnail = make_thumbnail(images[number - 2])
        if thumbnail is not None:
            num_thumbnails += 1
            sheet_image = SheetImage(thumbnail)
            sheet_image.anchor = f"A{number}"
            sheet.add_image(sheet_image)
            sheet.row_dimensions[number].height = (sheet_image.height + 8) * POINTS_PER_PIXEL
        sheet.append([None, *map(make_cell, row)])
    last = get_column_letter(len(names))
    sheet.auto_filter.ref = f"A1:{last}{min(len(table.rows), MAX_SHEET_ROWS) + 1}"
    if len(table.rows) > MAX_SHEET_ROWS:
        on_note(f"the workbook has the first {MAX_SHEET_ROWS:,} of {len(table.rows):,} answers")
    if num_thumbnails == MAX_THUMBNAILS < len(table.rows):
        on_note(f"the workbook has thumbnails of the first {MAX_THUMBNAILS:,} images")
    stream = io.BytesIO()
    workbook.save(stream)
    return stream.getvalue()


def make_thumbnail(images: Sequence[Path]) -> io.BytesIO | None:
    """Encode a thumbnail of the first readable image; None without one.

    Its file may have been deleted since the model has read it.
    """
    for path in images:
        try:
            image = load_image(path, min_side=THUMBNAIL_SIDE)
        except (CorruptImageError, OSError):
            continue
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=THUMBNAIL_QUALITY)
        return stream
    return None


def _convert_cell(value: object) -> str | float | None:
    """Return a number that Excel stores exactly, or a text; None for an empty cell."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < MAX_EXACT_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # XML excludes some characters. Excel reads _x0041_ as an escaped character.
    text = _INVALID_XML.sub("\ufffd", escape_surrogates(text))
    return _XML_ESCAPE.sub("_x005F_", text[:MAX_CELL_CHARS])


def format_answers(
    predictions: Sequence[Prediction],
    records: Sequence[Mapping[str, Any]],
    suffix: str,
    on_note: Callable[[str], object],
) -> bytes:
    """Format predictions as a file with a suffix: .jsonl, .csv or .xlsx.

    Args:
        records: JSON records of the predictions.
        on_note: See `format_workbook`.
    """
    if suffix == ".jsonl":
        lines = (f"{json.dumps(one, ensure_ascii=False)}\n" for one in records)
        return "".join(lines).encode(errors="surrogateescape")
    table = build_table(records)
    if suffix == ".csv":
        return format_csv(table).encode(errors="surrogateescape")
    return format_workbook(table, [one.images for one in predictions], on_note)
