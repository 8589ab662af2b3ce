"""Qwen2-VL's box dialect, there and back."""

from __future__ import annotations

import random

import pytest

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


def test_roundtrip_error_is_below_half_a_thousandth() -> None:
    chance = random.Random(0)
    for _ in range(500):
        height, width = chance.randint(1, 3000), chance.randint(1, 3000)
        xs = sorted(chance.uniform(0, width) for _ in range(2))
        ys = sorted(chance.uniform(0, height) for _ in range(2))
        corners = (xs[0], ys[0], xs[1], ys[1])
        label = chance.choice((None, "cat", "a (1,2),(3,4)", "two\nlines"))
        text = write_boxes(ImageBox(label, corners, (height, width), (28, 28)))
        (found,) = FAMILY.read_boxes(text, (height, width), (28, 28))
        assert found.label == label
        sides = (width, height) * 2
        for there, back, side in zip(corners, found.xyxy, sides, strict=True):
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
