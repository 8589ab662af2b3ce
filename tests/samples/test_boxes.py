"""Every form of a box means the same corners in pixels."""

import json
import signal
from itertools import count
from typing import get_args

import numpy as np
import pytest
from case_files import load_cases

from finesight.errors import UserError
from finesight.samples.boxes import (
    MAX_JSON_DEPTH,
    TextBox,
    TextCoordinates,
    clip_to_image,
    iou,
    iter_json_values,
    pairwise_iou,
    parse_coordinates,
    parse_json_box,
    split_at_boxes,
    strip_code_fences,
)
from finesight.samples.frames import PIXELS, Box, Order, Unit, get_frame

CASES = load_cases("boxes")

SIZE = (200, 500)
CORNERS: Box = (50.0, 20.0, 150.0, 80.0)
BOX_VALUES = {
    "xyxy": (50, 20, 150, 80),
    "xywh": (50, 20, 100, 60),
    "cxcywh": (100, 50, 100, 60),
    "yxyx": (20, 50, 80, 150),
}


@pytest.mark.parametrize("units", get_args(Unit))
@pytest.mark.parametrize("form", get_args(Order))
def test_all_box_formats_give_the_same_corners(form: Order, units: Unit) -> None:
    height, width = SIZE
    full = {
        "pixel": (width, height),
        "1": (1, 1),
        "100": (100, 100),
        "1000": (1000, 1000),
        "resized": (504, 196),
    }[units]
    scales = (full[0] / width, full[1] / height) * 2
    if form == "yxyx":
        scales = scales[1:] + scales[:1]
    values = tuple(n * scale for n, scale in zip(BOX_VALUES[form], scales, strict=True))
    assert get_frame(form, units).to_pixels(values, SIZE) == pytest.approx(CORNERS, abs=1e-9)
    # The nearest float.
    assert get_frame("xyxy", "1000").to_pixels((588, 0, 725, 1000), (480, 360))[0] == 211.68


def test_rounding_outside_image_is_clipped():
    clipped = clip_to_image((-1.0, 0.0, 500.6, 201.0), SIZE, PIXELS)
    assert clipped == (0.0, 0.0, 500.0, 200.0)
    assert clip_to_image(CORNERS, SIZE, PIXELS) == CORNERS


