"""Sizes against the published rule, and the recipe's rules against their words."""

import math
import random

import pytest
from case_files import load_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from finesight.errors import UserError
from finesight.samples.image_file import CorruptImageError
from finesight.settings.config import ExactSize, LongestSide, PixelLimits, PixelRange
from finesight.vision.image_processing import (
    compute_resized_size,
    get_default_image_rule,
    resolve_image_rule,
)

CASES = load_cases("resize")

NATIVE = {"min_pixels": 3136, "max_pixels": 12845056}


@pytest.mark.parametrize("limits", [(3136, 12845056), (3136, 1003520), (50176, 50176), (1, 784)])
@pytest.mark.parametrize("factor", [28, 32])
def test_smart_resize_matches_published_rule(limits: tuple[int, int], factor: int) -> None:
    rule = PixelRange(min_pixels=limits[0], max_pixels=limits[1])
    chance = random.Random(factor + limits[1])
    # Multiples of half the factor are where rounding to even shows.
    sizes = [(a * factor // 2, b * factor // 2) for a in range(1, 30) for b in range(1, 30)]
    sizes += [(chance.randint(1, 4000), chance.randint(1, 4000)) for _ in range(2000)]
    sizes += [tuple(int(10 ** chance.uniform(0, 4)) for _ in range(2)) for _ in range(900)]
    for height, width in sizes:
        if max(height, width) / min(height, width) <= 200:
            expected = smart_resize(height, width, factor, *limits)
            assert compute_resized_size((height, width), rule, factor) == expected, (height, width)


@pytest.mark.parametrize(
    "rule", [PixelRange(min_pixels=1, max_pixels=9999), LongestSide(longest_side=99)]
)
def test_extreme_aspect_ratio_is_rejected(rule: PixelRange | LongestSide) -> None:
    assert min(compute_resized_size((200, 1), rule, 28)) >= 28
    with pytest.raises(CorruptImageError, match="1 x 201 pixels") as raised:
        compute_resized_size((201, 1), rule, 28, where="long.png")
    assert raised.value.where == "long.png"


def test_exact_size_rounds_to_nearest_multiples() -> None:
    sizes = {(112, 504): (112, 504), (280, 256): (280, 252), (1, 13): (28, 28), (42, 70): (56, 56)}
    for (height, width), expected in sizes.items():
        rule = ExactSize(height=height, width=width)
        for original in ((1, 1), (1000, 3), (480, 360)):
            assert compute_resized_size(original, rule, 28) == expected


@settings(max_examples=500)
@given(st.integers(30, 3000), st.integers(30, 3000))
def test_longest_side_rounds_to_multiples(height: int, width: int) -> None:
    size = compute_resized_size((height, width), LongestSide(longest_side=256), 28)
    exact = [side * 256 / max(height, width) for side in (height, width)]
    assert all(side % 28 == 0 for side in size)
    assert max(size) == 252
    for side, wanted in zip(size, exact, strict=True):
        assert abs(side - wanted) <= 14.001 or side == 28


def test_fixed_size_model_rejects_other_rules() -> None:
    only = ExactSize(height=448, width=448)
    assert resolve_image_rule({"image_size": 448}, None) == only
    assert resolve_image_rule({"image_size": 448}, only) == only
    with pytest.raises(UserError, match="height=448 width=476"):
        resolve_image_rule({"image_size": 448}, ExactSize(height=448, width=476))
    assert resolve_image_rule(NATIVE, only) == only


@pytest.mark.parametrize(
    ("given", "expected"), CASES["test_missing_pixel_limits_are_those_of_the_model"]
)
def test_missing_pixel_limits_are_those_of_the_model(given, expected):
    limits = None if given is None else PixelLimits.model_validate(given)
    rule = resolve_image_rule(NATIVE, limits)
    assert rule == PixelRange(min_pixels=expected[0], max_pixels=expected[1])
    if not given:
        assert rule == get_default_image_rule(NATIVE)
        assert math.prod(compute_resized_size((5000, 5000), rule, 28)) <= 12845056
