"""Any table, its columns named by the user: --map image=COLUMN --map answer=COLUMN and so on.

The user's turn is the picture (or several, from a list), then the question, then the prompt on a
line of its own. A list of answers becomes a training sample each. Columns mapped to `fields` become
one answer, a JSON object. Boxes without an answer are the answer; with both, the answer's text
comes first and the boxes on the next line. See `boxed_text` for boxes within the text of an answer.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Collection, Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.case import Case
from finesight.data.formats import texts
from finesight.data.formats.boxed_text import answer_parts, answer_text
from finesight.data.formats.format import (
    BadOption,
    Format,
    Reading,
    Scene,
    StrayMark,
    Writing,
    listed,
    plain,
)
from finesight.data.jsonl import Located
from finesight.data.limits import MAX_ANSWERS, check_count
from finesight.data.rows import Record, Row
from finesight.data.rules import EmptyAnswer
from finesight.data.sample import BoxPart, Message, Part, TextPart, shortest
from finesight.errors import UserError

_WRITTEN = ("image", "answer", "question", "box", "label")
COLUMNS = (*_WRITTEN, "fields")
"""The roles of `--map ROLE=COLUMN`. A box may be in four columns, fields in any number of them:
--map ROLE=COLUMN,COLUMN."""

_GAP = re.compile(r"(?<=[\d.\])])[\s;]+(?=[\d.+\-\[(])")
"""White space or a semicolon that parts two numbers or two boxes."""

LONGEST = 2**20
"""Characters of a cell with boxes: more than as many boxes have as a sample may have."""

_USUAL_NAMES = {
    "image": ("image", "img", "picture", "path", "file"),
    "answer": ("answer", "caption", "text", "txt", "latex", "formula", "response", "sentence"),
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
    end = "\n" if boxes else ""
    said = listed(_cell(row, reading, "answer"))
    check_count(len(said), MAX_ANSWERS, "answers")
    texts = [_words(answer, "answer") for answer in said]
    answers = [(*answer_parts(f"{text}{end}", scene), *boxes) for text in texts]
    answers += [(TextPart(text=f"{form}{end}"), *boxes) for form in _form(row, reading)]
    if boxes and not answers:
        answers = [boxes]
    if not answers:
        raise EmptyAnswer(
            f"no answer in {', '.join(reading.columns.values())}",
            expected="an answer or a box in every row",
            remedy="fill it in, or leave the row out; where the answer is in another column, name "
            "that one: --map answer=COLUMN, --map fields=COLUMN,COLUMN or --map box=COLUMN",
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
    names = several(column, row.record)
    if len(names) > 1 and all(name in row.record for name in names):
        return [row.record[name] for name in names]
    raise UserError(
        f"no column {column!r} for --map {role}={column}",
        expected=f"one of {', '.join(map(str, row.record))}",
        remedy="name one of these columns",
    )


def several(column: str, record: Collection[str]) -> list[str]:
    """The columns that a role is mapped to, where its value is not one column's name as a whole."""
    return [name if name in record else name.strip() for name in column.split(",")]


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


def _form(row: Row, reading: Reading) -> list[str]:
    """The cells of `fields` as one JSON object by the names of their columns, empty ones left out;
    nothing where all are empty or no columns are mapped."""
    column = reading.columns.get("fields")
    if column is None:
        return []
    if "answer" in reading.columns:
        raise BadOption(
            f"fields={column} beside answer={reading.columns['answer']}",
            where="--map",
            expected="an answer in one column, or made of several",
            remedy="leave one of the two out",
        )
    cell = _cell(row, reading, "fields")
    alone = column in row.record
    cells = (
        [(column, cell)] if alone else zip(several(column, row.record), listed(cell), strict=True)
    )
    said: dict[str, str] = {}
    for name, value in cells:
        if name in said:
            raise BadOption(
                f"the column {name!r} twice in fields={column}",
                where="--map",
                expected="each column once",
                remedy="leave one of the two out",
            )
        said[name] = "" if _empty(value) else _member(name, value)
    members = ", ".join(filter(None, said.values()))
    return [f"{{{members}}}"] if members else []


def _empty(value: object) -> bool:
    blank = isinstance(value, str) and not value.strip()
    return blank or value is None or value != value  # only NaN is not itself


def _member(name: str, value: object) -> str:
    """Name and value as they stand in a JSON object. Raises UserError that names the column."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text)
        return plain(f"{json.dumps(name, ensure_ascii=False)}: {written}").text
    except StrayMark as error:
        raise StrayMark(
            f"in the column {name!r}: {error.what}", expected=error.expected, remedy=error.remedy
        ) from error
    except ValueError as error:
        raise UserError(
            f"the column {name!r} with {str(value)[:60]} cannot be written as JSON ({error})",
            expected="a text, a number, or a list or object of them",
            remedy="correct the row, or leave it out",
        ) from error


def _as_text(value: object) -> str:
    """A value of a type that JSON lacks, such as a date out of a Parquet table."""
    if isinstance(value, bytes):
        raise ValueError(f"{len(value)} bytes that are no text")
    return str(value)


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
        check_count(len(value), LONGEST, "characters of boxes")
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
        return texts.record(located, writing, {role: row.get(role) for role in _WRITTEN})

    yield from texts.rows(samples, record_of)
    options = [f"--map {role}={role}" for role in _WRITTEN if columns.get(role)]
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
