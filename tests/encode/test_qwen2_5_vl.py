"""Qwen2.5-VL's box dialect, there and back."""

from __future__ import annotations

import json

import pytest
from box_fixtures import image_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

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


LABELS = (None, "cat", 'a "b" {"bbox_2d": [1, 2, 3, 4]}', "猫\\n")


@settings(max_examples=500)
@given(image_boxes(28, LABELS), st.integers(1, 3))
def test_roundtrip_error_is_below_half_a_pixel(box: ImageBox, count: int) -> None:
    (text,) = FAMILY.write_boxes([box] * count)
    assert isinstance(text, str)
    found = FAMILY.read_boxes(f"Here: {text}<|im_end|>", box.original_size, box.resized_size)
    assert [one.label for one in found] == [box.label] * count
    (height, width), (resized_height, resized_width) = box.original_size, box.resized_size
    steps = [width / resized_width, height / resized_height] * 2
    for there, back, step in zip(box.xyxy, found[0].xyxy, steps, strict=True):
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


PIECES = ['{"bbox_2d": ', "[", "]", "{", "}", '"', ",", "1", "9" * 400, "-", ".5", "null", " "]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30))
def test_any_text_is_parsed_without_errors(pieces: list[str]) -> None:
    for box in FAMILY.read_boxes("".join(pieces), (100, 200), (200, 100)):
        json.dumps(box.xyxy, allow_nan=False)


def test_deep_text_is_parsed_without_errors() -> None:
    assert FAMILY.read_boxes('{"a":' + "[" * 100_000, (1, 1), (1, 1)) == []
