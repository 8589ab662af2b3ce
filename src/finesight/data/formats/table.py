"""Any table, its columns named by the user: --map image=COLUMN --map answer=COLUMN and so on.

The user's turn is the picture (or several, from a list), then the question, then the prompt on a
line of its own. A list of answers becomes a training sample each. Boxes without an answer are the
answer; with both, the answer's text comes first and the boxes on the next line. See `boxed_text`
for boxes within the text of an answer.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts, answer_text
from finesight.data.formats.format import Format, Reading, Scene, Writing, listed, plain
from finesight.data.jsonl import Located
from finesight.data.rows import Record, Row
from finesight.data.rules import EmptyAnswer
from finesight.data.sample import BoxPart, Message, Part, shortest
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
            pair = f"{role}={column or 'COLUMN'}"
            options.append(f"--map {shlex.quote(pair)}")
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
        raise EmptyAnswer(
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
        kind = EmptyAnswer if role == "answer" else UserError
        raise kind(
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


def write(samples: Sequence[Located], writing: Writing) -> texts.Files:
    """A row of image, question, answer, box and label, and how to map them.

    Raises UserError for a sample of several rounds or with a system prompt, one whose question is
    not pictures and then text, and where some samples have a question and others none.
    """
    columns: dict[str, bool] = {}

    def record_of(located: Located) -> Record:
        row = _row(located, writing)
        if columns.setdefault("question", "question" in row) != ("question" in row):
            raise _unfit("a question in some samples and none in others")
        columns.update(dict.fromkeys(row, True))
        return texts.record(located, writing, {role: row.get(role) for role in COLUMNS})

    yield from texts.rows(samples, record_of)
    options = [f"--map {role}={role}" for role in COLUMNS if columns.get(role)]
    unasked = [] if columns["question"] else ['--prompt ""']
    writing.notes.append(f"to read the table: {' '.join(options + unasked)}")


def _row(located: Located, writing: Writing) -> Record:
    messages = located.sample.messages
    if [message.role for message in messages] != ["user", "assistant"]:
        raise _unfit(f"turns of {', '.join(message.role for message in messages)}")
    shown = texts.Shown(located, writing)
    marks = "".join(texts.asked(part, shown) for part in messages[0].content)
    question = marks.removeprefix("<image>" * len(shown.names))
    if "<image>" in question:
        raise _unfit("a picture after text")
    row: Record = {"image": shown.names[0] if len(shown.names) == 1 else shown.names}
    if question:
        row["question"] = question
    content = messages[1].content
    first = next((n for n, part in enumerate(content) if isinstance(part, BoxPart)), len(content))
    before, boxes = content[:first], [part for part in content[first:] if isinstance(part, BoxPart)]
    text = answer_text(before, len(shown.names))
    if len(boxes) < len(content) - first or (text and boxes and not text.endswith("\n")):
        text, boxes = answer_text(content, len(shown.names)), []
    if any(box.label is not None and not box.label.strip() for box in boxes):
        raise _unfit("a box with a blank label")
    if boxes and len(shown.names) != 1:
        raise _unfit(f"boxes among {len(shown.names)} pictures")
    if text:
        row["answer"] = text.removesuffix("\n") if boxes else text
    if boxes:
        row["box"] = [[shortest(number) for number in box.xyxy] for box in boxes]
    if any(box.label is not None for box in boxes):
        row["label"] = [box.label for box in boxes]
    return row


def _unfit(what: str) -> UserError:
    return UserError(
        what,
        expected="pictures, then one question or none anywhere, then an answer",
        remedy="export to ms-swift or samples, or leave the sample out",
    )


FORMAT = Format(
    name="table",
    looks="any columns, named by --map image=COLUMN --map answer=COLUMN",
    keys=frozenset(),
    detect=detect,
    read=read,
    takes=frozenset({"map", "prompt", "boxes"}),
    write=write,
)
