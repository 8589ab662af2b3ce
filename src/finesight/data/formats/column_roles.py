"""Guess the roles of table columns from their names and values, as for `import --map`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from finesight.data.boxes import BoxFormat, BoxUnits, InvalidBoxError, parse_coordinates
from finesight.data.formats import table
from finesight.data.image_header import is_image_value
from finesight.data.row_reader import Record
from finesight.errors import UserError, suggest_name

QUESTION_NAMES = ("question", "query", "instruction", "prompt", "problem")
ANSWER_NAMES = (
    *("answer", "answers", "response", "completion", "output", "solution", "target", "reply"),
    *("groundtruth", "caption", "captions", "description", "text", "transcription", "latex"),
    *("formula", "label", "class", "category"),
)
PAIRS = (
    ("prefix", "suffix"),
    ("input", "output"),
    ("input", "target"),
    ("input", "label"),
    ("source", "target"),
    ("user", "assistant"),
    ("human", "gpt"),
    ("human", "assistant"),
    ("context", "completion"),
    ("q", "a"),
)
"""Names of a question and its answer that have this meaning only together."""

PHRASE_NAMES = ("phrase", "expression", "referring", "sentence", "caption", "description", "text")
"""Names of the question in a table of boxes without classes."""

LABEL_NAMES = ("label", "labels", "class", "category", "categories", "name", "names", "object")
BOX_NAMES = ("bbox", "bboxes", "box", "boxes", "boundingbox", "boundingboxes", "bbox2d", "box2d")

MIN_ORDERED_BOXES = 10
"""Number of boxes that are all corners if no second coordinate is below its first one."""

_IGNORED_NAMES = re.compile(r"(?i)id|index|idx|split|unnamed.*|no\.?|nr\.?|#|row|")
_LABEL_ID = re.compile(r"(?i)(?:label|class|category|object)_?id")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\W_A-Za-z0-9]+")
_WORDS_AFTER = frozenset({"text", "content", "en", "str", "string"})


def guess_columns(records: Sequence[Record]) -> dict[str, str]:
    """Guess the roles of table columns from their names and values.

    Several unknown columns with text become the fields of a JSON answer.
    """
    names = list(map(str, records[0]))
    images = [name for name in names if _has_values(records, name, is_image_value)]
    columns = {"image": images[0]} if images else {}
    # image_1, image_2 and so on are one list.
    numbered = [name for name in images if re.sub("[0-9]+$", "", name) == _strip_number(images[0])]
    if len(numbered) > 1:
        columns["image"] = ",".join(numbered)
    boxes = guess_box_columns(records)
    box_columns = ",".join(boxes.values()).split(",")
    others = [
        name
        for name in names
        if name not in (*images, *box_columns)
        and not _IGNORED_NAMES.fullmatch(name)
        and _has_values(records, name, _is_text, min_fraction=0)
    ]
    question, answer = _find_pair(others)
    if boxes:
        phrase = boxes["label"] if _has_phrases(records, columns, boxes) else None
        if "label" not in boxes:
            phrase = find_name(others, PHRASE_NAMES)
        question = question or phrase
        return columns | ({"question": question} if question else {}) | boxes
    if question is not None:
        columns["question"] = question
        others = [name for name in others if name not in question.split(",")]
    answer = answer or find_name(others, ANSWER_NAMES)
    has_names = not all(map(str.isdecimal, names))
    if answer or len(others) == 1:
        columns["answer"] = answer or others[0]
    elif others and has_names:
        columns["fields"] = ",".join(others)
    return columns


def _has_phrases(
    records: Sequence[Record], columns: Mapping[str, str], boxes: Mapping[str, str]
) -> bool:
    """Return whether the label of the only box of each image is not a class but a phrase."""
    labels = [record.get(boxes.get("label", "")) for record in records]
    images = {str(record.get(columns.get("image", ""))) for record in records}
    return len(images) == len(labels) < 2 * len({str(label) for label in labels if _is_text(label)})


def _strip_number(name: str) -> str:
    stem = re.sub("[0-9]+$", "", name)
    return stem if stem != name else ""


def _find_pair(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns of question and answer; None for those that are not found."""
    question = find_name(names, QUESTION_NAMES)
    if question is not None:
        # The input of an instruction is a part of the question (Alpaca).
        has_input = "instruction" in question.lower() and find_name(names, ("output", "response"))
        more = find_name([name for name in names if name != question], ("input",))
        return (f"{question},{more}" if has_input and more else question), None
    for pair in PAIRS:
        found = [find_name(names, (name,)) for name in pair]
        if None not in found:
            return found[0], found[1]
    return None, None