@pytest.mark.parametrize(("box", "what"), CASES["test_invalid_boxes_are_rejected"])
def test_invalid_boxes_are_rejected(box: Box, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        clip_to_image(box, SIZE, PIXELS)
    assert "xywh" in caught.value.remedy
    assert "500" in caught.value.expected


def test_coordinates_are_four_finite_numbers():
    assert parse_coordinates(["1", 2, "3.5", 4.0]) == [1.0, 2.0, 3.5, 4.0]
    inexact = [[1, 2, 3], [1, 2, 3, 4, 5], "1234", [1, 2, 3, None], 5, [[1]], [1, 2, 3, 10**400]]
    for value in inexact:
        with pytest.raises(UserError, match="the box"):
            parse_coordinates(value)


@pytest.mark.parametrize(("a", "b", "expected"), CASES["test_iou"])
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == pytest.approx(expected)


ONE = '{"bbox_2d": [1, 2, 3, 4], "label": "dog"}'
DOG = [1, 2, 3, 4], "dog", False


def test_top_level_values_are_found_in_order() -> None:
    text = f"a [1, {{}}] b {{broken c {ONE} ["
    found = list(iter_json_values(text))
    assert [one.value for one in found] == [[1, {}], json.loads(ONE)]
    assert [text[one.start : one.stop] for one in found] == ["[1, {}]", ONE]
    # Objects alone are found in a list that breaks off.
    assert [one.value for one in iter_json_values(f"[{ONE}, {ONE}, {{", "{")] == [
        json.loads(ONE)
    ] * 2


def test_value_over_the_limit_of_levels_is_passed_over() -> None:
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert len(list(iter_json_values(deepest))) == 1
    assert list(iter_json_values(f"[{deepest}]")) == []
    assert list(iter_json_values("[" * 900 + "]" * 900)) == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2_000_000,
        "[0," * 1_000_000,
        ("[" + "0," * 1000) * 1000,
        ('{"a":[' + "0," * 1000) * 1000,
        "```[" + '"bbox_2d" x]' * 500_000,
    ],
)
def test_brackets_that_never_close_take_linear_time(text: str) -> None:
    """In the square of its length any of these takes minutes."""
    signal.alarm(30)
    try:
        assert list(iter_json_values(text)) == []
        assert strip_code_fences(text) == text
    finally:
        signal.alarm(0)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("none", ["none"]),
        (f"a {ONE} b", ["a ", [DOG], " b"]),
        (f"{ONE}{ONE}", ["", [DOG], "", [DOG], ""]),
        (f"[{ONE}, 3]", ["", ['[{"bbox_2d": ', DOG, ', "label": "dog"}, 3]'], ""]),
        (f"[1] {ONE}", ["[1] ", [DOG], ""]),
        ('{"bbox_2d": "no", "a": 1}', ['{"bbox_2d": "no", "a": 1}']),
        ('{"bbox_2d": [], "a": 1}', ['{"bbox_2d": [], "a": 1}']),
        ('{"a": {"bbox_2d": [1], "bbox_2d": [2]}}', ['{"a": {"bbox_2d": [1], "bbox_2d": [2]}}']),
        (
            '{"a": [{"point_2d": [1, 2]}, {"bbox_2d": "<box>(1,2),(3,4)</box>"}]}',
            [
                "",
                [
                    '{"a": [{"point_2d": ',
                    ([1, 2], "a", False),
                    '}, {"bbox_2d": ',
                    ([1, 2, 3, 4], "a", True),
                    "}]}",
                ],
                "",
            ],
        ),
    ],
)
def test_text_and_boxes_alternate(text: str, pieces: list[object]) -> None:
    assert list(split_at_boxes(text)) == pieces


@pytest.mark.parametrize("more", ['"label": "cat"', '"text_content": "cat"'])
def test_keys_that_a_box_would_lose_stay_in_the_text(more: str) -> None:
    text = f'[{{"bbox_2d": [1, 2, 3, 4], "label": "dog", {more}}}]'
    ((start, box, end),) = [piece for piece in split_at_boxes(text) if isinstance(piece, list)]
    assert isinstance(box, TextBox)
    assert f"{start}[1, 2, 3, 4]{end}" == text


def test_fences_around_boxes_and_optional_labels():
    assert strip_code_fences(f"```json\n{ONE}\n```") == ONE
    assert strip_code_fences('```json\n{"a": 1}\n```') == '```json\n{"a": 1}\n```'
    assert parse_json_box(json.loads(ONE)) == DOG
    assert parse_json_box({"bbox_2d": [0], "text_content": 5}) == ([0], "5", False)
    assert parse_json_box({"bbox_2d": [], "score": 1}) is None
    assert parse_json_box([1, 2, 3, 4]) is None


@pytest.mark.parametrize(
    "text",
    ["." * 300_000 + "x", "1." * 200_000, " \n" * 200_000, "item 1, 2, 3 sold " * 30_000],
    ids=count(),
)
def test_long_texts_about_boxes_are_read_in_linear_time(text):
    """In the square of their length they take minutes."""
    found = TextCoordinates()
    signal.alarm(60)
    try:
        found.add(f"The box of width 1 height {text} 3, 4", ["a.png"], lambda name: (100, 100))
        assert [*found.describe()] == []
    finally:
        signal.alarm(0)


def test_overlap_is_intersection_over_union() -> None:
    one = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]], float)
    other = np.array([[1, 0, 3, 2], [0, 0, 1, 1], [2, 2, 3, 3]], float)
    assert pairwise_iou(one, other) == pytest.approx((1 / 3, 1, 0))
