"""Qwen2-VL's box dialect, there and back."""

from __future__ import annotations

import pytest
from box_fixtures import image_boxes
from hypothesis import given, settings

from finesight.encode.family import ImageBox, PredictedBox, SpecialToken
from finesight.encode.qwen2_vl import Qwen2VL

FAMILY = Qwen2VL()


def write_boxes(*boxes: ImageBox) -> str:
    pieces = FAMILY.write_boxes(boxes)
    return "".join(piece.token if isinstance(piece, SpecialToken) else piece for piece in pieces)


def test_boxes_are_written_between_special_tokens() -> None:
    box = ImageBox("猫 <|box_end|>", (48, 36, 480, 359.9), (360, 480), (364, 476))
    assert FAMILY.write_boxes([box]) == [
        SpecialToken("<|object_ref_start|>"),
        "猫 <|box_end|>",
        SpecialToken("<|object_ref_end|>"),
        SpecialToken("<|box_start|>"),
        "(100,100),(1000,1000)",
        SpecialToken("<|box_end|>"),
    ]
    bare = ImageBox(None, (0, 0, 10.005, 10.004), (20000, 20000), (28, 28))
    assert write_boxes(bare) == "<|box_start|>(0,0),(1,1)<|box_end|>"


@settings(max_examples=500)
@given(image_boxes(28, (None, "cat", "a (1,2),(3,4)", "two\nlines"), max_multiple=1))
def test_roundtrip_error_is_below_half_a_thousandth(box: ImageBox) -> None:
    (found,) = FAMILY.read_boxes(write_boxes(box), box.original_size, box.resized_size)
    assert found.label == box.label
    sides = box.original_size[::-1] * 2
    for there, back, side in zip(box.xyxy, found.xyxy, sides, strict=True):
        assert abs(there - back) <= side / 2000 + 1e-9


ONE = (100.0, 400.0, 300.0, 800.0)
TWO = (0.0, 0.0, 1000.0, 2000.0)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<|box_start|>(100,200),(300,400)<|box_end|>", [PredictedBox(None, ONE)]),
        ("(100, 200) , ( 300.0,400 )", [PredictedBox(None, ONE)]),
        ("cat(100,200),(300,400)<|im_end|>", [PredictedBox(None, ONE)]),
        (
            "<|object_ref_start|>two cats<|object_ref_end|><|box_start|>(100,200),(300,400)"
            "<|box_end|><|box_start|>(0,0),(1000,1000)<|box_end|>",
            [PredictedBox("two cats", ONE), PredictedBox("two cats", TWO)],
        ),
        (
            "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>"
            " and <|box_start|>(0,0),(1000,1000)<|box_end|>",
            [PredictedBox("cat", ONE), PredictedBox(None, TWO)],
        ),
        (
            "<|object_ref_start|>sky<|object_ref_end|> over <|object_ref_start|>cat"
            "<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
            [PredictedBox("cat", ONE)],
        ),
        ("<|box_start|>(100,200),(300<|box_end|>", []),
        (f"({'9' * 400},1),(2,3) (100,200),(300,400)", [PredictedBox(None, ONE)]),
        ("no box (1, 2)", []),
        ("", []),
    ],
)
def test_lenient_box_parsing(text: str, boxes: list[PredictedBox]) -> None:
    assert FAMILY.read_boxes(text, (2000, 1000), (28, 28)) == boxes
