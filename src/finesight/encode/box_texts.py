"""Boxes in the text of an answer as four families write them: found there, and written anew.

qwen_vl      <ref>dog</ref><box>(88,99),(500,700)</box>, thousandths of the picture, below 1000
qwen2_vl     the same between <|object_ref_start|>, <|box_start|> and their ends, 0 to 1000
qwen2_5_vl   {"bbox_2d": [56, 40, 320, 280], "label": "dog"}, pixels of the resized picture
qwen3_vl     the same JSON in thousandths of the picture, 0 to 1000
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from finesight.data.json_boxes import BOX_KEY, around_boxes, box_item, unfenced
from finesight.encode.dialect import (
    BELOW_1000,
    THOUSANDTHS,
    Corners,
    Piece,
    PlacedBox,
    Special,
    in_whole_numbers,
    scaled,
)
from finesight.encode.encoded import Size
from finesight.encode.qwen2_5_vl import Qwen25VL
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.encode.qwen_vl import TOKENS
from finesight.errors import UserError

NAMES = ("qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IN_PIXELS = "qwen2_5_vl"
"""The one family whose boxes have no meaning without the size that a picture is resized to."""

_JSON = ("qwen2_5_vl", "qwen3_vl")

SLACK = 1.0
"""Units that a box may stand out of its frame: as much as rounding its corners explains."""

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_FOUR = re.compile(rf"([\"']{BOX_KEY}[\"']\s*:\s*\[){_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}(\])")
_HINTS = {
    "qwen_vl": re.compile(r"</?(?:box|quad)>"),
    "qwen2_vl": re.compile(r"<\|(?:box|quad)_(?:start|end)\|>"),
    "qwen2_5_vl": re.compile(BOX_KEY),
    "qwen3_vl": re.compile(BOX_KEY),
}


@dataclass(frozen=True, slots=True)
class Found:
    """A box of an answer in its family's numbers; `shares` the label of the one before it."""

    label: str | None
    xyxy: Corners
    shares: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """Words between the marks of a reference, without a box."""

    words: str


Frames = Callable[[], tuple[Size, Size]]
"""Gives the frames (height, width) that the numbers of the old and the new text are in."""


def rewritten(text: str, source: str, target: str, frames: Frames) -> tuple[str, int]:
    """`text` with its boxes as `target` writes them, and how many there were.

    Where both families write JSON only the numbers change; else a code fence around the JSON is
    dropped. `frames` is asked where there is a box. Raises UserError for a box that cannot be read,
    lies outside of its frame or says more than `target` can, and for one of another family.
    """
    for name, hint in _HINTS.items():
        alien = hint.search(text) if hint.pattern != _HINTS[source].pattern else None
        if alien:
            raise UserError(
                f"{alien[0]!r} in the answer {text[:60]!r}",
                expected=f"boxes as {source} writes them",
                remedy=f"give --from {name} if that is their family, or correct the answer",
            )
    if source in _JSON and target in _JSON:
        return _renumbered(text, source, frames)
    pieces = list((_in_json if source in _JSON else _in_tokens)(text, source))
    boxes = sum(len(piece) for piece in pieces if isinstance(piece, list))
    return "".join(_written(piece, source, target, frames) for piece in pieces), boxes


def has_boxes(text: str) -> bool:
    """Whether a text holds the marks of any family's boxes."""
    return any(hint.search(text) for hint in _HINTS.values())


def _renumbered(text: str, source: str, frames: Frames) -> tuple[str, int]:
    def anew(match: re.Match[str]) -> str:
        x1, y1, x2, y2 = (float(number) for number in match.groups()[1:5])
        old, new = frames()
        _check((x1, y1, x2, y2), old, source)
        corners = in_whole_numbers(scaled((x1, y1, x2, y2), old, new), new)
        return f"{match[1]}{', '.join(map(str, corners))}{match[6]}"

    written, boxes = _FOUR.subn(anew, text)
    if boxes != text.count(BOX_KEY):
        raise _unreadable(text, source)
    return written, boxes


def _in_json(text: str, source: str) -> Iterator[str | Named | list[Found]]:
    for piece in around_boxes(unfenced(text)):
        if not isinstance(piece, str):
            yield [_item(value, source) for value in piece]
        elif BOX_KEY in piece:
            raise _unreadable(piece, source)
        else:
            yield piece


def _item(value: object, source: str) -> Found:
    item = box_item(value)
    if item is None:
        raise UserError(
            f"the box {str(value)[:80]}",
            expected=f'{{"{BOX_KEY}": [four numbers], "label": text}}, as marks in text hold no'
            " more",
            remedy="take the other keys out, or migrate to a family that writes JSON",
        )
    try:
        x1, y1, x2, y2 = (float(number) for number in item.numbers)
    except (TypeError, ValueError) as error:
        raise _unreadable(str(value), source) from error
    return Found(item.label, (x1, y1, x2, y2))


