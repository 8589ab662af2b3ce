"""Tables with columns mapped by the user: --map image=COLUMN --map answer=COLUMN.

The user turn consists of the image (or several, from a list), the question, and the prompt on a new
line. A column of video files yields videos instead. A list of texts as the answer yields one
training sample per text. A list of numbers or of labels is one answer in JSON, and so is an object
inside of a column. The columns mapped to `fields` become one answer, a JSON object. Boxes are the
answer if there is no other one, else they follow the answer text on a new line. See
`conversation_rows` for boxes within the answer text.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from string import ascii_uppercase
from types import NoneType
from typing import get_args

import yaml

from finesight.errors import UserError, describe_choices, format_count, suggest_name
from finesight.files.bounded_files import parse_unique_json
from finesight.ingest.formats.conversation_rows import (
    PartRenderer,
    format_answer,
    parse_answer,
    write_rows,
)
from finesight.ingest.formats.dataset_format import (
    NUMBERED_IMAGE,
    DatasetFormat,
    ExportContext,
    Files,
    ImportContext,
    ImportExample,
    InvalidOptionError,
    RowImages,
    UnexpectedPlaceholderError,
    as_list,
    check_image_order,
    decode_json_list,
    dump_json,
    forbid_drop,
    is_numeric,
    join_leading_media,
    make_text_part,
)
from finesight.ingest.formats.image_annotations import check_declared_size
from finesight.ingest.formats.row_keys import (
    LOSS,
    PREFERENCE,
    REASONING,
    ROWS,
    find_meaning,
    has_value,
)
from finesight.ingest.formats.split_folders import SPLIT_ALIASES
from finesight.ingest.row_reader import ClassNames, Record, SourceRow
from finesight.samples.boxes import (
    InvalidBoxError,
    StrayBoxError,
    box_area,
    is_inside_image,
    parse_coordinates,
)
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER
from finesight.samples.frames import BoxFrame, Order, Unit
from finesight.samples.image_file import is_image_value
from finesight.samples.sample import (
    MAX_ANSWERS,
    BoxPart,
    ContentPart,
    EmptyAnswerError,
    InvalidRowError,
    LocatedSample,
    Message,
    TextPart,
    check_json,
    check_limit,
    is_video_path,
    join_text,
    list_coordinates,
)

_COLUMN_ROLES = ("image", "answer", "question", "box", "label")
MEDIA_ROLES = ("image", "video")
MAPPABLE_COLUMNS = (*_COLUMN_ROLES, "fields", "video")
"""Roles in `--map ROLE=COLUMN`.

A box may use four columns and `fields` any number: `--map ROLE=COLUMN,COLUMN`.
"""

_SEPARATOR = re.compile(r"(?<=[\d.\])])[\s;]+(?=[\d.+\-\[(])")
"""Pattern of white space or a semicolon between coordinates or boxes in a cell."""

MAX_CELL_CHARS = 2**20

_NAME_TABLE = """
image: image img picture photo path file filename
video: video clip movie
question: question query instruction prompt problem ask request
question: frage pregunta pergunta domanda вопрос 问题 问 質問 질문
text: antwort respuesta réponse resposta risposta ответ 答案 答 回答 답변
text: answer answers response completion output reply
other: solution target groundtruth caption captions description text txt transcription
other: latex formula label class category chosen
phrase: phrase expression sentence sentences caption description text ref
box: bbox box
label: label labels class category categories classname labelname categoryname name names object
label: classid labelid categoryid
list: labels label classes class categories category tags attributes keywords
number: number num no nr index idx id
pair: prefix,suffix input,output input,target input,label source,target user,assistant
pair: human,gpt human,assistant context,completion q,a
xyxy: xmin,ymin,xmax,ymax x1,y1,x2,y2 left,top,right,bottom minx,miny,maxx,maxy x0,y0,x1,y1
xyxy: startx,starty,endx,endy tlx,tly,brx,bry xstart,ystart,xend,yend xtl,ytl,xbr,ybr
xyxy: ulx,uly,lrx,lry xtopleft,ytopleft,xbottomright,ybottomright xleft,ytop,xright,ybottom
xyxy: topleftx,toplefty,bottomrightx,bottomrighty leftx,topy,rightx,bottomy 左,上,右,下
xyxy: links,oben,rechts,unten gauche,haut,droite,bas izquierda,arriba,derecha,abajo
xywh: x,y,w,h x,y,width,height left,top,width,height xmin,ymin,width,height
yxyx: ymin,xmin,ymax,xmax y1,x1,y2,x2 top,left,bottom,right
cxcywh: cx,cy,w,h cx,cy,width,height xcenter,ycenter,width,height centerx,centery,width,height
"""
"""Column names by role, in lower case without punctuation.

An answer has the names of `text`, also beside boxes, or of `other`. A `list` of an image is a
single answer. A `number` may count the rows of an image. The names of a `pair` are a
question and its answer only together. A `phrase` is the question about boxes without classes. Four
columns with the coordinates of a box have the names of its format.
"""


def _list_names(role: str) -> list[str]:
    lines = (line.split() for line in _NAME_TABLE.splitlines() if line.startswith(f"{role}:"))
    return [name for _, *names in lines for name in names]


_ANSWER_NAMES = _list_names("text")
_COMMON_NAMES = {role: _list_names(role) for role in (*_COLUMN_ROLES, "video")}
_COMMON_NAMES["answer"] = [*_ANSWER_NAMES, *_list_names("other")]
_ORDERS: tuple[Order, ...] = get_args(Order)
_BOX_COLUMNS = {order: _list_names(order) for order in _ORDERS}

_OPTION = re.compile(r"(?i)(?:(?:option|choice)[_ ]?)?([A-H])")
"""Names of the columns with the options of a multiple-choice question."""

_PATH_NAME = re.compile(r"[\w, -]+")
"""Names of columns that are a path of a mapping as they are."""

_NUMBERED_KEY = re.compile(r"(\D*)(\d{1,2})")
"""Key with the number of a choice."""

_OPTION_LISTS = ("choices", "options", "candidates")
"""Names of the columns with all options in a list."""

_NO_INPUT_IMAGE = re.compile(r"(?i).*(?:mask|segmentation|thumb|url).*")
"""Names of images that are labels or copies of another column."""

_NO_ANSWER_NAME = re.compile("(?i)(?:system|negative|rejected).*")

_ROW_NAME = re.compile(
    "(?:(?:image|img|photo|video|file|row|sample|record|example|entry|q|question|pair"
    "|conversation|annotation)_?)?(?:[gu]?u?id)|split|unnamed.*|index_level_[0-9]+"
)
"""Names that identify a row or its image, in lower case with `_` between words."""

_NUMBER_NAME = re.compile("(?:row|number|num|no|nr|index|idx)?")
"""Names of columns that number the rows, if their values do. Symbols such as `#` are no words."""

_CLIP_BOUND = re.compile(
    "start|end|begin|from|to|onset|offset|timestamps?|times?|span|segment|interval|moment|window"
    "|frame"
)
"""Words of columns that may select a part of a video."""

_SIZE_WORDS = frozenset({"count", "num", "number", "rate", "width", "height", "size"})
"""Words of columns such as `frame_count`, which describe a complete video."""

_TIMES = re.compile(r"(?=[^\d]*\d)[\d:.,;\s\[\]()s-]*+")

_PROPERTY_WORDS = (
    "is",
    "has",
    "was",
    "are",
    "can",
    "contains",
    "needs",
    "should",
    "hard",
    "difficult",
)
"""First words of columns that state whether a row has a property."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+|[^\W_A-Za-z0-9]+")
_TEXT_WORDS = {"text", "content", "en"}