def find_name(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    """Return the first name that is one of the candidates, or that ends with one of them.

    `question_text` is a question, `question_id` and `system_prompt` are not.
    """
    words = {name: [word.lower() for word in _WORDS.findall(name)] for name in names}
    for candidate in candidates:
        for name in names:
            if "".join(words[name]) == candidate:
                return name
    for candidate in candidates:
        for name in names:
            stem = [word for word in words[name] if word not in _WORDS_AFTER] or words[name]
            if stem[-1:] == [candidate] and not {"system", "negative"} & set(stem):
                return name
    return None


def _has_values(
    records: Sequence[Record],
    name: str,
    is_valid: Callable[[object], bool],
    min_fraction: float = 0.9,
) -> bool:
    """Return whether over a fraction of the non-empty cells of a column are valid."""
    cells = [cell for record in records if (cell := record.get(name)) not in (None, "", [])]
    return bool(cells) and fmean(map(is_valid, cells)) > min_fraction


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, dict | bytes) and value is not None and value == value


def guess_box_columns(records: Sequence[Record]) -> dict[str, str]:
    """Return the columns of the roles box and label, also inside an object such as `objects`.

    The box is a column with lists of four numbers, or four columns such as xmin,ymin,xmax,ymax.
    """
    names: dict[str, None] = dict.fromkeys(map(str, records[0]))
    for name in list(names):
        inner = records[0][name]
        item = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(item, dict):
            names |= dict.fromkeys(f"{name}.{key}" for key in item)
    candidates = [name for name in names if _is_box_name(name)]
    coordinates = {table.normalize_coordinate(name): name for name in names}
    candidates += [
        ",".join(coordinates[key] for key in keys)
        for _, variants in table.BOX_COLUMNS
        for keys in variants
        if coordinates.keys() >= set(keys)
    ]
    box = next((name for name in candidates if _list_boxes(records, name)), None)
    if box is None:
        return {}
    home = f"{box.split(',')[0].rpartition('.')[0]}."
    siblings = {
        name.removeprefix(home): name
        for name in names
        if (home == "." or name.startswith(home))
        and not _has_values(records, name, is_image_value)
        and name not in box.split(",")
    }
    label = find_name(list(siblings), LABEL_NAMES) or next(
        filter(_LABEL_ID.fullmatch, siblings), None
    )
    return {"box": box} | ({"label": siblings[label]} if label else {})


def _is_box_name(name: str) -> bool:
    """Return whether a name, or its part after the last dot, is that of boxes."""
    words = [word.lower() for word in _WORDS.findall(name.rpartition(".")[2])]
    text = "".join(words)
    return text in BOX_NAMES or any(text.startswith(prefix) for prefix in ("bbox", "boundingbox"))


def _list_boxes(records: Iterable[Record], column: str) -> list[list[float]]:
    """Return the boxes of a column if most of its cells are boxes, else an empty list."""
    boxes, num_invalid = [], 0
    for record in records:
        try:
            boxes += map(parse_coordinates, table.read_boxes(record, column))
        except (InvalidBoxError, UserError):
            num_invalid += 1
    return boxes if len(boxes) > 9 * num_invalid else []


def guess_box_options(
    records: Sequence[Record], column: str
) -> tuple[BoxFormat | None, BoxUnits | None]:
    """Return box format and units where the values contradict the default of the column."""
    boxes = _list_boxes(records, column)
    default = table.get_default_convention(column).format
    num_ordered = sum(a < c and b < d for a, b, c, d in boxes)
    box_format: BoxFormat | None = None
    if default == "xyxy" and num_ordered < len(boxes):
        box_format = "xywh"
    elif default == "xywh" and num_ordered == len(boxes) >= MIN_ORDERED_BOXES:
        box_format = "xyxy"
    is_fraction = bool(boxes) and all(value <= 1 for box in boxes for value in box)
    return box_format, "1" if is_fraction else None


def suggest_mapping(record: Record) -> str:
    """Suggest `--map` options for a record, by the values or the names of its columns."""
    names = list(map(str, record))
    columns = guess_columns([record])
    if "image" not in columns:
        question, answer = _find_pair(names)
        named = {
            "image": next(filter(_is_image_name, names), "COLUMN"),
            "question": question,
            "answer": answer or find_name(names, ANSWER_NAMES),
            "box": next(filter(_is_box_name, names), None),
        }
        columns = {role: column for role, column in named.items() if column}
    if not columns.keys() & {"answer", "fields", "box"}:
        columns["answer"] = "COLUMN"
    pairs = [f"{role}={columns[role]}" for role in table.MAPPABLE_COLUMNS if role in columns]
    return " ".join(f"--map {shlex.quote(pair)}" for pair in pairs)


def _is_image_name(name: str) -> bool:
    return re.search(r"(?i)image|img|picture|photo|path|file", name) is not None


def suggest_role(name: str, column: str) -> str:
    """Return a remedy for an unknown role that `--map` gives to a column."""
    known = {"question": QUESTION_NAMES, "answer": ANSWER_NAMES, "box": BOX_NAMES}
    for role, names in known.items():
        if name.lower() in names:
            return f"use {role}={column}"
    if _is_image_name(name):
        return f"use image={column}"
    return suggest_name(name, table.MAPPABLE_COLUMNS, "use one of these, such as answer=COLUMN")
