"""Formulas of the grammar as matplotlib's mathtext draws them, in its five families of fonts."""

from __future__ import annotations

import logging
import random
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from finesight.errors import UserError
from finesight.synth import grammar
from finesight.synth.drawn import Drawn
from finesight.synth.fonts import Choice
from finesight.synth.questions import ask
from finesight.synth.sheet import Sheet, paper, photographed, sides

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser, RasterParse

FAMILIES = ("cm", "cm", "cm", "stix", "stix", "dejavuserif", "dejavusans", "stixsans")
"""Mathtext's families, the ones that print uses more often: Computer Modern (BaKoMa Fonts Licence),
STIX (STIX Font License), DejaVu (Bitstream Vera licence). All may be drawn with freely."""

SIZES = (15, 16, 16, 17, 18, 18, 19, 20, 22, 25, 28)
"""Pixels an em."""

WIDEST = 336
"""Pixels of a picture's width."""

TALLEST = 140

_LEAST = 12
"""Pixels an em below which scripts of scripts are a blot."""
_MARGIN = 3


def formula(rng: random.Random, fonts: Choice) -> Drawn:
    """A formula in dark ink, to be written as LaTeX tokens. `fonts` means nothing here: mathtext
    brings its own. Raises UserError when matplotlib is missing."""
    label = grammar.formula(rng)
    cover = fitted(label, rng.choice(FAMILIES), rng.choice(SIZES))
    if cover is None:
        return formula(rng, fonts)
    wide, high = cover.size
    spare = (WIDEST - wide - 2 * _MARGIN, TALLEST - high - 2 * _MARGIN)
    right, below = (
        rng.randint(0, min(room, most)) for room, most in zip(spare, (70, 24), strict=True)
    )
    left, above = (
        rng.randint(0, min(24, spare[0] - right)),
        rng.randint(0, min(16, spare[1] - below)),
    )
    size = sides(wide + left + right + 2 * _MARGIN, high + above + below + 2 * _MARGIN, rng)
    sheet = _page(size, rng)
    ink = (0, 0, 0) if rng.random() < 0.7 else tuple(rng.randrange(90) for _ in range(3))
    sheet.picture.paste(ink, (left + _MARGIN, above + _MARGIN), cover)
    picture = sheet.picture
    if rng.random() < 0.5:
        picture = photographed(picture, rng, wear=0.5)
    return Drawn(picture, ask("formula", rng), (label,), "formula")


def fitted(label: str, family: str, size: int) -> Image.Image | None:
    """The formula at that size, or smaller when it would be too wide for a picture; None when it
    would have to be too small to be read."""
    cover = drawing(label, family, size)
    room = (WIDEST - 2 * _MARGIN, TALLEST - 2 * _MARGIN)
    share = min(1.0, room[0] / cover.width, room[1] / cover.height)
    if share == 1.0:
        return cover
    smaller = int(size * share)
    if smaller < _LEAST:
        return None
    cover = drawing(label, family, smaller)
    return cover if cover.width <= room[0] and cover.height <= room[1] else None


def drawing(label: str, family: str, size: int) -> Image.Image:
    """The cover of the formula's ink (mode L), cut to it, `size` pixels an em."""
    source = f"${mathtext(label)}$"
    # At 72 dots an inch a point is a pixel.
    parsed = _parser().parse(source, dpi=72, prop=_properties(family, size), antialiased=True)
    cover = Image.fromarray(np.asarray(parsed.image, dtype=np.uint8))
    bounds = cover.getbbox()
    assert bounds, f"the formula {label!r} has no ink"
    return cover.crop(bounds)


def mathtext(label: str) -> str:
    """The label as mathtext is to read it: fractions that stand in no other as large as the rest,
    and no blanks but after names, for a blank behind `^` or `_` would end the script there."""
    depth, pieces = 0, list[str]()
    for token in label.split():
        depth += (token == "{") - (token == "}")
        name = r"\dfrac" if token == r"\frac" and depth == 0 else token
        pieces.append(f"{name} " if name[-1].isalpha() and name[0] == "\\" else name)
    return "".join(pieces)


@lru_cache(maxsize=1)
def _parser() -> MathTextParser[RasterParse]:
    try:
        from matplotlib.mathtext import MathTextParser
    except ImportError as error:
        raise UserError(
            "matplotlib is not installed",
            where="generated tasks: formula",
            expected="matplotlib, which draws the formulas",
            remedy="pip install 'finesight[synth]', or leave the task `formula` out",
        ) from error
    # It warns of roots that it does not stretch to the pixel, each with pages of boxes.
    logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)
    return MathTextParser("agg")


@lru_cache
def _properties(family: str, size: int) -> FontProperties:
    from matplotlib.font_manager import FontProperties

    return FontProperties(math_fontfamily=family, size=size)


def _page(size: tuple[int, int], rng: random.Random) -> Sheet:
    """White, or any pale paper."""
    if rng.random() < 0.6:
        return Sheet(Image.new("RGB", size, (255, 255, 255)), (255, 255, 255))
    return paper(size, rng, pale=1.0)
