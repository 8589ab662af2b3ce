"""Backgrounds of synthetic images: uniform, textured and ruled paper."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from synthetic_tasks.canvas import Canvas, Color

TOKEN_SIZE = 28
"""Side length in pixels of the image area that becomes one token."""


def compute_luma(color: Color) -> float:
    """Compute the luma (ITU-R BT.601) of a color, 0 to 255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def sample_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def make_canvas(size: tuple[int, int], rng: random.Random, pale_fraction: float = 0.6) -> Canvas:
    """Create a canvas with a uniform or textured background.

    Args:
        size: Width and height in pixels.
        pale_fraction: Probability of a pale background color; others have any color.
    """
    pale_color = (
        tuple(rng.randint(205, 255) for _ in range(3)) if rng.random() < pale_fraction else None
    )
    red, green, blue = pale_color or sample_color(rng)
    if 100 < compute_luma((red, green, blue)) < 155:
        # No ink has sufficient contrast on paper of medium brightness.
        red, green, blue = (min(255, channel + 70) for channel in (red, green, blue))
    base_color: Color = (red, green, blue)
    share = rng.random()
    if share < 0.45:
        image = Image.new("RGB", size, base_color)
    elif share < 0.7:
        image = _make_gradient(size, base_color, rng)
    elif share < 0.9:
        image = _make_blotches(size, base_color, rng)
    else:
        image = _make_lines(size, base_color, rng)
    return Canvas(image, base_color)


def round_up_size(width: int, height: int, rng: random.Random) -> tuple[int, int]:
    """Round an image size up to multiples of the token size, in most samples.

    The processor does not resize such images.
    """
    if rng.random() < 0.05:
        return width, height
    return -(-width // TOKEN_SIZE) * TOKEN_SIZE, -(-height // TOKEN_SIZE) * TOKEN_SIZE


def _jitter_color(color: Color, max_delta: int, rng: random.Random) -> Color:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-max_delta, max_delta))) for channel in color
    )
    return red, green, blue


def _make_gradient(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background with a color gradient."""
    corners = Image.new("RGB", (2, 2))
    for x in range(2):
        for y in range(2):
            corners.putpixel((x, y), _jitter_color(color, 28, rng))
    return corners.resize(size, Image.Resampling.BILINEAR)


def _make_blotches(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background of soft spots in similar colors, like an out-of-focus wall."""
    cells = (rng.randint(3, 9), rng.randint(3, 9))
    spots = Image.new("RGB", cells)
    spots.putdata([_jitter_color(color, 26, rng) for _ in range(cells[0] * cells[1])])
    return spots.resize(size, Image.Resampling.BICUBIC)


def _make_lines(size: tuple[int, int], color: Color, rng: random.Random) -> Image.Image:
    """Create a background of ruled or checked paper, planks or tiles."""
    image = Image.new("RGB", size, color)
    draw, line = ImageDraw.Draw(image), _jitter_color(color, 30, rng)
    gap, thickness = rng.randint(8, 30), rng.randint(1, 3)
    is_vertical = rng.random() < 0.5
    for offset in range(rng.randrange(gap), size[0] if is_vertical else size[1], gap):
        ends = ((offset, 0), (offset, size[1])) if is_vertical else ((0, offset), (size[0], offset))
        draw.line(ends, line, thickness)
    return image
