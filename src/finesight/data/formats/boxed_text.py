"""Answers with boxes as JSON in their text, the way Qwen2.5-VL writes them: under `bbox_2d`.

One or a list of them, text around the JSON kept, a ```json fence dropped, as each family writes its
own. Boxes are corners in pixels of the original picture unless --box-format or --box-units say
other. Left as text they would stand in no known frame once a picture is resized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from finesight.data.boxes import BoxForm
from finesight.data.formats.format import Scene, listed, plain
from finesight.data.sample import Part
from finesight.errors import UserError

BOX_KEY = "bbox_2d"
_LABELS = ("label", "text_content")
_FENCE = re.compile(r"```(?:json)?\s*([\[{][^`]*?\"bbox_2d\"[^`]*[\]}])\s*```")
_OPENING = re.compile(r"[\[{]")
Boxes = list[tuple[object, str | None]]


def answer_parts(answer: str, scene: Scene) -> Iterator[Part]:
    """Text and boxes of an answer in turn.

    Raises UserError where `bbox_2d` remains as text, and where more than one picture or none is
    there for a box.
    """
    if BOX_KEY not in answer:
        yield from map(plain, filter(None, [answer]))
        return
    for piece in _boxes_in(_FENCE.sub(r"\1", answer)):
        if isinstance(piece, str):
            yield plain(piece)
            continue
        scene.need_one_picture()
        for numbers, label in piece:
            yield scene.box(numbers, label, BoxForm())


def _boxes_in(text: str) -> Iterator[str | Boxes]:
    decoder, start, at = json.JSONDecoder(), 0, 0
    while found := _OPENING.search(text, at):
        try:
            value, at = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            at = found.end()
            continue
        if BOX_KEY in text[found.start() : at]:
            yield from filter(None, [text[start : found.start()]])
            yield _boxes(value)
            start = at
    if BOX_KEY in text[start:]:
        raise UserError(
            f"{BOX_KEY} outside of JSON in the answer {text[start:][:80]!r}",
            expected=f'{{"{BOX_KEY}": [x1, y1, x2, y2]}}',
            remedy="correct the row",
        )
    yield from filter(None, [text[start:]])


def _boxes(value: object) -> Boxes:
    boxes: Boxes = []
    for item in listed(value):
        if not isinstance(item, dict) or not {BOX_KEY} <= item.keys() <= {BOX_KEY, *_LABELS}:
            raise UserError(
                f"the box {str(item)[:80]}",
                expected=f'{{"{BOX_KEY}": [four numbers], "label": text}}',
                remedy="correct the row",
            )
        labels = [str(item[key]) for key in _LABELS if item.get(key) is not None]
        boxes.append((item[BOX_KEY], labels[0] if labels else None))
    return boxes
