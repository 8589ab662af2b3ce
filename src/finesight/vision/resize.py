"""The size a picture gets before it is cut into patches: the families' rule or the recipe's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finesight.config import ExactSize, LongestSide, PictureRule, PixelRange
from finesight.data.headers import DamagedPicture
from finesight.errors import UserError

Size = tuple[int, int]
"""Height and width in pixels."""

LARGEST_ASPECT = 200
"""A side may be this many times the other; beyond it the families refuse a picture."""


def native_rule(preprocessor: Mapping[str, Any]) -> PixelRange:
    """The rule of the model's own preprocessor, in force when a recipe names none."""
    return PixelRange(min_pixels=preprocessor["min_pixels"], max_pixels=preprocessor["max_pixels"])


def rule_in_force(preprocessor: Mapping[str, Any], wanted: PictureRule | None) -> PictureRule:
    """The recipe's rule, or the model's own. Raises UserError where the model reads pictures of one
    size only and another rule is wanted."""
    side = preprocessor.get("image_size")
    if side is None:
        return wanted or native_rule(preprocessor)
    only = ExactSize(height=side, width=side)
    if wanted not in (None, only):
        raise UserError(
            f"pictures by the rule {wanted}",
            where="picture",
            expected=f"{side} x {side} pixels, the one size that this model reads",
            remedy="leave `picture` out of the recipe",
        )
    return only


def resized_size(original: Size, rule: PictureRule, factor: int, where: str = "") -> Size:
    """Height and width after resizing, both multiples of `factor` (patch size x merge size).

    PixelRange keeps the shape as nearly as the factor allows and the area within the range, as
    the families' published preprocessor does. ExactSize takes the nearest multiple of each side.
    LongestSide scales the longer side to its pixels, enlarging too, and then takes the nearest
    multiple of each side. Halves round to even. Raises DamagedPicture, naming `where`, for a
    picture of more than 200 times one side in the other under a rule that keeps the shape.
    """
    height, width = original
    assert height > 0, f"a picture of height {height}"
    assert width > 0, f"a picture of width {width}"
    if isinstance(rule, ExactSize):
        return _nearest(rule.height, factor), _nearest(rule.width, factor)
    if max(original) / min(original) > LARGEST_ASPECT:
        raise DamagedPicture(
            f"{width} x {height} pixels",
            where=where,
            expected=f"one side at most {LARGEST_ASPECT} times the other",
            remedy="crop the picture or take it out of the data",
        )
    if isinstance(rule, LongestSide):
        scale = rule.longest_side / max(original)
        return _nearest(height * scale, factor), _nearest(width * scale, factor)
    return _within(original, rule, factor)


def _nearest(side: float, factor: int) -> int:
    return max(factor, round(side / factor) * factor)


def _within(original: Size, rule: PixelRange, factor: int) -> Size:
    """Scale by the root of the area's excess, sides rounded down to fit a maximum, up to reach a
    minimum. Sides are rounded before the area is compared, as in the published preprocessor."""
    height, width = original
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > rule.max_pixels:
        shrink = math.sqrt((height * width) / rule.max_pixels)
        return (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    if math.prod(rounded) < rule.min_pixels:
        grow = math.sqrt(rule.min_pixels / (height * width))
        return (
            math.ceil(height * grow / factor) * factor,
            math.ceil(width * grow / factor) * factor,
        )
    return rounded