_BOX_PREFIX = re.compile(r"^.*\.|^(?:bnd|bounding_?|b)?box_?|^(?:roi|rect)_?", re.IGNORECASE)
_FORMAT_IN_NAME = re.compile(
    r"(?P<yxyx>yxyx)|(?P<cxcywh>cxcywh|xcycwh|yolo)|(?P<xyxy>xyxy|ltrb)|(?P<xywh>xywh|ltwh|coco)",
    re.IGNORECASE,
)

MAX_FEW_RECORDS = 4
"""Number of records up to which different labels may be classes."""

MIN_VALID_BOXES = 0.75
"""Fraction of the boxes that must lie in their images in the default format of a column."""


def guess_columns(records: Sequence[Record]) -> dict[str, str]:
    """Guess the roles of table columns from their names and values, as for `import --map`.

    Several unknown columns with text become the fields of a JSON answer.
    """
    names = list_names(records)
    images = [name for name in names if _has_values(records, name, is_image_value, 0.9)]
    # A URL beside a file or an embedded image is where it was downloaded from.
    files = [name for name in images if not _has_values(records, name, _is_url, 0)]
    files = _omit_repeated_names(records, files)
    inputs = (files or images)[:1]
    for name in files[1:]:
        if not _NO_INPUT_IMAGE.fullmatch(name):
            inputs.append(name)
    columns = {"image": ",".join(inputs)} if images else {}
    videos = [name for name in names if _has_values(records, name, is_video_value, 0.9)]
    if videos:
        columns["video"] = ",".join(videos)
    media = [*images, *videos]
    boxes = _guess_box_columns(records, [name for name in names if name not in media])
    others = [
        name
        for name in names
        if name not in (*media, *",".join(boxes.values()).split(","))
        and not (is_row_name(name) or _NO_ANSWER_NAME.fullmatch(name))
        and not (counts_rows(records, name, media) or numbers_rows(records, name))
        and not _has_identifiers(records, name)
        and (is_answer_name(name) or not _has_values(records, name, _is_split, 0.9))
        and _has_values(records, name, _is_text, 0)
    ]
    question, answer = _find_pair(others)
    if boxes:
        label = boxes.get("label")
        if label is None:
            question = question or _find_name(others, _list_names("phrase"))
        elif question is None and images:
            labels = {record.get(label) for record in records if isinstance(record.get(label), str)}
            is_unique = len({str(record.get(images[0])) for record in records}) == len(records)
            # The label of the only box of an image is a class or, if it rarely recurs, a phrase.
            is_phrase = is_unique and 2 * len(labels) > len(records) > MAX_FEW_RECORDS
            question = label if is_phrase else None
        left = [name for name in others if name not in (question or "").split(",")]
        answer = _find_name([name for name in left if name != label], _ANSWER_NAMES)
        found = {"question": question, "answer": answer}
        return columns | {role: name for role, name in found.items() if name} | boxes
    if question is not None:
        columns["question"] = question
        others = [name for name in others if name not in question.split(",")]
    # The last word of a flag, such as `is_wrong_answer`, does not say that it is the answer.
    texts = [name for name in others if not _is_flag(records, name)]
    # An answer by name precedes other texts: `gt_answer` beside `category`.
    answer = answer or _find_name(texts, _ANSWER_NAMES)
    answer = answer or _find_name(texts, _COMMON_NAMES["answer"])
    if question is None and answer == _find_name(texts, _ANSWER_NAMES) is not None:
        free = [name for name in others if name != answer and _is_question(records, name)]
        columns |= {"question": free[0]} if len(free) == 1 else {}
    if answer or len(others) == 1:
        columns["answer"] = answer or others[0]
    elif others and not all(map(str.isdecimal, names)):
        # A comma separates the names of several columns.
        columns["fields"] = ",".join(name for name in others if "," not in name)
    return columns


def list_names(records: Sequence[Record]) -> list[str]:
    """Return the names of the columns of all records."""
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(map(str, record)))
    return list(names)


