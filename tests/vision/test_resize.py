"""Sizes against the published rule, and the recipe's rules against their words."""

from __future__ import annotations

import math
import random

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from finesight.config import ExactSize, LongestSide, PixelRange
from finesight.data.headers import DamagedPicture
from finesight.errors import UserError
from finesight.vision.resize import native_rule, resized_size, rule_in_force


@pytest.mark.parametrize("limits", [(3136, 12845056), (3136, 1003520), (50176, 50176), (1, 784)])
@pytest.mark.parametrize("factor", [28, 32])
def test_pixel_range_equals_the_published_rule(limits: tuple[int, int], factor: int) -> None:
    rule = PixelRange(min_pixels=limits[0], max_pixels=limits[1])
    chance = random.Random(factor + limits[1])
    # Multiples of half the factor are where rounding to even shows.
    sizes = [(a * factor // 2, b * factor // 2) for a in range(1, 30) for b in range(1, 30)]
    sizes += [(chance.randint(1, 4000), chance.randint(1, 4000)) for _ in range(2000)]
    sizes += [
        (int(10 ** chance.uniform(0, 4)), int(10 ** chance.uniform(0, 4))) for _ in range(900)
    ]
    for height, width in sizes:
        if max(height, width) / min(height, width) <= 200:
            expected = smart_resize(height, width, factor, *limits)
            assert resized_size((height, width), rule, factor) == expected, (height, width)


@pytest.mark.parametrize(
    "rule", [PixelRange(min_pixels=1, max_pixels=9999), LongestSide(longest_side=99)]
)
def test_very_long_pictures_are_refused(rule: PixelRange | LongestSide) -> None:
    assert min(resized_size((200, 1), rule, 28)) >= 28
    with pytest.raises(DamagedPicture, match="1 x 201 pixels") as raised:
        resized_size((201, 1), rule, 28, where="long.png")
    assert raised.value.where == "long.png"


@pytest.mark.parametrize(
    ("asked", "given"),
    [((112, 504), (112, 504)), ((280, 256), (280, 252)), ((1, 13), (28, 28)), ((42, 70), (56, 56))],
)
def test_exact_size_takes_the_nearest_multiples(
    asked: tuple[int, int], given: tuple[int, int]
) -> None:
    rule = ExactSize(height=asked[0], width=asked[1])
    for original in ((1, 1), (1000, 3), (480, 360)):
        assert resized_size(original, rule, 28) == given


def test_longest_side_scales_both_ways_and_keeps_the_shape() -> None:
    rule = LongestSide(longest_side=256)
    assert resized_size((480, 360), rule, 28) == (252, 196)
    assert resized_size((36, 48), rule, 28) == (196, 252)
    assert resized_size((1000, 10), rule, 28) == (252, 28)
    chance = random.Random(0)
    for _ in range(2000):
        height, width = chance.randint(30, 3000), chance.randint(30, 3000)
        size = resized_size((height, width), rule, 28)
        exact = [side * 256 / max(height, width) for side in (height, width)]
        assert all(side % 28 == 0 for side in size)
        assert max(size) == 252
        assert all(
            abs(side - wanted) <= 14.001 or side == 28
            for side, wanted in zip(size, exact, strict=True)
        )


def test_a_model_of_one_size_takes_no_other_rule() -> None:
    only = ExactSize(height=448, width=448)
    assert rule_in_force({"image_size": 448}, None) == only
    assert rule_in_force({"image_size": 448}, only) == only
    with pytest.raises(UserError, match="height=448 width=476"):
        rule_in_force({"image_size": 448}, ExactSize(height=448, width=476))
    free = {"min_pixels": 3136, "max_pixels": 12845056}
    assert rule_in_force(free, only) == only
    assert rule_in_force(free, None) == native_rule(free)


def test_native_rule_is_the_preprocessor_s() -> None:
    rule = native_rule({"min_pixels": 3136, "max_pixels": 12845056})
    assert rule == PixelRange(min_pixels=3136, max_pixels=12845056)
    assert math.prod(resized_size((5000, 5000), rule, 28)) <= 12845056
