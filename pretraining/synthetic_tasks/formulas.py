"""Rendering of random formulas as images, with the fonts of matplotlib's mathtext."""

from __future__ import annotations

import logging
import random
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from finesight.errors import UserError
from synthetic_tasks import formula_grammar
from synthetic_tasks.backgrounds import make_canvas, round_up_size
from synthetic_tasks.camera_noise import apply_camera_noise
from synthetic_tasks.canvas import Canvas
from synthetic_tasks.fonts import FontSplit
from synthetic_tasks.question_templates import fill_template
from synthetic_tasks.synthetic_sample import SyntheticSample

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser, RasterParse

MATH_FONT_FAMILIES = ("cm", "cm", "cm", "stix", "stix", "dejavuserif", "dejavusans", "stixsans")
"""Font families of mathtext, common ones more often: Computer Modern (BaKoMa Fonts Licence), STIX
(STIX Font License), DejaVu (Bitstream Vera licence). All allow unrestricted drawing."""

FONT_SIZES = (15, 16, 16, 17, 18, 18, 19, 20, 22, 25, 28)
"""Font sizes in pixels per em."""

MAX_WIDTH = 336
"""Maximum image width in pixels."""

MAX_HEIGHT = 140

_MIN_FONT_SIZE = 12
"""Minimum font size in pixels per em.

Nested subscripts and superscripts are not legible below it.
"""
_MARGIN = 3


def generate_formula(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of a formula, with its LaTeX tokens as the answer.

    The argument `fonts` is ignored, because mathtext has its own fonts.

    Raises:
        UserError: matplotlib is not installed.
    """
    latex = formula_grammar.sample_formula(rng)
    mask = render_to_fit(latex, rng.choice(MATH_FONT_FAMILIES), rng.choice(FONT_SIZES))
    if mask is None:
        return generate_formula(rng, fonts)
    width, height = mask.size
    free_size = (MAX_WIDTH - width - 2 * _MARGIN, MAX_HEIGHT - height - 2 * _MARGIN)
    right, below = (
        rng.randint(0, min(free, max_margin))
        for free, max_margin in zip(free_size, (70, 24), strict=True)
    )
    left, above = (
        rng.randint(0, min(24, free_size[0] - right)),
        rng.randint(0, min(16, free_size[1] - below)),
    )
    size = round_up_size(
        width + left + right + 2 * _MARGIN, height + above + below + 2 * _MARGIN, rng
    )
    canvas = _make_canvas(size, rng)
    ink = (0, 0, 0) if rng.random() < 0.7 else tuple(rng.randrange(90) for _ in range(3))
    canvas.image.paste(ink, (left + _MARGIN, above + _MARGIN), mask)
    image = canvas.image
    if rng.random() < 0.5:
        image = apply_camera_noise(image, rng, strength=0.5)
    return SyntheticSample(image, fill_template("formula", rng), (latex,), "formula")


def render_to_fit(latex: str, family: str, size: int) -> Image.Image | None:
    """Render a formula, at a smaller font size if it exceeds the maximum image width.

    Returns None if the formula would be illegible.
    """
    mask = render_formula(latex, family, size)
    max_size = (MAX_WIDTH - 2 * _MARGIN, MAX_HEIGHT - 2 * _MARGIN)
    scale = min(1.0, max_size[0] / mask.width, max_size[1] / mask.height)
    if scale == 1.0:
        return mask
    reduced_size = int(size * scale)
    if reduced_size < _MIN_FONT_SIZE:
        return None
    mask = render_formula(latex, family, reduced_size)
    return mask if mask.width <= max_size[0] and mask.height <= max_size[1] else None


def render_formula(latex: str, family: str, size: int) -> Image.Image:
    """Render a formula at a font size in pixels per em.

    Returns the coverage mask (mode L), cropped to the formula.
    """
    source = f"${to_mathtext(latex)}$"
    # At 72 dots an inch a point is a pixel.
    parsed = _get_parser().parse(
        source, dpi=72, prop=_get_font_properties(family, size), antialiased=True
    )
    mask = Image.fromarray(np.asarray(parsed.image, dtype=np.uint8))
    bounds = mask.getbbox()
    assert bounds, f"the formula {latex!r} has no ink"
    return mask.crop(bounds)


def to_mathtext(latex: str) -> str:
    """Convert the LaTeX of an answer to the syntax of mathtext.

    Outer fractions keep the full text size. Spaces are removed except after command names, because
    a space after `^` or `_` would end the script.
    """
    depth, tokens = 0, list[str]()
    for token in latex.split():
        depth += (token == "{") - (token == "}")
        command = r"\dfrac" if token == r"\frac" and depth == 0 else token
        tokens.append(f"{command} " if command[-1].isalpha() and command[0] == "\\" else command)
    return "".join(tokens)


@lru_cache(maxsize=1)
def _get_parser() -> MathTextParser[RasterParse]:
    try:
        from matplotlib.mathtext import MathTextParser
    except ImportError as error:
        raise UserError(
            "matplotlib is not installed",
            where="generated tasks: formula",
            expected="matplotlib, which draws the formulas",
            remedy="pip install matplotlib, or leave the task `formula` out",
        ) from error
    # It warns of roots that it does not stretch to the pixel, each with pages of boxes.
    logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)
    return MathTextParser("agg")


@lru_cache
def _get_font_properties(family: str, size: int) -> FontProperties:
    from matplotlib.font_manager import FontProperties

    return FontProperties(math_fontfamily=family, size=size)


def _make_canvas(size: tuple[int, int], rng: random.Random) -> Canvas:
    """Create a white or pale background for a formula."""
    if rng.random() < 0.6:
        return Canvas(Image.new("RGB", size, (255, 255, 255)), (255, 255, 255))
    return make_canvas(size, rng, pale_fraction=1.0)
