"""Computation of the size to which images are resized for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finesight.config import ExactSize, ImageRule, LongestSide, PixelRange
from finesight.data.image_header import CorruptImageError, ImageSize
from finesight.errors import UserError

MAX_ASPECT_RATIO = 200
"""Maximum aspect ratio; the reference processors reject other images."""


def get_default_image_rule(preprocessor: Mapping[str, Any]) -> PixelRange:
    """Return the range of pixel counts in the preprocessor config of a model."""
    return PixelRange(min_pixels=preprocessor["min_pixels"], max_pixels=preprocessor["max_pixels"])


def resolve_image_rule(preprocessor: Mapping[str, Any], requested: ImageRule | None) -> ImageRule:
    """Return the image rule of the recipe, or the default of the model."""
    fixed_side = preprocessor.get("image_size")
    if fixed_side is None:
        return requested or get_default_image_rule(preprocessor)
    fixed_rule = ExactSize(height=fixed_side, width=fixed_side)
    if requested not in (None, fixed_rule):
        raise UserError(
            f"image rule {requested}",
            where="image",
            expected=f"{fixed_side} x {fixed_side} pixels, the fixed image size of this model",
            remedy="remove `image` from the recipe",
        )
    return fixed_rule


def compute_resized_size(
    original_size: ImageSize, rule: ImageRule, factor: int, where: str = ""
) -> ImageSize:
    """Compute height and width after resizing, multiples of `factor` (patch size x merge size).

    PixelRange preserves the aspect ratio as closely as the factor allows and limits the area, as
    in the reference preprocessor. ExactSize rounds each side to the nearest multiple. LongestSide
    scales the longer side to its value, also upwards, then rounds each side. Halves round to even.

    Raises:
        CorruptImageError: The aspect ratio exceeds 200 under a rule that preserves it.
    """
    height, width = original_size
    assert height > 0, f"image height is {height}"
    assert width > 0, f"image width is {width}"
    if isinstance(rule, ExactSize):
        return _round_to_factor(rule.height, factor), _round_to_factor(rule.width, factor)
    if max(original_size) / min(original_size) > MAX_ASPECT_RATIO:
        raise CorruptImageError(
            f"{width} x {height} pixels",
            where=where,
            expected=f"one side at most {MAX_ASPECT_RATIO} times the other",
            remedy="crop the image or remove it from the data",
        )
    if isinstance(rule, LongestSide):
        scale = rule.longest_side / max(original_size)
        return _round_to_factor(height * scale, factor), _round_to_factor(width * scale, factor)
    return _smart_resize(original_size, rule, factor)


def _round_to_factor(side: float, factor: int) -> int:
    return max(factor, round(side / factor) * factor)


def _smart_resize(original_size: ImageSize, rule: PixelRange, factor: int) -> ImageSize:
    """Scale an image size into a range of pixel counts, rounded to multiples of `factor`.

    Sides are rounded down to meet the maximum and up to meet the minimum. As in the reference
    preprocessor, they are rounded before the pixel count is compared.
    """
    height, width = original_size
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > rule.max_pixels:
        downscale = math.sqrt((height * width) / rule.max_pixels)
        return (
            max(factor, math.floor(height / downscale / factor) * factor),
            max(factor, math.floor(width / downscale / factor) * factor),
        )
    if math.prod(rounded) < rule.min_pixels:
        upscale = math.sqrt(rule.min_pixels / (height * width))
        return (
            math.ceil(height * upscale / factor) * factor,
            math.ceil(width * upscale / factor) * factor,
        )
    return rounded
