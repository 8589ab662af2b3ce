"""A file of conversations rewritten from one family's way of writing boxes to another's.

Any JSON: an array of records, one record a line, or one record. Answers are what the assistant says
in turns (`from`/`role`), under `response`, `output` and the like, and in `history`. Everything but
the texts with boxes stays as it is, byte for byte.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finesight.config import PictureRule
from finesight.data.formats.turns import ROLES, SPEAKER_KEYS
from finesight.data.jsonl import read_bytes
from finesight.data.pictures import Pictures
from finesight.encode.box_texts import IN_PIXELS, NAMES, has_boxes, rewritten
from finesight.encode.dialect import THOUSANDTHS
from finesight.encode.encoded import Size
from finesight.errors import UserError
from finesight.storage import write_file
from finesight.vision.resize import resized_size

Speaker = Literal["system", "user", "assistant"]

SAID_UNDER: dict[str, Speaker] = {
    **dict.fromkeys(("query", "instruction", "input", "human", "user", "prompt"), "user"),
    **dict.fromkeys(("response", "rejected_response", "output", "assistant"), "assistant"),
    **dict.fromkeys(("chosen", "rejected", "answer"), "assistant"),
    "system": "system",
}
"""Keys of a record or round that tell who says what stands under them."""

PICTURE_KEYS = ("image", "images", "image_url")
POINT_KEY = "point_2d"
"""Under it Qwen2.5-VL writes points, in the same pixels as its boxes; only boxes are rewritten."""

WITHOUT_PATHS = ("type", "detail")
DESCRIBED = 5
"""Bad records that are described; the others are counted."""

_PICTURE = re.compile(
    r"<img>([^<]*)</img>|<\|vision_start\|>((?:(?!<\|vision_).)*)<\|vision_end\|>", re.DOTALL
)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DEMAND = re.compile(
    r"bbox|<box>|<\|box_start\|>|\bjson\b|coordinate|\bx_?min\b|\bx1\b|\b1000\b|坐标",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Resizing:
    """How pictures are resized for Qwen2.5-VL: the rule, and what sides are multiples of."""

    rule: PictureRule
    factor: int


@dataclass(frozen=True, slots=True)
class Migrated:
    """What a migration did. `left` are the places of questions that speak of a way to write boxes,
    of answers with points, and of other texts with boxes: they stay as they are, and may contradict
    the new answers."""

    file: Path
    records: int
    boxes: int
    answers_with_boxes: int
    answers_without: int
    left: tuple[str, ...]


class _Object(list[tuple[str, Any]]):
    """A JSON object with all its pairs in order."""


@dataclass(frozen=True, slots=True)
class _Text:
    """One text of a record: the number of its literal in the file, and who says it."""

    number: int
    text: str
    speaker: Speaker | None
    is_picture: bool


@dataclass(slots=True)
class _Work:
    """What is counted and gathered on the way through a file."""

    migrate: Callable[[str, list[object]], tuple[str, int]]
    boxes: int = 0
    with_boxes: int = 0
    without: int = 0
    left: dict[str, None] = field(default_factory=dict)
    bad: list[tuple[str, UserError]] = field(default_factory=list)


def migrate_file(
    file: Path, out: Path, source: str, target: str, resizing: Resizing | None = None
) -> Migrated:
    """Write `file` to `out` with its boxes as the family `target` writes them.

    `resizing` is needed, and taken, when one of the families is qwen2_5_vl: its boxes are pixels of
    the resized picture, whose size is that of the record's one picture. Raises UserError, and
    writes nothing, when `out` exists or any box cannot be read or placed.
    """
    _check(out, source, target, resizing)
    pictures = Pictures(file.parent, out.parent)

    def migrate(text: str, named: list[object]) -> tuple[str, int]:
        def frames() -> tuple[Size, Size]:
            resized = _resized(named, pictures, resizing) if resizing else THOUSANDTHS
            old, new = (resized if name == IN_PIXELS else THOUSANDTHS for name in (source, target))
            return old, new

        return rewritten(text, source, target, frames)

    work = _Work(migrate)
    chunks = list(_chunks(_decoded(file), file))
    written = "".join(_migrated(text, records, work) for text, records in chunks)
    if work.bad:
        raise _refusal(work.bad, file)
    write_file(out, written.encode())
    return Migrated(
        file=out,
        records=sum(len(records) for _, records in chunks),
        boxes=work.boxes,
        answers_with_boxes=work.with_boxes,
        answers_without=work.without,
        left=tuple(work.left),
    )


def _check(out: Path, source: str, target: str, resizing: Resizing | None) -> None:
    for option, name in (("--from", source), ("--to", target)):
        if name not in NAMES:
            raise UserError(
                f"unknown family {name!r}",
                where=option,
                expected=f"one of {', '.join(NAMES)}",
                remedy="name one of these",
            )
    if source == target:
        raise UserError(
            f"both families are {source}",
            where="--to",
            expected="another family",
            remedy="name the family whose model is to be tuned",
        )
    if (IN_PIXELS in (source, target)) != (resizing is not None):
        needed = resizing is None
        raise UserError(
            f"{'not given' if needed else 'given'} for {source} to {target}",
            where="--model or --picture",
            expected=f"how pictures are resized, as {IN_PIXELS} counts pixels after that"
            if needed
            else f"no rule, as only {IN_PIXELS} counts pixels",
            remedy="give the folder of the model, or --picture with the rule of the recipe"
            if needed
            else "leave it out",
        )
    if out.exists():
        raise UserError(
            "exists already",
            where=str(out),
            expected="a file that does not exist yet",
            remedy="choose another name, or remove it",
        )


def _resized(named: list[object], pictures: Pictures, resizing: Resizing) -> Size:
    """The size after resizing of the one picture that a record names."""
    if len(named) != 1:
        raise UserError(
            f"a box in a record of {len(named)} pictures",
            expected="one picture, so that it is plain how large the box's picture is",
            remedy="leave the record out, or import the file and let finesight write the boxes",
        )
    path = pictures.take(named[0])
    return resized_size(pictures.size(path), resizing.rule, resizing.factor, str(path))


def _decoded(file: Path) -> str:
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(file),
            expected="a file in UTF-8",
            remedy="save the file as UTF-8",
        ) from error


def _chunks(text: str, file: Path) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Pieces of a file that are JSON by themselves, with the places and data of their records."""
    try:
        whole = json.loads(text, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, _Object):
        yield text, [("the record", whole)]
        return
    if isinstance(whole, list):
        yield text, [(f"row {number}", record) for number, record in enumerate(whole, start=1)]
        return
    for number, line in enumerate(_LINE.findall(text), start=1):
        if not line.strip():
            yield line, []
            continue
        try:
            record = json.loads(line, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"broken JSON: {error}",
                where=f"{file}:{number}",
                expected="a JSON array of records, or one record on each line",
                remedy="correct this line",
            ) from error
        yield line, [(f"line {number}", record)]


