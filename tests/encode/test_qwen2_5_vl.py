"""Qwen2.5-VL's box dialect, there and back."""

from __future__ import annotations

import json
import random

import pytest

from finesight.encode.family import ImageBox, PredictedBox
from finesight.encode.qwen2_5_vl import Qwen25VL

FAMILY = Qwen25VL()


def test_boxes_are_written_in_resized_pixels() -> None:
    box = ImageBox('猫 "x"', (48, 36, 480, 359.9), (360, 480), (252, 336))
    alone = '{"bbox_2d": [34, 25, 336, 252], "label": "猫 \\"x\\""}'
    assert FAMILY.write_boxes([box]) == [alone]
    bare = ImageBox(None, (-0.4, 0, 1.4, 3), (3, 3), (28, 28))
    assert FAMILY.write_boxes([bare]) == ['{"bbox_2d": [0, 0, 13, 28]}']
    assert FAMILY.write_boxes([box, bare]) == [f'[{alone}, {{"bbox_2d": [0, 0, 13, 28]}}]']


def test_roundtrip_error_is_below_half_a_pixel() -> None:
    chance = random.Random(0)
    for _ in range(500):
        original = chance.randint(1, 3000), chance.randint(1, 3000)
        resized = chance.randint(1, 40) * 28, chance.randint(1, 40) * 28
        xs = sorted(chance.uniform(0, original[1]) for _ in range(2))
        ys = sorted(chance.uniform(0, original[0]) for _ in range(2))
        corners = (xs[0], ys[0], xs[1], ys[1])
        label = chance.choice((None, "cat", 'a "b" {"bbox_2d": [1, 2, 3, 4]}', "猫\\n"))
        boxes = [ImageBox(label, corners, original, resized)] * chance.randint(1, 3)
        (text,) = FAMILY.write_boxes(boxes)
        assert isinstance(text, str)
        found = FAMILY.read_boxes(f"Here: {text}<|im_end|>", original, resized)
        assert [box.label for box in found] == [label] * len(boxes)
        steps = [original[1] / resized[1], original[0] / resized[0]] * 2
        for there, back, step in zip(corners, found[0].xyxy, steps, strict=True):
            assert abs(there - back) <= step / 2 + 1e-9


ONE = (20.0, 10.0, 60.0, 20.0)
CAT = PredictedBox("cat", ONE)
CASES = [
    ('{"bbox_2d": [10, 20, 30, 40], "label": "cat"}', [CAT]),
    ('```json\n[\n\t{"bbox_2d": [10, 20, 30.0, 40], "label": "cat"}\n]\n```<|im_end|>', [CAT]),
    ('I see {"label": "cat", "bbox_2d": [10, 20, 30, 40]} there', [CAT]),
    ('{"bbox_2d": [10, 20, 30, 40], "text_content": "cat"}', [CAT]),
    ('{"bbox_2d": ["10", "20", "30", "40"]}', [PredictedBox(None, ONE)]),
    ('{"objects": [{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]}', [CAT]),
    ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [1, 2', [CAT]),
    ("{'bbox_2d': [10, 20, 30, 40]}", [PredictedBox(None, ONE)]),
    ("[10, 20, 30, 40]", [PredictedBox(None, ONE)]),
    ("```json\n[10, 20, 30, 40]\n```", [PredictedBox(None, ONE)]),
    ("the list [10, 20, 30, 40] of numbers", []),
    (r'{"bbox_2d": [10, 20, 30, 40], "label": "\ud83d"}', [PredictedBox("?", ONE)]),
    ('{"bbox_2d": [10, 20, 30]}', []),
    ('{"bbox_2d": [10, 20, 30, NaN]}', []),
    ('{"bbox_2d": [10, 20, 30, {}]}', []),
    ('{"bbox_2d": 7, "label": 5}', []),
    (r"\frac { a } { b } [ 1 ]", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "boxes"), CASES)
def test_lenient_box_parsing(text: str, boxes: list[PredictedBox]) -> None:
    assert FAMILY.read_boxes(text, (100, 200), (200, 100)) == boxes


def test_any_text_is_parsed_without_errors() -> None:
    chance = random.Random(0)
    pieces = ['{"bbox_2d": ', "[", "]", "{", "}", '"', ",", "1", "9" * 400, "-", ".5", "null", " "]
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 30)))
        for box in FAMILY.read_boxes(text, (100, 200), (200, 100)):
            json.dumps(box.xyxy, allow_nan=False)
    assert FAMILY.read_boxes('{"a":' + "[" * 100_000, (1, 1), (1, 1)) == []