def _in_tokens(text: str, source: str) -> Iterator[str | Named | list[Found]]:
    marks = TOKENS.values() if source == "qwen_vl" else TOKENS
    ref, ref_end, box, box_end = map(re.escape, marks)
    label = rf"{ref}((?:(?!{ref_end}).)*){ref_end}"
    one = rf"(?:{label}\s*)?{box}\s*{_POINT}\s*,\s*{_POINT}\s*{box_end}"
    run: list[Found] = []
    end = 0
    for match in re.finditer(rf"{one}|{label}", text, re.DOTALL):
        name, *numbers, words = match.groups()
        between = text[end : match.start()]
        end = match.end()
        if run and (between or words is not None):
            yield run
            run = []
        yield _plain(between, source)
        if words is not None:
            yield Named(words)
            continue
        shares = name is None and bool(run)
        x1, y1, x2, y2 = (float(number) for number in numbers)
        run.append(Found(run[-1].label if shares else name, (x1, y1, x2, y2), shares))
    yield from ([run] if run else [])
    yield _plain(text[end:], source)


def _plain(text: str, source: str) -> str:
    if _HINTS[source].search(text):
        raise _unreadable(text, source)
    return text


def _written(piece: str | Named | list[Found], source: str, target: str, frames: Frames) -> str:
    if isinstance(piece, str):
        return piece
    if isinstance(piece, Named):
        named: list[Piece] = [
            Special("<|object_ref_start|>"),
            piece.words,
            Special("<|object_ref_end|>"),
        ]
        return piece.words if target in _JSON else _spelled(named, target)
    old, new = frames()
    for box in piece:
        _check(box.xyxy, old, source)
    if target in _JSON:
        return _spelled(
            Qwen25VL().write_boxes([_placed(b, b.label, old, new) for b in piece]), target
        )
    # A label that several boxes share is said once, as it was.
    labels = [None if box.shares else box.label for box in piece]
    for label in filter(None, labels):
        _plain_label(label, target)
    placed = [_placed(box, label, old, new) for box, label in zip(piece, labels, strict=True)]
    if target == "qwen_vl":
        placed = [_below_1000(box) for box in placed]
    return _spelled(Qwen2VL().write_boxes(placed), target)


def _placed(box: Found, label: str | None, old: Size, new: Size) -> PlacedBox:
    return PlacedBox(label, box.xyxy, original=old, resized=new)


def _below_1000(box: PlacedBox) -> PlacedBox:
    x1, y1, x2, y2 = scaled(box.xyxy, box.original, THOUSANDTHS)
    least = (min(x1, BELOW_1000), min(y1, BELOW_1000), min(x2, BELOW_1000), min(y2, BELOW_1000))
    return PlacedBox(box.label, least, original=THOUSANDTHS, resized=box.resized)


def _spelled(pieces: Sequence[Piece], target: str) -> str:
    """Pieces as text, special tokens by their names in the target family."""
    names = TOKENS if target == "qwen_vl" else {}
    return "".join(
        names.get(piece.token, piece.token) if isinstance(piece, Special) else piece
        for piece in pieces
    )


def _plain_label(label: str, target: str) -> None:
    marks = [mark for pair in TOKENS.items() for mark in pair if mark in label]
    if marks:
        raise UserError(
            f"the label {label[:60]!r} holds {marks[0]}",
            expected=f"a label without the marks of {target}",
            remedy="correct the label",
        )


def _check(xyxy: Corners, frame: Size, source: str) -> None:
    """Raise UserError for a box that is reversed or does not lie in the frame it is said to."""
    height, width = frame
    x1, y1, x2, y2 = xyxy
    inside = min(x1, y1) >= -SLACK and x2 <= width + SLACK and y2 <= height + SLACK
    if inside and x1 <= x2 and y1 <= y2:
        return
    pixels = source == IN_PIXELS
    raise UserError(
        f"the box [{', '.join(f'{number:g}' for number in xyxy)}] "
        + ("lies outside of its frame" if x1 <= x2 and y1 <= y2 else "is reversed"),
        expected=f"x1 <= x2 up to {width} and y1 <= y2 up to {height}"
        + (", the pixels of the resized picture" if pixels else ", thousandths of the picture"),
        remedy="give the --picture rule or --model that these boxes were made for, or correct them"
        if pixels
        else "give --from qwen2_5_vl if the numbers are pixels, or correct the box",
    )


def _unreadable(text: str, source: str) -> UserError:
    return UserError(
        f"a box that cannot be read in {text.strip()[:80]!r}",
        expected=f"boxes as {source} writes them, four numbers each",
        remedy="correct the answer, or leave the record out",
    )