def _omit_repeated_names(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """Return the columns of images without those that repeat the file names of another one.

    Of `2.jpg` and `photos/2.jpg`, the path is kept. Files of equal names in two folders differ.
    """
    distinct: list[str] = []
    for name in columns:
        if any(_repeats_names(records, name, one) for one in distinct):
            continue
        distinct = [one for one in distinct if not _repeats_names(records, one, name)]
        distinct.append(name)
    return distinct


def _repeats_names(records: Sequence[Record], column: str, other: str) -> bool:
    """Return whether a column has the paths of another one, or their file names."""
    for record in records:
        value = record.get(column)
        path = record.get(other)
        is_text = isinstance(value, str) and isinstance(path, str)
        if not is_text or value not in (path, PurePosixPath(str(path)).name):
            return False
    return True


def _is_split(value: object) -> bool:
    """Return whether a value is the name of a split."""
    return isinstance(value, str) and value.strip().lower() in SPLIT_ALIASES


def is_answer_name(name: str) -> bool:
    """Return whether a column has the name of an answer, a text or a class."""
    return _find_name([name], _COMMON_NAMES["answer"]) is not None


def is_video_value(value: object) -> bool:
    """Return whether a value is the name of a video file, an object with one, or a list of them."""
    if isinstance(value, list):
        return bool(value) and all(map(is_video_value, value))
    if isinstance(value, dict):
        return not value.get("bytes") and is_video_value(value.get("path"))
    return isinstance(value, str) and is_video_path(value.strip())


def _is_url(value: object) -> bool:
    return isinstance(value, str) and re.match("https?://", value) is not None


def _is_flag(records: Sequence[Record], name: str) -> bool:
    """Return whether a column of true and false is a property by its first word."""

    def is_truth(value: object) -> bool:
        return isinstance(value, bool) or value in ("true", "false", "True", "False")

    words = _WORDS.findall(name)
    is_property = len(words) > 1 and words[0].lower() in _PROPERTY_WORDS
    return is_property and all(is_truth(record.get(name)) for record in records)


def join_words(name: str) -> str:
    """Return the words of a column name in lower case, joined by `_`."""
    return "_".join(word.lower() for word in _WORDS.findall(name.rpartition(".")[2]))


def is_row_name(name: str) -> bool:
    """Return whether the name of a column is that of an identifier of a row."""
    return _ROW_NAME.fullmatch(join_words(name)) is not None


def _has_identifiers(records: Sequence[Record], name: str) -> bool:
    """Return whether a column lists identifiers.

    Its name ends with the word `ids`, or with these letters if the values are lists of numbers.
    """
    words = join_words(name)
    if words == "ids" or words.endswith("_ids"):
        return True
    return words.endswith("ids") and _has_values(records, name, _is_number_list, 0.9)


def _is_number_list(value: object) -> bool:
    return isinstance(value, list) and is_numeric(value)


def numbers_rows(records: Sequence[Record], name: str) -> bool:
    """Return whether a column with the name of a number contains the numbers of the rows."""
    if _NUMBER_NAME.fullmatch(join_words(name)) is None:
        return False
    cells = [str(record.get(name)).strip() for record in records]
    if not all(map(str.isdecimal, cells)):
        return False
    first = int(cells[0])
    return list(map(int, cells)) == list(range(first, first + len(cells)))


def counts_rows(records: Sequence[Record], name: str, media: Sequence[str]) -> bool:
    """Return whether a column numbers the rows of each image."""
    has_number_name = _find_name([name], _list_names("number")) is not None
    return has_number_name and _counts_rows(records, name, media)


def _counts_rows(records: Sequence[Record], name: str, media: Sequence[str]) -> bool:
    """Return whether a column counts the rows of each image, from 0 or 1."""
    numbers: dict[str, list[int]] = {}
    for record in records:
        files = [record.get(column) for column in media]
        cell = str(record.get(name)).strip()
        if not cell.isdecimal() or not all(isinstance(file, str) for file in files):
            return False
        numbers.setdefault(str(files), []).append(int(cell))
    for found in numbers.values():
        if found[0] not in (0, 1) or found != list(range(found[0], found[0] + len(found))):
            return False
    return len(numbers) < len(records)


def _is_question(records: Sequence[Record], name: str) -> bool:
    """Return whether a column contains a text of several words that differs in most rows."""
    texts = [str(record.get(name)) for record in records if has_value(record.get(name))]
    num_long = sum(" " in text.strip() for text in texts)
    is_free = 2 * num_long > len(records) and 2 * len(set(texts)) > len(records)
    return is_free and len(records) > 1


def _find_pair(names: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the columns of question and answer; None for those that are not found."""
    question = _find_name(names, _COMMON_NAMES["question"])
    for pair in _list_names("pair") if question is None else ():
        first, second = (_find_name(names, [name]) for name in pair.split(","))
        if first and second:
            return first, second
    # The input of an instruction is a part of the question (Alpaca).
    others = [name for name in names if name != question]
    is_alpaca = "instruction" in (question or "").lower()
    more = None
    if is_alpaca:  # the input of Alpaca, not another such as a text that a user types
        names_of_inputs = ("input", "context", "input_text", "context_text")
        more = next((name for name in others if name.lower() in names_of_inputs), None)
    texts = [name for name in (question, more) if name is not None]
    return ",".join([*texts, *(_list_options(others) if question else [])]) or None, None


def _list_options(names: Sequence[str]) -> list[str]:
    """Return the columns with the options of a multiple-choice question."""
    options = [name for name in names if _OPTION.fullmatch(name)]
    if len(options) < 2:
        options = [name for name in names if name.lower() in _OPTION_LISTS]
    return options


def _find_name(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    """Return the first name that is a candidate, or else the first one that ends with one.

    `question_text` and `user_question` are questions, `question_id` is not.
    """
    split_names = {name: [word.lower() for word in _WORDS.findall(name)] for name in names}
    for name, words in split_names.items():
        split_names[name] = words[:-1] if len(words) > 1 and words[-1] in _TEXT_WORDS else words
    for is_whole, candidate in itertools.product((True, False), candidates):
        for name, words in split_names.items():
            if ("".join(words) if is_whole else "".join(words[-1:])) == candidate:
                return name
    return None


def _has_values(
    records: Sequence[Record],
    name: str,
    is_valid: Callable[[object], bool],
    min_fraction: float,
) -> bool:
    """Return whether over a fraction of the non-empty cells of a column are valid."""
    cells = [cell for record in records if (cell := record.get(name)) not in (None, "", [])]
    return sum(map(is_valid, cells)) > min_fraction * len(cells)


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_text, value))
    return not isinstance(value, dict | bytes) and value is not None and value == value


def _guess_box_columns(records: Sequence[Record], names: Sequence[str]) -> dict[str, str]:
    """Return the columns of boxes and labels, also inside an object such as `objects`."""
    folders: dict[str, str] = {}
    for name in names:
        item = next(iter(as_list(records[0].get(name))), None)
        if isinstance(item, dict):
            folders |= {f"{name}.{key}": f"{name}." for key in item}
        else:
            folders[name] = ""
    by_coordinate = {_normalize_coordinate(path): path for path in folders}
    candidates = [path for path in folders if "box" in path.lower()] + [
        ",".join(by_coordinate[key] for key in variant.split(","))
        for variant in itertools.chain(*_BOX_COLUMNS.values())
        if by_coordinate.keys() >= set(variant.split(","))
    ]
    box = next((name for name in candidates if _list_boxes(records, name)), None)
    if box is None:
        return {}
    box_names = box.split(",")
    others = {
        path.removeprefix(folder): path
        for path, folder in folders.items()
        if path not in box_names and folder == folders[box_names[0]]
    }
    label = _find_name(list(others), _COMMON_NAMES["label"])
    return {"box": box, "label": others[label]} if label else {"box": box}


def _list_boxes(records: Iterable[Record], column: str) -> list[list[float]] | None:
    """Return the boxes of a column; None if over a tenth of its cells are no boxes.

    The list is empty for a column without values.
    """
    boxes: list[list[float]] = []
    num_invalid = 0
    for record in records:
        try:
            found = map(parse_coordinates, _read_boxes(record, column))
            boxes += [box for box in found if len(box) == 4]
        except UserError:
            num_invalid += 1
    return boxes if len(boxes) >= 9 * num_invalid else None


def guess_box_options(
    records: Sequence[Record], column: str, sizes: Sequence[tuple[float, float] | None]
) -> tuple[Order | None, Unit | None]:
    """Return box format and units where the values contradict the default of the column.

    A format that the names of the columns state is never changed. Otherwise the areas of COCO
    decide, or else the format in which more boxes lie in their images.

    Args:
        sizes: Width and height of the image of each record, None if unknown.
    """
    boxes = _list_boxes(records, column) or []
    is_fraction = bool(boxes) and max(map(max, boxes)) <= 1
    units: Unit | None = "1" if is_fraction else None
    default = get_default_frame(column).order
    if find_stated_format(column) is not None:
        return None, units
    other: Order = "xywh" if default == "xyxy" else "xyxy"
    valid: Counter[str] = Counter()
    areas: Counter[str] = Counter()
    area_column = f"{column.rpartition('.')[0]}.area".removeprefix(".")
    for record, size in zip(records, sizes, strict=True):
        found = _list_boxes([record], column) or []
        record_areas = as_list(get_cell(record, area_column))
        width, height = (1, 1) if is_fraction else size or (math.inf, math.inf)
        for index, box in enumerate(found):
            area = record_areas[index] if len(record_areas) == len(found) else None
            for box_format in (default, other):
                corners = BoxFrame(box_format).to_pixels(box, (0, 0))
                valid[box_format] += is_inside_image(corners, (height, width))
                if isinstance(area, int | float):
                    areas[box_format] += math.isclose(area, box_area(corners), rel_tol=0.01)
    if 2 * max(areas.values(), default=0) > len(boxes) and areas["xyxy"] != areas["xywh"]:
        return (other if areas[other] > areas[default] else None), units
    is_contradicted = valid[default] < MIN_VALID_BOXES * len(boxes)
    return (other if is_contradicted and valid[other] > valid[default] else None), units


def find_box_format(
    records: Sequence[Record], columns: str, sizes: Sequence[tuple[float, float] | None]
) -> Order | None:
    """Return the format in which four columns are boxes inside the image of each record.

    Boxes with a size must reach beyond half of an image; smaller numbers may be other values.
    """
    # Corners with y first look like corners.
    orders: tuple[Order, ...] = ("xyxy", "xywh", "cxcywh")
    for box_format in orders if None not in sizes else ():
        num_valid, extent_x, extent_y = 0, 0.0, 0.0
        num_filled = 0
        for record, size in zip(records, sizes, strict=True):
            if all(_is_empty(get_cell(record, name)) for name in columns.split(",")):
                continue  # an image without objects
            num_filled += 1
            boxes = _list_boxes([record], columns)
            box, (width, height) = boxes[0] if boxes else [0.0] * 4, size or (0, 0)
            x1, y1, x2, y2 = BoxFrame(box_format).to_pixels(box, (0, 0))
            is_pixel = max(box) <= 1 or all(n == round(n) for n in box)
            is_pixel = is_pixel if box_format == "xyxy" else max(box) > 1
            num_valid += is_pixel and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            extent_x, extent_y = max(extent_x, x2 / width), max(extent_y, y2 / height)
        is_large = box_format == "xyxy" or min(extent_x, extent_y) > 0.5
        if is_large and num_valid >= max(1, 0.9 * num_filled):
            return box_format
    return None


def has_unknown_texts(records: Sequence[Record], columns: Mapping[str, str]) -> bool:
    """Return whether the only columns besides the image are two texts of unknown meaning."""
    names = columns.get("fields", "").split(",")

    def has_letters(cell: object) -> bool:
        return re.search(r"[^\W\d_]", str(cell)) is not None

    is_text = all(_has_values(records, name, has_letters, 0.5) for name in names)
    return len(names) == 2 and "question" not in columns and is_text


def suggest_mapping(records: Sequence[Record]) -> str:
    """Suggest `--map` options for records, by the values or the names of their columns."""
    columns = suggest_columns(records)
    if columns.keys().isdisjoint(MEDIA_ROLES):
        columns["image"] = "COLUMN"
    if not any(map(columns.get, ("answer", "fields", "box"))):
        columns["answer"] = "COLUMN"
    pairs = [f"{role}={columns[role]}" for role in MAPPABLE_COLUMNS if columns.get(role)]
    return " ".join(f"--map {shlex.quote(pair)}" for pair in pairs)


def list_left_out(records: Sequence[Record]) -> list[str]:
    """Return the columns with values that the suggested options of `--map` leave out."""
    columns = suggest_columns(records)
    names: dict[str, None] = {}
    for record in records:
        for name in list_unused_columns(record, columns):
            if not is_row_name(name) and has_value(get_cell(record, name)):
                names[name] = None
    return list(names)


def suggest_columns(records: Sequence[Record]) -> dict[str, str]:
    """Suggest the columns of records by role, by their values or their names.

    Only those of images and videos are suggested if a text inside of a list or an object would be
    left out: it may be the question or the answer.
    """
    columns = guess_columns(records)
    if columns.keys().isdisjoint(MEDIA_ROLES):
        columns = {}
        names = list_names(records)
        for role in ("image", "video", "answer", "question", "box"):
            column = _find_fitting_column(records, role)
            is_second = role == "video" and "image" in columns
            if column is not None and column not in columns.values() and not is_second:
                columns[role] = column
        if "question" in columns:
            others = [name for name in names if name not in columns.values()]
            columns["question"] = ",".join([columns["question"], *_list_options(others)])
    for record in records:
        for name in list_unused_columns(record, columns):
            if has_inner_text(get_cell(record, name)):
                return {role: columns[role] for role in MEDIA_ROLES if role in columns}
    return columns


def has_inner_text(value: object) -> bool:
    """Return whether a list or an object contains a text or an object with values.

    Names of files are no such texts.
    """
    if isinstance(value, dict):
        return not value.get("bytes") and any(map(has_value, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_inner_text, value))
    return False


def _is_inner_text(value: object) -> bool:
    is_text = isinstance(value, str) and not is_image_value(value)
    return has_inner_text(value) or (is_text and _is_word(value))


def suggest_numbered_mapping(
    records: Sequence[Record], sizes: Sequence[tuple[float, float] | None]
) -> str:
    """Suggest `--map` options for columns without names, by their values only.

    Args:
        sizes: Width and height of the image of each record, None if unknown.
    """
    names = list(records[0])
    guessed = guess_columns(records)
    options = format_media_options(guessed) or "--map image=COLUMN"
    used = format_columns(guessed, MEDIA_ROLES)
    for start in range(len(names) - 3):
        box = names[start : start + 4]
        box_format = find_box_format(records, ",".join(box), sizes)
        if used.count("") == 0 and box_format is not None and not set(box) & set(used):
            options += f" --map box={','.join(box)}"
            if box_format != "xyxy":
                options += f" --box-format {box_format}"
            used += box
            break
    has_box = len(used) > 4
    texts = [name for name in names if name not in used and _has_values(records, name, _is_word, 0)]
    if len(texts) == 1:
        name = texts[0]
        if has_box:
            return f"{options} --map label={name}"
        has_others = len(used) + 1 < len(names)
        is_constant = len(records) > 1 and len({str(record.get(name)) for record in records}) == 1
        if not (is_constant and has_others):  # else others may be the answer, such as coordinates
            return f"{options} --map answer={name}"
    return options if has_box else f"{options} --map answer=COLUMN"


def _is_word(value: object) -> bool:
    """Return whether a value is a text with letters."""
    return isinstance(value, str) and re.search(r"[^\W\d_]", value) is not None


def _find_fitting_column(records: Sequence[Record], role: str) -> str | None:
    """Return the column whose name and values fit a role. Without values, it has no boxes.

    A column with a known name precedes one whose name contains it.
    """
    fitting: list[str] = []
    for key in list_names(records):
        is_allowed = role in MEDIA_ROLES or not is_row_name(key)
        filled = [value for record in records if not _is_empty(value := record.get(key))]
        has_content = bool(filled) or role != "box"
        if is_allowed and has_content and all(_fits_role(value, role) for value in filled):
            fitting.append(key)
    column = _find_name(fitting, _COMMON_NAMES[role])
    if column is not None:
        return column
    for name, key in itertools.product(_COMMON_NAMES[role], fitting):
        if name in key.lower():
            return key
    return None


def _fits_role(value: object, role: str) -> bool:
    if role == "image":
        return is_image_value(value)
    if role == "box":
        return bool(_list_boxes([{role: value}], role))
    return _is_text(value) and not isinstance(value, bool)


def suggest_role(name: str, column: str) -> str:
    """Return a remedy for an unknown role that `--map` gives to a column."""
    for role, names in _COMMON_NAMES.items():
        if name.lower() in names:
            return f"use {role}={column}"
    return suggest_name(name, MAPPABLE_COLUMNS, "use one of these, such as answer=COLUMN")


def list_columns(record: Record, columns: Mapping[str, str]) -> list[str]:
    """Return the columns of a record, and the keys inside those of which `--map` uses a part."""
    mapped = ",".join(columns.values()).split(",")
    outer = {one.partition(".")[0] for one in mapped if "." in one}
    names: list[str] = []
    for name, value in record.items():
        may_be_used_in_part = name.partition(".")[0] in outer
        is_used_in_part = may_be_used_in_part and any(one.startswith(f"{name}.") for one in mapped)
        if is_used_in_part and isinstance(value, str):
            with suppress(InvalidRowError):  # reported when the cell is read
                value = _parse_json_text(str(name), value)
        item = value[0] if isinstance(value, list) and value else value
        nested = item if isinstance(item, dict) and is_used_in_part else None
        names += [str(name)] if nested is None else [f"{name}.{key}" for key in nested]
    return names


def list_unused_columns(record: Record, columns: Mapping[str, str]) -> list[str]:
    """Return the columns of a record that neither `--map` nor the row ID uses."""
    names = list_columns(record, columns)
    used = {"id"}.union(*((one, *split_column_names(one, names)) for one in columns.values()))
    return [name for name in names if name not in used]


def parse_row(row: SourceRow, context: ImportContext) -> ImportExample:
    """Build a training example from a table row with mapped columns."""
    unused = list_unused_columns(row.record, context.columns)
    context.other_keys.update(unused)
    if context.ignorable_columns is not None:
        _check_later_columns(row.record, unused, context.ignorable_columns)
    images = RowImages(context)
    parts = _add_media(row.record, context, images)
    options: list[str] = []
    question = _read_cell(row.record, context, "question")
    if isinstance(question, list) and "," in context.columns["question"]:
        names = split_column_names(context.columns["question"], row.record)
        _require_texts(names, question, context.columns)
        question, options = _join_cells(names, question)
    if question is not None:
        parts = place_images(parts, _get_text(question, "question"))
    boxes, omitted = _create_boxes(row, context, images)
    if "label" in context.columns:
        num_unlabelled = [box.label for box in boxes].count(None)
        note = f"boxes without a label, because {context.columns['label']} is empty"
        context.row_notes[note] += num_unlabelled
    units = context.resolve_frame(get_default_frame(context.columns.get("box", ""))).unit
    if boxes and units == "pixel":
        # Columns of a size next to boxes are those of the image, or of the box.
        declared = row.record.get("height"), row.record.get("width")
        extents = {(box.xyxy[3] - box.xyxy[1], box.xyxy[2] - box.xyxy[0]) for box in boxes}
        check_declared_size(declared, images.paths[0], context, extents)
    content = omit_classes(context.add_prompt(parts), omitted, boxes)
    user = Message(role="user", content=content)
    line_end = "\n" if boxes else ""
    texts = _list_answers(row.record, context)
    if options and (number := next((t for t in texts if t.isdecimal() and t not in options), None)):
        raise InvalidRowError(
            f"the answer {number} to a question with {len(options)} options",
            "the letter or the text of an option, because options have no number",
            "replace the numbers; or give a mapping file (--mapping) with choices, and answer:"
            " {path: ANSWER, lookup: choices}, with first: 1 if the numbers start at 1",
        )
    answers = [(*parse_answer(f"{text}{line_end}", images), *boxes) for text in texts]
    json_answers = _build_json_answers(row, context)
    # Units of a column of boxes, also guessed ones, do not state what numbers in fields are.
    has_box_options = bool(context.box_format or context.box_units)
    states_boxes = has_box_options and "box" not in context.columns
    for text in json_answers:
        answer_parts: list[ContentPart] = [TextPart(text=f"{text}{line_end}")]
        if states_boxes:
            answer_parts = list(parse_answer(f"{text}{line_end}", images))
        answers.append((*answer_parts, *boxes))
    if not answers and "box" in context.columns and not {"answer", "fields"} & set(context.columns):
        answers = [boxes or (TextPart(text=NO_OBJECTS_ANSWER),)]
    if boxes and not answers:
        answers = [boxes]
    if not answers:
        raise EmptyAnswerError(
            f"no answer in {', '.join(context.columns.values())}",
            expected="an answer or a box in every row",
            remedy="add it, or remove the row; if the answer is in another column, name "
            "that one: --map answer=COLUMN, --map fields=COLUMN,COLUMN or --map box=COLUMN",
        )
    return ImportExample(row.id, (user,), tuple(answers))


def _check_later_columns(record: Record, unused: Iterable[str], ignorable: Collection[str]) -> None:
    """Reject a value in a column without a role that was empty in the first rows."""
    for name in unused:
        value = get_cell(record, name)
        is_exempt = name in ignorable or is_row_name(name)
        if not is_exempt and has_value(value) and value == value:
            raise InvalidRowError(
                f"the column {name!r} has no role, and is empty in the first rows, but not here"
                f" ({str(value)[:40]!r})",
                "columns whose role the first rows show",
                "name the columns by --map, which leaves out all others",
            )


def _add_media(record: Record, context: ImportContext, images: RowImages) -> list[ContentPart]:
    """Return the parts of images and videos of a row.

    An empty list yields no images. An empty cell is rejected.
    """
    parts: list[ContentPart] = []
    for role in MEDIA_ROLES:
        column = context.columns.get(role)
        # A format may map its only column of files to `image`, too.
        is_repeated = role == "video" and column == context.columns.get("image")
        if column is not None and not is_repeated:
            cell = _read_cell(record, context, role)
            items = _list_media(cell, role, has_columns="," in column)
            parts += [_add_file(item, role, images) for item in items]
    return parts


def _list_media(cell: object, role: str, *, has_columns: bool) -> list[object]:
    """Return the images or videos of a cell. A list of frames is a single video.

    Args:
        has_columns: The cell is a list of the values of several columns.
    """
    if not isinstance(cell, list):
        return [cell]
    if has_columns:
        return list(filter(has_value, cell)) or cell[:1]
    is_frames = role == "video" and not is_video_value(cell)
    return [cell] if is_frames else cell


def _add_file(value: object, role: str, images: RowImages) -> ContentPart:
    if isinstance(value, dict) and is_video_value(value):
        return images.add_video(value["path"])
    if role == "video" or is_video_value(value):
        return images.add_video(value)
    return images.add_image(value)


def _list_answers(record: Record, context: ImportContext) -> list[str]:
    """Return the texts of all correct answers in the column mapped to `answer`."""
    column = context.columns.get("answer", "")
    value = _read_cell(record, context, "answer")
    is_single = column in record or "," not in column
    is_object = isinstance(value, dict) and column not in record
    if is_single and (is_object or _is_joint_answer(value, column)):
        return [_to_json(value, column)]
    answers = as_list(value)
    check_limit(len(answers), MAX_ANSWERS, "answers")
    for answer in answers:
        if answer and isinstance(answer, dict | list | tuple):
            raise _build_structure_error(answer, column, is_item=answer is not value)
    return [_get_text(answer, "answer") for answer in answers]


def _build_structure_error(value: object, column: str, *, is_item: bool) -> InvalidRowError:
    """Build the error of a list or an object as an answer.

    Args:
        is_item: The value is one of several answers.
    """
    remedy = (
        f"as JSON, give a mapping file (--mapping) with answer: {{path: {column}, write: json}}"
    )
    if isinstance(value, dict):
        keys = [f"{column}.{key}" for key in value]
        remedy = f"for the answer in one of its keys, give --map answer={keys[0]}; {remedy}"
        if not is_item:
            fields = shlex.quote(f"fields={','.join(keys)}")
            remedy = f"for a JSON answer of several keys, give --map {fields}; {remedy}"
    return InvalidRowError(f"the answer is {str(value)[:60]!r}", "a text or a number", remedy)


def _is_joint_answer(value: object, column: str) -> bool:
    """Return whether a list is one answer: several numbers, or all labels of an image."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value, ClassNames):
        return True
    has_list_name = _find_name([column.rpartition(".")[2]], _list_names("list")) is not None
    if has_list_name and all(isinstance(item, str | int | float) for item in value):
        return True
    is_nested = isinstance(value[0], list)
    return (len(value) > 1 or is_nested) and is_numeric(value)


def place_images(images: list[ContentPart], question: str) -> list[ContentPart]:
    """Return images and question, with the images at its `<image>` if their numbers are equal.

    Images are also placed at `<image 1>` and so on, and videos at `<video>`.

    Raises:
        InvalidRowError: The `<video>` or the numbers of the question are not those of the row.
    """
    placeholder = "<image>"
    kinds = [part.type for part in images]
    check_image_order(NUMBERED_IMAGE.findall(question), kinds.count("image"), question)
    question = NUMBERED_IMAGE.sub("<image>", join_leading_media(question))
    if "video" in kinds and "<video>" in question:
        placeholder = "<(?:image|video)>"
        if re.findall("<(image|video)>", question) != kinds:
            raise InvalidRowError(
                f"the placeholders of {question[:60]!r} for {', '.join(kinds)}",
                "a `<video>` for each video, and an `<image>` for each image, in this order",
                "correct the placeholders, or remove them to put the files first",
            )
    first, *texts = re.split(placeholder, question)
    if len(texts) != len(images):
        return [*images, make_text_part(question)]
    pieces = [first, *itertools.chain.from_iterable(zip(images, texts, strict=True))]
    return [make_text_part(one) if isinstance(one, str) else one for one in pieces if one]


def _join_cells(names: Sequence[str], cells: Sequence[object]) -> tuple[str, list[str]]:
    """Join the cells of a question, one a line, and return the options.

    Empty cells, such as the input of an instruction, are left out.
    """
    filled: dict[str, object] = {}
    for name, cell in zip(names, cells, strict=True):
        if has_value(cell) and cell == cell:
            filled[name] = cell
    lettered = {name: match[1].upper() for name in names if (match := _OPTION.fullmatch(name))}
    option_lines: dict[str, str] = {}
    options: list[str] = []
    if len(lettered) > 1:
        found = [name for name in filled if name in lettered]
        options = [str(filled[name]) for name in found]
        letters = [lettered[name] for name in found]
        option_lines = dict(zip(found, letter_options(options, letters), strict=True))
    lines: list[str] = []
    for name, cell in filled.items():
        items = parse_list(cell)
        if name.lower() in _OPTION_LISTS and isinstance(items, list):
            options = list(map(str, items))
            check_limit(len(options), len(ascii_uppercase), "options")
            lines += letter_options(options)
        else:
            lines.append(option_lines.get(name, str(cell)))
    return "\n".join(lines), options


def _require_texts(
    names: Sequence[str], cells: Sequence[object], columns: Mapping[str, str]
) -> None:
    """Reject objects and lists in a question except for a list of options."""
    for name, cell in zip(names, cells, strict=True):
        is_options = name.lower() in _OPTION_LISTS
        value = cell
        text = ""
        if is_options and isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
            text = cell
            value = decode_json_list(text, (str, int, float, list, tuple, dict, NoneType))
        if not has_value(cell) or not _is_structure(value):
            continue
        if is_options and isinstance(value, list) and _has_texts(value):
            continue
        notation = _find_notation(text) if text else ""
        remedy = "write one text into each cell, or name a column of texts"
        choices = _find_choices(name, value)
        is_path = all(map(_PATH_NAME.fullmatch, [*names, *columns.values()]))
        can_map = is_options and is_path and name != names[0] and "box" not in columns
        if choices and can_map:
            parse = {name: notation} if notation else {}
            others = [other for other in names if other != name]
            mapping = _format_choices_mapping(columns, others, choices, parse)
            remedy = f"write {mapping} into a file, and give it as --mapping instead of --map"
            if isinstance(value, list) and isinstance(value[0], dict):
                remedy += f"; KEY is the key of the texts, of {', '.join(map(str, value[0]))}"
        elif isinstance(value, dict) and not notation:
            inner = ",".join(f"{name}.{key}" for key in value)
            remedy = f"name keys inside of the column: {inner} instead of {name}"
        raise InvalidRowError(
            f"{str(cell)[:60]} in the column {name!r} of the question",
            "texts or numbers, or a list of them under a name such as options",
            remedy,
        )


def _find_notation(text: str) -> str:
    """Return the value of `parse` in a mapping for a list or an object as text."""
    try:
        json.loads(text)
    except ValueError:
        return "python"
    return "json"


def _is_structure(value: object) -> bool:
    return isinstance(value, dict | list | tuple | bytes)


def _has_texts(items: Sequence[object]) -> bool:
    """Return whether all items of a list are texts or numbers."""
    return not any(item is None or _is_structure(item) for item in items)


def _find_choices(name: str, value: object) -> str:
    """Return the path of the options in a column for a mapping.

    It is empty if the value has none.
    """
    if isinstance(value, dict):
        has_letters = len(value) > 1 and find_letters([*map(str, value)])
        return f"{name}.*" if has_letters else ""
    if not isinstance(value, list):
        return ""
    if isinstance(value[0], dict):
        return f"{name}.*.KEY"  # the user replaces KEY
    return name if _has_texts(value) else ""


def _format_choices_mapping(
    columns: Mapping[str, str], questions: Sequence[str], choices: str, parse: Mapping[str, str]
) -> str:
    """Format a mapping of the same columns with choices.

    Args:
        questions: Columns of the question without the choices.
        parse: Notation of columns with structures as text.
    """
    mapping: dict[str, object] = {"version": 1}
    if parse:
        mapping["parse"] = dict(parse)
    for role in MEDIA_ROLES:
        if role in columns:
            mapping[f"{role}s"] = columns[role].split(",")
    mapping["question"] = {"template": "\n".join(f"{{{name}}}" for name in questions)}
    if len(questions) == 1:
        mapping["question"] = questions[0]
    mapping["choices"] = choices
    if "answer" in columns:
        mapping["answer"] = columns["answer"]
    if "fields" in columns:
        mapping["fields"] = columns["fields"].split(",")
    mapping["ignore"] = ["*"]
    text: str = yaml.safe_dump(
        mapping, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.strip()


def find_letters(keys: Sequence[str]) -> list[str]:
    """Return the letters of choices by their keys; none if these state no letters.

    `option_b` is B. Keys such as `option1` and `option2` are the choices in their order.
    """
    letters: list[str] = []
    numbers: list[int] = []
    stems: set[str] = set()
    for key in keys:
        if match := re.fullmatch(r"(?i)(?:(?:option|choice)[_ ]?)?([A-Z])", key):
            letters.append(match[1].upper())
        elif match := _NUMBERED_KEY.fullmatch(key):
            stems.add(match[1])
            numbers.append(int(match[2]))
    if len({*letters}) == len(keys) > 0:
        return letters
    is_numbered = len(numbers) == len(keys) > 0 and len(stems) == 1 and numbers[0] in (0, 1)
    if is_numbered and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return list(ascii_uppercase[: len(numbers)])
    return []


def letter_options(options: Sequence[str], letters: Sequence[str] = ascii_uppercase) -> list[str]:
    """Return the options of a question with their letters: `A. left`, `B. right`.

    Options that have their own letters, such as `(A) left`, are not changed.
    """
    pairs = list(zip(letters, options, strict=False))
    if all(_has_own_letter(option, letter) for letter, option in pairs):
        return list(options)
    return [f"{letter}. {option}" for letter, option in pairs]


def _has_own_letter(option: str, letter: str) -> bool:
    return re.match(rf"\s*(?:\({letter}\)|{letter}[.):：．、])\s*\S", option) is not None


def omit_classes(
    content: tuple[ContentPart, ...],
    omitted: Mapping[str, InvalidBoxError],
    boxes: Sequence[BoxPart],
) -> tuple[ContentPart, ...]:
    """Remove classes of dropped boxes from a question, or raise if it still asks for such boxes."""
    for label, error in omitted.items():
        name = _match_name(label)
        in_list = re.compile(rf"(?:^|(?<=[:：,、] )){name}, |, (?:and |or )?{name}(?=$|[\s.,;:?!])")
        previous = join_text(content, "\n")
        content = tuple(
            TextPart(text=in_list.sub("", part.text)) if part.type == "text" else part
            for part in content
        )
        question = join_text(content, "\n")
        names = {_match_name(str(box.label)) for box in boxes}
        is_listed = question != previous or any(re.search(one, question) for one in names)
        if re.search(name, question) or not is_listed:
            raise forbid_drop(error)
    return content


def _match_name(label: str) -> str:
    return rf"(?a:(?<!\w){re.escape(label)}(?!\w))"


def format_media_options(columns: Mapping[str, str]) -> str:
    """Return the `--map` options of images and videos."""
    pairs = [f"{role}={columns[role]}" for role in MEDIA_ROLES if role in columns]
    return " ".join(f"--map {shlex.quote(pair)}" for pair in pairs)


def _check_media_columns(records: Sequence[Record], columns: Mapping[str, str], where: str) -> None:
    """Reject guessed roles of images beside videos, and of columns that may be bounds of clips."""
    video = columns.get("video")
    if video is None:
        return
    image = columns.get("image", video)
    if image != video:
        raise UserError(
            f"images in the column {image} and videos in {video}: the question may be about both",
            where=where,
            expected="one column of images or of videos",
            remedy=f"give --map image={image},{video} --map answer=COLUMN for both, or name one of"
            " them only",
        )
    roles = ",".join(columns.get(role, "") for role in ("video", "question", "answer")).split(",")
    question = ", and --map question=COLUMN if there is one"
    if "question" in columns:
        question = f" --map {shlex.quote('question=' + columns['question'])}"
    for name in map(str, records[0]):
        words = [word.lower() for word in _WORDS.findall(name)]
        is_bound = any(map(_CLIP_BOUND.fullmatch, words)) and not _SIZE_WORDS.intersection(words)
        is_number = any(_TIMES.fullmatch(str(record.get(name))) for record in records)
        if name not in roles and is_bound and is_number:
            raise UserError(
                f"the column {name!r} may select a part of the videos, and would be left out",
                where=where,
                expected="videos that are used as a whole",
                remedy="cut the clips into files of their own; or if the question needs the whole"
                f" videos, give {format_media_options(columns)} --map answer=COLUMN{question}",
            )


def format_columns(columns: Mapping[str, str], roles: Sequence[str]) -> list[str]:
    """Return the names of all columns with one of the roles."""
    return ",".join(columns[role] for role in roles if role in columns).split(",")


class UnknownRolesError(UserError):
    """Raised if the keys of records do not state what is question and answer."""


def check_guessed_columns(
    records: Sequence[Record], columns: Mapping[str, str], where: str
) -> None:
    """Raise UserError if no column has the answers, or an answer depends on an unused column."""
    if not columns.keys() & {"answer", "fields", "box"}:
        raise UnknownRolesError(
            f"no answer column among {', '.join(map(str, records[0]))}",
            where=where,
            expected="a column with a known name, such as answer, caption, or objects with bbox and"
            " categories; or a single column besides the image",
            remedy=f"name the column: {format_media_options(columns)} --map answer=COLUMN, or --map"
            " fields=COLUMN,COLUMN",
        )
    _check_media_columns(records, columns, where)
    mapping = " ".join(f"--map {shlex.quote(f'{k}={v}')}" for k, v in columns.items())
    known: dict[str, None] = {}
    for record in records:
        known.update(dict.fromkeys(list_unused_columns(record, columns)))
    for name in known:
        values = [get_cell(record, name) for record in records]
        for value in values:
            meaning = find_meaning(str(name), value, ROWS)
            is_constant = meaning is LOSS and len(set(map(str, values))) == 1
            is_needed = meaning in (REASONING, LOSS, PREFERENCE) or name == "history"
            if meaning is not None and is_needed and not is_constant:
                raise UserError(
                    f"the column {str(name)!r}: {meaning.what}",
                    where=where,
                    expected="a table of questions and answers",
                    remedy=f"remove the column, or leave it out with {mapping}",
                )


def _read_cell(record: Record, context: ImportContext, role: str) -> object:
    """Return the value of the column mapped to a role, None without a mapping.

    Several comma-separated columns yield a list, such as the four coordinates of a box.
    """
    column = context.columns.get(role)
    if column is None:
        return None
    values = [get_cell(record, name) for name in find_some_columns(record, role, column)]
    return values[0] if len(values) == 1 else values


def find_some_columns(record: Collection[str], role: str, column: str) -> list[str]:
    """Return the columns mapped to a role, of which a record may lack all but one.

    Rows of JSON may lack some of several columns, which the first rows have.

    Raises:
        UserError: The record has none of them.
    """
    names = [column] if column in record else split_column_names(column, record)
    if any(name in record or name.partition(".")[0] in record for name in names):
        return names
    return find_columns(record, role, column)


def parse_list(cell: object) -> object:
    """Parse a cell with a list as JSON text or Python text; return other cells unchanged."""
    if not isinstance(cell, str) or not cell.lstrip().startswith("["):
        return cell
    if re.fullmatch(r"\s*\[\s*\]\s*", cell):
        return []
    return decode_json_list(cell, (str, int, float))


def get_cell(record: Record, name: str) -> object:
    """Return the value of a column, or of a key inside it: `objects.bbox`.

    A column with such a key may contain JSON as text.
    """
    if name in record:
        return record[name]
    column, _, key = name.partition(".")
    value = record.get(column)
    if isinstance(value, str):
        value = _parse_json_text(column, value)
    return _get_inner(value, key)


def _parse_json_text(column: str, text: str) -> object:
    """Parse a text of which `--map` names a key; a text without JSON has no keys.

    Raises:
        InvalidRowError: The text starts like JSON, but is invalid.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    check_json(text.encode(errors="replace"), "")
    try:
        return parse_unique_json(text)
    except ValueError as error:
        raise InvalidRowError(
            f"the column {column!r} with {text[:60]!r} is no JSON: {str(error)[:200]}",
            "JSON text, because --map names a key inside of the column",
            "correct the row, or map the column without a key",
        ) from error


def _get_inner(value: object, key: str) -> object:
    if isinstance(value, list | tuple):
        return [_get_inner(item, key) for item in value]
    if not isinstance(value, dict):
        return None
    if key in value or "." not in key:
        return value.get(key)
    outer, _, inner = key.partition(".")
    return _get_inner(value.get(outer), inner)


def find_columns(record: Collection[str], role: str, column: str, where: str = "") -> list[str]:
    """Return the columns mapped to a role, of which several are separated by commas.

    Raises:
        UserError: The record does not have one of them.
    """
    if column in record:
        return [column]
    names = split_column_names(column, record)
    for name in names:
        if name not in record and name.partition(".")[0] not in record:
            otherwise = "name one of these columns" if record else "add the columns to the file"
            remedy = suggest_name(name, map(str, record), otherwise)
            if "=" in name:
                remedy = f"repeat --map for each role: --map {shlex.quote(name)}"
            raise UserError(
                f"no column {name!r} for --map {role}={column}",
                where=where,
                expected=describe_choices(record, "column"),
                remedy=remedy,
            )
    return names


def split_column_names(column: str, record: Collection[str]) -> list[str]:
    """Split the comma-separated columns mapped to a role, without surrounding spaces."""
    return [name if name in record else name.strip() for name in column.split(",")]


def _is_empty(value: object) -> bool:
    """Return whether a cell is empty, blank or NaN, the only value that is not itself."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _get_text(value: object, role: str) -> str:
    if _is_empty(value) or isinstance(value, dict | list | bytes):
        error_type = EmptyAnswerError if role == "answer" else UserError
        raise error_type(
            f"the {role} is {str(value)[:60]!r}",
            expected="text or a number",
            remedy="write one text, or remove the row",
        )
    return str(value)


def _build_json_answers(row: SourceRow, context: ImportContext) -> list[str]:
    """Build the answer, a JSON object, from the columns mapped to `fields`.

    Keys are column names, and empty cells are omitted. The list is empty if all cells are empty or
    no columns are mapped.
    """
    column = context.columns.get("fields")
    if column is None:
        return []
    names, what = find_some_columns(row.record, "fields", column), ""
    # The key of `entities.total` is `total`.
    keys = [name if name in row.record else name.rpartition(".")[2] for name in names]
    duplicate, count = Counter(keys).most_common(1)[0]
    if "answer" in context.columns:
        what = f"fields={column} together with answer={context.columns['answer']}"
        expected = "an answer in one column, or in several"
    elif count > 1:
        what, expected = (
            f"the duplicate column {duplicate!r} in fields={column}",
            "each column once",
        )
    if what:
        remedy = "remove one of the two"
        raise InvalidOptionError(what, where="--map", expected=expected, remedy=remedy)
    cells = {key: get_cell(row.record, name) for key, name in zip(keys, names, strict=True)}
    members = [_format_member(key, cell) for key, cell in cells.items() if not _is_empty(cell)]
    return [f"{{{', '.join(members)}}}"] if members else []


def _format_member(name: str, value: object) -> str:
    written = _to_json(value, name)
    try:
        return make_text_part(f"{json.dumps(name, ensure_ascii=False)}: {written}").text
    except UnexpectedPlaceholderError as error:
        error.what = f"in the column {name!r}: {error.what}"
        raise


def _to_json(value: object, name: str) -> str:
    """Return the JSON text of a value in a column."""
    try:
        return dump_json(value)
    except ValueError as error:
        raise UserError(
            f"the column {name!r} with {str(value)[:60]} cannot be written as JSON ({error})",
            expected="a text, a number, or a list or object of them",
            remedy="correct the row, or remove it",
        ) from error


def _create_boxes(
    row: SourceRow, context: ImportContext, images: RowImages
) -> tuple[tuple[BoxPart, ...], dict[str, InvalidBoxError]]:
    """Return the boxes of a row, and the errors of dropped boxes by labels without another box."""
    pairs: list[tuple[object, str | None]] = []
    frame = get_default_frame(context.columns.get("box", ""))
    for record in (row.record, *row.more_records):
        boxes = _read_boxes(record, context.columns.get("box", ""))
        cells = as_list(parse_list(_read_cell(record, context, "label")))
        names = ["" if _is_empty(one) else _get_text(one, "label") for one in cells]
        if len(names) != len(boxes) or not any(names):
            names = list(filter(None, names))
        if boxes:
            images.require_single_image()
        if names and len(names) != len(boxes):
            problem = f"{len(names)} labels for {len(boxes)} boxes"
            raise InvalidRowError(problem, "a label for each box")
        pairs += itertools.zip_longest(boxes, names)
    return create_labelled_boxes(pairs, images, frame)


def list_labels(rows: Iterable[SourceRow], column: str) -> list[str]:
    """Return the different labels in a column in alphabetical order."""
    labels: set[str] = set()
    for row in rows:
        for record in (row.record, *row.more_records):
            cells: list[object] = []
            with suppress(InvalidRowError):  # reported when the row is parsed
                cells = as_list(parse_list(get_cell(record, column)))
            labels.update(str(cell) for cell in cells if not _is_empty(cell))
    return sorted(labels)


def create_labelled_boxes(
    pairs: Sequence[tuple[object, str | None]], images: RowImages, frame: BoxFrame
) -> tuple[tuple[BoxPart, ...], dict[str, InvalidBoxError]]:
    """Create boxes from coordinates and labels.

    Returns the boxes, and the errors of dropped boxes by labels without another box.

    Raises:
        InvalidRowError: Only some of the boxes have a label.
        InvalidBoxError: A box is invalid and the import does not drop it, or without it the
            question would lack an object.
    """
    found = [images.create_valid_box(*pair, frame) for pair in pairs]
    parts = tuple(one for one in found if isinstance(one, BoxPart))
    labels = {part.label for part in parts}
    named = labels - {"", None}
    if named and named != labels:
        problem = f"a box without a label beside {format_count(len(named), 'label')}"
        raise InvalidRowError(problem, "a label for each box", "add the label, or remove the row")
    omitted: dict[str, InvalidBoxError] = {}
    for (_, label), box in zip(pairs, found, strict=True):
        if isinstance(box, BoxPart) or (isinstance(box, StrayBoxError) and label in labels):
            continue
        if not parts or label in labels or not (label or isinstance(box, StrayBoxError)):
            raise forbid_drop(box)
        omitted |= {label: box} if label else {}
    return parts, omitted


def get_default_frame(column: str) -> BoxFrame:
    """Return the frame of boxes that the name of a column, or of four columns, states.

    Boxes under `objects` are those of Hugging Face datasets, in the format of COCO.
    """
    default: Order = "xywh" if column.startswith("objects.") else "xyxy"
    return BoxFrame(find_stated_format(column) or default)


@functools.lru_cache(maxsize=100)
def find_stated_format(column: str) -> Order | None:
    """Return the box format that the name of a column, or of four columns, states."""
    coordinates = ",".join(map(_normalize_coordinate, column.split(",")))
    stated = _FORMAT_IN_NAME.search(column)
    for box_format, variants in _BOX_COLUMNS.items():
        if coordinates in variants or (stated and stated.lastgroup == box_format):
            return box_format
    return None


def _normalize_coordinate(name: str) -> str:
    return re.sub(r"[\W_]", "", _BOX_PREFIX.sub("", name)).lower()


def _read_boxes(record: Record, column: str) -> list[object]:
    """Return the boxes of a record, from one column or from four columns of coordinates.

    Four empty cells are no box, and four lists are the coordinates of several boxes.
    """
    if not column:
        return []
    cells = [get_cell(record, name) for name in find_some_columns(record, "box", column)]
    if len(cells) == 1:
        return _parse_boxes(cells[0])
    if all(isinstance(cell, list) for cell in cells):
        return [list(box) for box in zip(*cells, strict=False)]
    return [] if all(map(_is_empty, cells)) else [cells]


def _parse_boxes(value: object) -> list[object]:
    """Parse a table cell with one box or a list of boxes.

    A text cell may be "1, 2, 3, 4" with or without brackets and commas, as printed by Python and
    NumPy.
    """
    if isinstance(value, str) and value.strip():
        check_limit(len(value), MAX_CELL_CHARS, "characters of boxes")
        try:
            parsed = ast.literal_eval(_SEPARATOR.sub(",", value.strip()))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        if not isinstance(parsed, list | tuple):
            return [value]  # reported when the coordinates are parsed
        value = parsed
    items = [] if _is_empty(value) else as_list(value)
    return items if not items or isinstance(items[0], list | tuple) else [items]


def write_files(samples: Sequence[LocatedSample], context: ExportContext) -> Files:
    """Write table rows of image, question, answer, box and label.

    The `--map` options that import the table are reported as a note.
    """
    columns: dict[str, bool] = {}

    def make_fields(located_sample: LocatedSample, context: ExportContext) -> Record:
        row = _build_row(located_sample, context)
        if columns.setdefault("question", "question" in row) != ("question" in row):
            raise _build_unsupported_error("a mix of samples with and without questions")
        columns.update(dict.fromkeys(row, True))
        return {role: row.get(role) for role in _COLUMN_ROLES}

    yield from write_rows(samples, context, make_fields)
    options = [f"--map {role}={role}" for role in _COLUMN_ROLES if columns.get(role)]
    prompt_options = [] if columns["question"] else ['--prompt ""']
    context.notes.append(f"to read the table: {' '.join(options + prompt_options)}")


def _build_row(located_sample: LocatedSample, context: ExportContext) -> Record:
    messages = located_sample.sample.messages
    if [message.role for message in messages] != ["user", "assistant"]:
        raise _build_unsupported_error(
            f"turns of {', '.join(message.role for message in messages)}"
        )
    renderer = PartRenderer(located_sample, context)
    question_text = "".join(renderer.render(part) for part in messages[0].content)
    image_names = renderer.image_names
    question = question_text.removeprefix("<image>" * len(image_names))
    if "<image>" in question:
        raise _build_unsupported_error("an image after text")
    row: Record = {"image": image_names[0] if len(image_names) == 1 else image_names}
    if question:
        row["question"] = question
    content = messages[1].content
    is_box = [isinstance(part, BoxPart) for part in content]
    first_box = [*is_box, True].index(True)
    boxes = [part for part in content[first_box:] if isinstance(part, BoxPart)]
    text = format_answer(content[:first_box], len(image_names))
    if len(boxes) < len(content) - first_box or (text and boxes and not text.endswith("\n")):
        text, boxes = format_answer(content, len(image_names)), []
    if any(box.label is not None and not box.label.strip() for box in boxes):
        raise _build_unsupported_error("a box with a blank label")
    if boxes and len(image_names) != 1:
        raise _build_unsupported_error(f"boxes among {len(image_names)} images")
    if text:
        row["answer"] = text.removesuffix("\n") if boxes else text
    if boxes:
        row["box"] = list(map(list_coordinates, boxes))
    if any(box.label is not None for box in boxes):
        row["label"] = [box.label for box in boxes]
    return row


def _build_unsupported_error(what: str) -> UserError:
    return UserError(
        what,
        expected="images, then an optional question in all samples, then an answer",
        remedy="export to ms-swift or samples, or remove the sample",
    )


COMPONENT = DatasetFormat(
    name="table",
    description="any columns, named by --map image=COLUMN --map answer=COLUMN",
    parse_row=parse_row,
    supported_options=frozenset({"map", "prompt", "boxes", "points"}),
    write_files=write_files,
    # The last one: any columns match.
    position=210,
)
