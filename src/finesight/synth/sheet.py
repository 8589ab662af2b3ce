"""Paper to draw on: backgrounds, words with the bounds of their ink, and the marks of a camera."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from finesight.synth.drawn import Corners

Colour = tuple[int, int, int]

INK = 64
"""From this cover on (of 255) a pixel belongs to a word."""

CONTRAST = 90.0
"""Least difference in brightness between ink and paper."""

SQUARE = 28
"""Pixels of a side of what becomes one token."""

_GRAIN = 512


@dataclass(frozen=True)
class Word:
    """A word that was drawn and the bounds of its ink."""

    text: str
    corners: Corners


@dataclass
class Sheet:
    """A picture under work. What is written on it is turned by `angle` degrees (anticlockwise)
    about its centre; `paper` is the background's mean colour."""

    picture: Image.Image
    paper: Colour
    angle: float = 0.0

    def write(
        self, text: str, font: ImageFont.FreeTypeFont, left: float, base: float, ink: Colour
    ) -> Word | None:
        """Draw a text that, before the turn, starts at `left` and stands on the line `base`.

        Gives the bounds of its ink; None, with nothing drawn, where it has none or would not
        lie wholly on the sheet.
        """
        mask, (x, y) = self._placed(text, font, left, base)
        bounds = mask.point(_IS_INK).getbbox()
        if bounds is None:
            return None
        corners = (bounds[0] + x, bounds[1] + y, bounds[2] + x, bounds[3] + y)
        width, height = self.picture.size
        if min(corners) < 1 or corners[2] >= width or corners[3] >= height:
            return None
        self.picture.paste(ink, (x, y), mask)
        return Word(text, corners)

    def _placed(
        self, text: str, font: ImageFont.FreeTypeFont, left: float, base: float
    ) -> tuple[Image.Image, tuple[int, int]]:
        """The cover of a text and the place of its upper left corner."""
        x1, y1, x2, y2 = (round(number) for number in font.getbbox(text, anchor="ls"))
        size = (max(1, x2 - x1) + 2, max(1, y2 - y1) + 2)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).text((1 - x1, 1 - y1), text, 255, font, anchor="ls")
        across, down = left + x1 - 1 + size[0] / 2, base + y1 - 1 + size[1] / 2
        if self.angle:
            across, down = self._turned(across, down)
            mask = mask.rotate(self.angle, Image.Resampling.BICUBIC, expand=True)
        return mask, (round(across - mask.width / 2), round(down - mask.height / 2))

    def _turned(self, x: float, y: float) -> tuple[float, float]:
        middle_x, middle_y = self.picture.width / 2, self.picture.height / 2
        sine, cosine = math.sin(math.radians(self.angle)), math.cos(math.radians(self.angle))
        dx, dy = x - middle_x, y - middle_y
        return middle_x + dx * cosine + dy * sine, middle_y - dx * sine + dy * cosine


_IS_INK = [255 if cover >= INK else 0 for cover in range(256)]


def brightness(colour: Colour) -> float:
    """Luma of ITU-R BT.601, 0 to 255."""
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def any_colour(rng: random.Random) -> Colour:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def ink_on(paper: Colour, rng: random.Random) -> Colour:
    """A colour that stands out from the paper; black or white, more often than not."""
    plain: Colour = (0, 0, 0) if brightness(paper) > 127 else (255, 255, 255)
    if rng.random() < 0.5:
        return plain
    for _ in range(8):
        ink = any_colour(rng)
        if abs(brightness(ink) - brightness(paper)) >= CONTRAST:
            return ink
    return plain


def paper(size: tuple[int, int], rng: random.Random, pale: float = 0.6) -> Sheet:
    """A sheet of (width, height): pale in a share of `pale`, else of any colour; plain, shaded,
    mottled or striped."""
    colour = tuple(rng.randint(205, 255) for _ in range(3)) if rng.random() < pale else None
    red, green, blue = colour or any_colour(rng)
    if 100 < brightness((red, green, blue)) < 155:
        # No ink stands out on middling paper.
        red, green, blue = (min(255, number + 70) for number in (red, green, blue))
    base: Colour = (red, green, blue)
    share = rng.random()
    if share < 0.45:
        picture = Image.new("RGB", size, base)
    elif share < 0.7:
        picture = _shaded(size, base, rng)
    elif share < 0.9:
        picture = _mottled(size, base, rng)
    else:
        picture = _striped(size, base, rng)
    return Sheet(picture, base)


def sides(width: int, height: int, rng: random.Random) -> tuple[int, int]:
    """At least that wide and high: mostly filled up to whole squares, which need no resizing before
    a model sees them, and sometimes as they are."""
    if rng.random() < 0.05:
        return width, height
    return -(-width // SQUARE) * SQUARE, -(-height // SQUARE) * SQUARE


def photographed(picture: Image.Image, rng: random.Random, wear: float = 1.0) -> Image.Image:
    """The picture as it is, or blurred a little, grainy, or saved as JPEG; `wear` scales how
    much, for what is too fine to bear it."""
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(wear * rng.uniform(0.3, 0.7)))
    if rng.random() < 0.4:
        picture = grainy(picture, wear * rng.uniform(2, 11), rng)
    if rng.random() < 0.25:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=round(100 - wear * rng.uniform(10, 50)))
        picture = Image.open(stream).convert("RGB")
    return picture


def grainy(picture: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """With noise whose standard deviation is `strength` of 255."""
    wide, high = picture.size
    x, y = rng.randrange(_GRAIN), rng.randrange(_GRAIN)
    rows = (np.arange(high) + y) % _GRAIN
    columns = (np.arange(wide) + x) % _GRAIN
    noise = _grain()[rows[:, None], columns] * np.float32(strength)
    pixels = np.asarray(picture, dtype=np.float32) + noise[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _grain() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((_GRAIN, _GRAIN), dtype=np.float32)


def _near(colour: Colour, reach: int, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, number + rng.randint(-reach, reach))) for number in colour)
    return red, green, blue


def _shaded(size: tuple[int, int], colour: Colour, rng: random.Random) -> Image.Image:
    """From one colour to another across the sheet."""
    corners = Image.new("RGB", (2, 2))
    for x in range(2):
        for y in range(2):
            corners.putpixel((x, y), _near(colour, 28, rng))
    return corners.resize(size, Image.Resampling.BILINEAR)


def _mottled(size: tuple[int, int], colour: Colour, rng: random.Random) -> Image.Image:
    """Soft spots of near colours, as of a wall out of focus."""
    cells = (rng.randint(3, 9), rng.randint(3, 9))
    spots = Image.new("RGB", cells)
    spots.putdata([_near(colour, 26, rng) for _ in range(cells[0] * cells[1])])
    return spots.resize(size, Image.Resampling.BICUBIC)


def _striped(size: tuple[int, int], colour: Colour, rng: random.Random) -> Image.Image:
    """Ruled or checked paper, planks or tiles."""
    picture = Image.new("RGB", size, colour)
    draw, line = ImageDraw.Draw(picture), _near(colour, 30, rng)
    gap, thick = rng.randint(8, 30), rng.randint(1, 3)
    across = rng.random() < 0.5
    for at in range(rng.randrange(gap), size[0] if across else size[1], gap):
        ends = ((at, 0), (at, size[1])) if across else ((0, at), (size[0], at))
        draw.line(ends, line, thick)
    return picture
