"""Any table, its columns named by the user: --map image=COLUMN --map answer=COLUMN and so on.

The user's turn is the picture (or several, from a list), then the question, then the prompt on a
line of its own. A list of answers becomes a training sample each. Boxes without an answer are the
answer; with both, the answer's text comes first and the boxes on the next line. See `boxed_text`
for boxes within the text of an answer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats.boxed_text import answer_parts
from finesight.data.formats.format import Format, Reading, Scene, listed, plain
from finesight.data.rows import Record, Row
from finesight.data.sample import BoxPart, Message, Part
from finesight.errors import UserError

COLUMNS = ("image", "answer", "question", "box", "label")
"""What a column can be mapped to."""

_GAP = re.compile(r"(?<=[\d.\])])[\s;]+(?=[\d.+\-\[(])")
"""White space or a semicolon that parts two numbers or two boxes."""

_USUAL_NAMES = {
    "image": ("image", "img", "picture", "path", "file"),
    "answer": ("answer", "caption", "text", "latex", "formula", "response", "sentence"),
    "question": ("question", "query", "instruction"),
    "box": ("bbox", "box"),
}


def detect(records: Sequence[Record]) -> str | None:
    """Never: a table is chosen by --map or --format."""
    return None


def suggestion(record: Record) -> str:
    """The --map options that the names of a record's columns suggest."""
    options = []
    for role, names in _USUAL_NAMES.items():
        fits = (key for name in names for key in record if name in key.lower())
        column = next(fits, None)
        if column or role in ("image", "answer"):
            options.append(f"--map {role}={column or 'COLUMN'}")
    return " ".join(options)


def read(row: Row, reading: Reading) -> Case:
    """See the head of this file for what is read."""
    scene = Scene(reading)
    parts: list[Part] = list(_pictures(row, reading, scene))
    question = _cell(row, reading, "question")
    if question is not None:
        parts.append(plain(_words(question, "question")))
    user = Message(role="user", content=reading.asked(parts))
    boxes = tuple(_boxes(row, reading, scene))
    texts = [_words(answer, "answer") for answer in listed(_cell(row, reading, "answer"))]
    answers = [(*answer_parts(f"{text}\n" if boxes else text, scene), *boxes) for text in texts]
    if boxes and not texts:
        answers = [boxes]
    if not answers:
        raise UserError(
            f"no answer in {', '.join(reading.columns.values())}",
            expected="an answer or a box in every row",
            remedy="give --map answer=COLUMN or --map box=COLUMN, or leave the row out",
        )
    return Case(row.id, (user,), tuple(answers))


def _pictures(row: Row, reading: Reading, scene: Scene) -> Iterator[Part]:
    """An empty list says that there is no picture; an empty cell leaves it open, and is refused."""
    if "image" in reading.columns:
        values = _cell(row, reading, "image")
        yield from map(scene.picture, values if isinstance(values, list) else [values])


def _cell(row: Row, reading: Reading, role: str) -> object:
    """The value of the column mapped to `role`; None when none is mapped.

    Several columns separated by commas give a list, which suits a box's four numbers.
    """
    column = reading.columns.get(role)
    if column is None:
        return None
    if column in row.record:
        return row.record[column]
    names = column.split(",")
    if len(names) > 1 and all(name in row.record for name in names):
        return [row.record[name] for name in names]
    raise UserError(
        f"no column {column!r} for --map {role}={column}",
        expected=f"one of {', '.join(map(str, row.record))}",
        remedy="name one of these columns",
    )


def _words(value: object, role: str) -> str:
    text = "" if value is None or value != value else str(value)  # only NaN is not itself
    if not text.strip() or isinstance(value, dict | list | bytes):
        raise UserError(
            f"the {role} is {str(value)[:60]!r}",
            expected="text or a number",
            remedy="fill it in, or leave the row out",
        )
    return text


def _boxes(row: Row, reading: Reading, scene: Scene) -> Iterator[BoxPart]:
    boxes = _box_list(_cell(row, reading, "box"))
    labels = listed(_cell(row, reading, "label")) or [None] * len(boxes)
    if boxes:
        scene.need_one_picture()
    if len(labels) != len(boxes):
        raise UserError(
            f"{len(labels)} labels for {len(boxes)} boxes",
            expected="a label for each box",
            remedy="correct the row",
        )
    for box, label in zip(boxes, labels, strict=True):
        yield scene.box(box, None if label is None else _words(label, "label"), BoxForm())


def _box_list(value: object) -> list[object]:
    """One box or a list of them; in a cell of text as "1, 2, 3, 4", with or without brackets and
    commas, as Python and numpy print them."""
    if isinstance(value, str) and value.strip():
        try:
            parsed = ast.literal_eval(_GAP.sub(",", value.strip()))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        if not isinstance(parsed, list | tuple):
            return [value]  # refused with its text by whoever reads the four numbers
        value = parsed
    items = listed(value or None)
    return items if not items or isinstance(items[0], list | tuple) else [items]


FORMAT = Format(
    name="table",
    looks="any columns, named by --map image=COLUMN --map answer=COLUMN",
    keys=frozenset(),
    detect=detect,
    read=read,
    takes=frozenset({"map", "prompt", "boxes"}),
)