def _migrated(text: str, records: list[tuple[str, Any]], work: _Work) -> str:
    """A piece of JSON text with its answers rewritten in their places."""
    numbers = itertools.count()
    changes: dict[int, str] = {}
    for place, record in records:
        texts = list(_texts(record, numbers))
        named = _pictures_named(texts)
        for one in texts:
            if one.is_picture:
                continue
            if one.speaker != "assistant":
                if _DEMAND.search(one.text) if one.speaker == "user" else has_boxes(one.text):
                    work.left[place] = None
                continue
            try:
                written, boxes = work.migrate(one.text, named)
            except UserError as problem:
                work.bad.append((place, problem))
                continue
            work.boxes += boxes
            work.with_boxes += boxes > 0
            work.without += boxes == 0
            if POINT_KEY in one.text:
                work.left[place] = None
            if written != one.text:
                changes[one.number] = written
    return _spliced(text, changes) if changes else text


def _spliced(text: str, changes: dict[int, str]) -> str:
    """`text` with those of its string literals replaced, escaped as they were."""
    literals = itertools.count()

    def replaced(match: re.Match[str]) -> str:
        number = next(literals)
        if number not in changes:
            return match[0]
        return json.dumps(changes[number], ensure_ascii="\\u" in match[0])

    return _LITERAL.sub(replaced, text)


def _texts(
    value: Any,
    numbers: Iterator[int],
    speaker: Speaker | None = None,
    is_picture: bool = False,
) -> Iterator[_Text]:
    """Every text below `value` in the order of the file; keys take numbers as well."""
    if isinstance(value, str):
        yield _Text(next(numbers), value, speaker, is_picture)
    elif isinstance(value, _Object):
        by_key = dict(value)
        said = next((by_key[key] for key in SPEAKER_KEYS if key in by_key), None)
        speaker = ROLES.get(said) if isinstance(said, str) else speaker
        for key, inner in value:
            next(numbers)
            if key == "history":
                yield from _history(inner, numbers)
                continue
            shown = (is_picture or key in PICTURE_KEYS) and key not in WITHOUT_PATHS
            who = None if key in (*SPEAKER_KEYS, "type") else SAID_UNDER.get(key, speaker)
            yield from _texts(inner, numbers, who, shown)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, numbers, speaker, is_picture)


def _history(value: Any, numbers: Iterator[int]) -> Iterator[_Text]:
    """Earlier rounds, [question, answer] each; rounds of another shape tell who speaks."""
    rounds = value if isinstance(value, list) else [value]
    for pair in rounds:
        if isinstance(pair, _Object) or not isinstance(pair, list):
            yield from _texts(pair, numbers)
            continue
        for place, text in enumerate(pair):
            yield from _texts(text, numbers, "assistant" if place % 2 else "user")


def _pictures_named(texts: list[_Text]) -> list[object]:
    """The pictures of a record, each once: under its keys, and in marks of its texts."""
    named: dict[str, None] = {}
    for one in texts:
        if one.is_picture:
            named[one.text] = None
        elif one.speaker == "user":
            named |= {(first or second): None for first, second in _PICTURE.findall(one.text)}
    return list(named)


def _refusal(bad: list[tuple[str, UserError]], file: Path) -> UserError:
    lines = [f"{len(bad)} answers cannot be migrated; nothing was written"]
    for place, problem in bad[:DESCRIBED]:
        lines.append(f"  {place}: {f'{problem.where}: ' if problem.where else ''}{problem.what}")
    if len(bad) > DESCRIBED:
        lines.append(f"  and {len(bad) - DESCRIBED} more")
    first = bad[0][1]
    return UserError(
        "\n".join(lines), where=str(file), expected=first.expected, remedy=first.remedy
    )
