"""Answers with boxes in their text, the way Qwen2.5-VL or Qwen2-VL writes them.

The former are JSON under `bbox_2d`, one or a list of them, text around it kept, a ```json fence
dropped, as each family writes its own: corners in pixels of the original picture. The latter stand
in marks, <|object_ref_start|>dog<|object_ref_end|><|box_start|>(88,99),(500,700)<|box_end|>, on a
grid of 1000. --box-format and --box-units say other. Left as text, boxes would stand in no known
frame once a picture is resized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from finesight.data.boxes import BoxForm
from finesight.data.formats.format import Scene, pieces, plain, worded
from finesight.data.json_boxes import BOX_KEY, Item, around_boxes, box_item, unfenced
from finesight.data.limits import MAX_BOXES, check_count
from finesight.data.sample import BoxPart, Part, TextPart, shortest
from finesight.errors import UserError

GRID = BoxForm(units="1000")
_NUMBER = r"-?\d+(?:\.\d+)?"
_POINT = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_CORNERS = re.compile(rf"<\|box_start\|>\s*({_POINT}\s*,\s*{_POINT})\s*<\|box_end\|>")
_MARKED = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>(?s:(?:(?!<\|object_ref_).)*))<\|object_ref_end\|>\s*)?"
    rf"(?P<boxes>(?:{_CORNERS.pattern})+)"
)
Boxes = list[Item]


def answer_parts(answer: str, scene: Scene) -> Iterator[Part]:
    """Text and boxes of an answer in turn.

    Raises UserError where `bbox_2d` or a mark remains as text, and where more than one picture or
    none is there for a box.
    """
    marked = pieces(answer, _MARKED) if "<|box_start|>" in answer else filter(None, (answer,))
    for found in marked:
        if isinstance(found, str):
            yield from _json_parts(found, scene)
            continue
        scene.need_one_picture()
        for box in _CORNERS.findall(found["boxes"]):
            yield scene.box(re.findall(_NUMBER, box), found["label"], GRID)


def _json_parts(answer: str, scene: Scene) -> Iterator[Part]:
    if BOX_KEY not in answer:
        yield worded(answer)
        return
    for piece in _boxes_in(unfenced(answer)):
        if isinstance(piece, str):
            yield worded(piece)
            continue
        scene.need_one_picture()
        for numbers, label in piece:
            yield scene.box(numbers, label, BoxForm())


def answer_text(content: Sequence[Part], pictures: int) -> str:
    """Text and boxes of an answer as `answer_parts` reads them back, in pixels of the original.

    Raises UserError where it would read something else, as in a text with `bbox_2d` in it.
    """
    said: list[str | Boxes] = []
    for part in content:
        if isinstance(part, BoxPart):
            label = None if part.label is None else plain(part.label).text
            box = Item([shortest(number) for number in part.xyxy], label)
            said = [*said[:-1], [*_run(said), box]] if _run(said) else [*said, [box]]
        elif isinstance(part, TextPart):
            before = said.pop() if said and isinstance(said[-1], str) else ""
            said.append(f"{before}{plain(part.text).text}")
        else:
            raise UserError(
                f"a part of type {part.type} in an answer",
                expected="text and boxes",
                remedy="leave the sample out",
            )
    text = "".join(piece if isinstance(piece, str) else _as_json(piece) for piece in said)
    said = [piece for piece in said if piece]
    if BOX_KEY in text and (pictures != 1 or list(_boxes_in(text)) != said):
        raise UserError(
            f"boxes that cannot be told from the text around them or their picture: {text[:80]!r}",
            expected=f"boxes in one picture, and no {BOX_KEY} or bracket in the text beside them",
            remedy="export to samples or to ms-swift, or leave the sample out",
        )
    return text


def _run(said: list[str | Boxes]) -> Boxes:
    """The boxes at the end of the said, to which the next one belongs."""
    return said[-1] if said and not isinstance(said[-1], str) else []


def _as_json(boxes: Boxes) -> str:
    items = [
        {BOX_KEY: numbers} if label is None else {BOX_KEY: numbers, "label": label}
        for numbers, label in boxes
    ]
    return json.dumps(items[0] if len(items) == 1 else items, ensure_ascii=False)


def _boxes_in(text: str) -> Iterator[str | Boxes]:
    for piece in around_boxes(text):
        if not isinstance(piece, str):
            check_count(len(piece), MAX_BOXES, "boxes")
            yield [_item(value) for value in piece]
            continue
        if BOX_KEY in piece:
            raise UserError(
                f"{BOX_KEY} outside of JSON in the answer {piece[:80]!r}",
                expected=f'{{"{BOX_KEY}": [x1, y1, x2, y2]}}',
                remedy="correct the row",
            )
        if piece:
            yield piece


def _item(value: object) -> Item:
    item = box_item(value)
    if item is None:
        raise UserError(
            f"the box {str(value)[:80]}",
            expected=f'{{"{BOX_KEY}": [four numbers], "label": text}}',
            remedy="correct the row",
        )
    return item
