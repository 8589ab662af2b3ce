r"""New formulas in the style of given LaTeX labels, rendered from cached parts.

A formula of published datasets is a sequence of parts: a symbol, a group or a command with its
arguments, and its scripts. A new formula follows one label and continues in another one after a
part that both contain, so that it has the symbols, spaces and braces of the labels. mathtext takes
most of its time to parse, so each part is parsed once.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from synthetic_tasks.formula_grammar import GREEK_LETTERS, LETTERS

FormulaPart = tuple[str, ...]
"""LaTeX tokens of a part of a formula."""

SWITCH_PROBABILITY = 0.3
"""Probability to continue in another label after a part that it contains, too."""

MUTATION_PROBABILITY = 0.06
"""Probability that a part gets other letters and digits. Such parts must be parsed."""

MAX_TOKENS = 140
FONT_SIZE, RENDER_SCALE = 15.0, 2
"""Font size of the published images in pixels per em; factor of the size that is rendered."""

BINARY_OPERATORS = frozenset(("+", "-", "*", r"\pm", r"\mp", r"\times", r"\cdot", r"\otimes"))
OPENING = frozenset(("(", "[", r"\{", "=", "<", ">", ",", r"\equiv", r"\sim", r"\rightarrow"))
LARGE_OPERATORS = frozenset((r"\int", r"\oint", r"\sum", r"\prod"))
_STYLES = {
    r"\cal": r"\mathcal",
    r"\bf": r"\mathbf",
    r"\rm": r"\mathrm",
    r"\it": r"\mathit",
    r"\sf": r"\mathsf",
    r"\tt": r"\mathtt",
}
_SYNONYMS = {r"\operatorname*": r"\operatorname", r"\ne": r"\neq", "\\": "\\ "}
_CLASSES = (tuple(LETTERS), GREEK_LETTERS, tuple("0123456789"))
_CLASS_OF = {token: tokens for tokens in _CLASSES for token in tokens}


def split_parts(latex: str) -> list[FormulaPart]:
    """Split space-separated LaTeX tokens into the parts of a formula."""
    tokens, parts, start = latex.split(), list[FormulaPart](), 0
    while start < len(tokens):
        end = _skip_argument(tokens, start)
        while end < len(tokens) - 1 and tokens[end] in ("_", "^", r"\limits", r"\nolimits"):
            is_script = tokens[end] in ("_", "^")
            end = _skip_argument(tokens, end + 1) if is_script else end + 1
        parts.append(tuple(tokens[start:end]))
        start = end
    return parts


def _skip_argument(tokens: Sequence[str], start: int) -> int:
    """Return the end of a group, a bracketed expression, a command with arguments or a symbol."""
    token = tokens[start]
    for opening, closing in (("{", "}"), (r"\left", r"\right"), (r"\begin", r"\end")):
        if not (token == opening or (len(opening) > 1 and token.startswith(opening))):
            continue
        if token.startswith((r"\leftarrow", r"\leftrightarrow")):
            continue
        depth = 0
        for index in range(start, len(tokens)):
            if tokens[index].startswith(closing) and tokens[index] != r"\rightarrow":
                depth -= 1
            elif tokens[index].startswith(opening) and tokens[index] != r"\leftarrow":
                depth += 1
            if depth == 0:
                return index + 1
        return len(tokens)
    end = start + 1
    if not re.fullmatch(r"\\[A-Za-z]+\*?", token):
        return end
    if token == r"\sqrt" and tokens[end : end + 1] == ["["] and "]" in tokens[end:]:
        end = tokens.index("]", end) + 1
    for _ in range(2 if token in (r"\frac", r"\stackrel") else 1):
        if tokens[end : end + 1] == ["{"]:
            end = _skip_argument(tokens, end)
    return end


def to_mathtext_part(part: FormulaPart) -> str:
    r"""Convert a part to the syntax of mathtext: `{ \cal L }` becomes `{\mathcal{L}}`."""
    source, closings, is_argument = list[str](), list[str](), list[bool]()
    previous = ""
    for original in part:
        token = _SYNONYMS.get(original, original)
        if token == "{":
            closings.append("}")
            is_argument.append(previous not in ("", "}", "{") and not previous.startswith(r"\left"))
        elif token == "}" and closings:
            token = closings.pop()
            is_argument.pop()
        elif token in _STYLES and previous == "{":
            token = _STYLES[token] + "{"
            closings[-1] = "}}"
        elif token == r"\frac" and not any(is_argument):
            token = r"\dfrac"
        previous = original
        source.append(f"{token} " if re.fullmatch(r"\\[A-Za-z]+", token) else token)
    return "".join(source)


class FormulaRecombiner:
    """Samples formulas from the parts of labels, and renders them like published images.

    Parts that mathtext cannot render are left out.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        from matplotlib import _mathtext
        from matplotlib.font_manager import FontProperties
        from matplotlib.ft2font import LoadFlags

        self._mathtext: Any = _mathtext
        self._formulas = [split_parts(label) for label in labels]
        self._occurrences: dict[FormulaPart, list[tuple[int, int]]] = defaultdict(list)
        for number, parts in enumerate(self._formulas):
            for position, part in enumerate(parts):
                self._occurrences[part].append((number, position))
        self._size = FONT_SIZE * RENDER_SCALE
        self._fonts = _mathtext.BakomaFonts(
            FontProperties(math_fontfamily="cm", size=self._size), LoadFlags.NO_HINTING
        )
        self._parser = _mathtext.Parser()
        self._boxes: dict[FormulaPart, Any] = {}

    def sample(self, rng: random.Random) -> tuple[str, Image.Image]:
        """Sample a formula and its image: dark on white, mode L, cropped to the formula."""
        while True:
            parts = [part for part in self._sample_parts(rng) if self._parse(part) is not None]
            if parts and (mask := self._render(parts, rng)) is not None:
                return " ".join(token for part in parts for token in part), mask

    def _sample_parts(self, rng: random.Random) -> list[FormulaPart]:
        number, position = rng.randrange(len(self._formulas)), 0
        parts, num_tokens = list[FormulaPart](), 0
        while position < len(self._formulas[number]):
            part = self._formulas[number][position]
            num_tokens += len(part)
            if num_tokens > MAX_TOKENS:
                break
            if rng.random() < SWITCH_PROBABILITY:
                number, position = rng.choice(self._occurrences[part])
            parts.append(_mutate(part, rng) if rng.random() < MUTATION_PROBABILITY else part)
            position += 1
        return parts

    def _parse(self, part: FormulaPart) -> Any:
        """Return the box of a part, or None if mathtext cannot parse it."""
        if part not in self._boxes:
            try:
                source = f"${to_mathtext_part(part)}$"
                self._boxes[part] = self._parser.parse(source, self._fonts, self._size, 72)
            except (ValueError, RuntimeError, KeyError, IndexError):
                self._boxes[part] = None
        return self._boxes[part]

    def _render(self, parts: Sequence[FormulaPart], rng: random.Random) -> Image.Image | None:
        boxes, previous = list[Any](), ""
        for part in parts:
            space = 0.0
            if part[0] in BINARY_OPERATORS and previous and previous not in OPENING:
                space = 0.22
            elif part[0] == r"\frac" or part[:2] == ("{", r"\frac"):
                space = 0.1
            before, after = (
                self._mathtext.Kern(width * self._size)
                for width in (space, max(space, 0.17 * (part[0] in LARGE_OPERATORS)))
            )
            boxes += [before, self._parse(part), after]
            previous = part[-1]
        raster = self._mathtext.ship(self._mathtext.Hlist(boxes)).to_raster(antialiased=True)
        mask = Image.fromarray(np.asarray(raster.image, dtype=np.uint8))
        if (bounds := mask.getbbox()) is None:
            return None
        mask = mask.crop(bounds)
        scale = rng.uniform(0.95, 1.05) / RENDER_SCALE
        size = tuple(max(1, round(side * scale)) for side in mask.size)
        mask = mask.resize((size[0], size[1]), Image.Resampling.BOX)
        # Published images have heavier strokes.
        weight = rng.uniform(1.2, 2.2)
        return mask.point(lambda ink: 255 - min(255, round(ink * weight)))


def _mutate(part: FormulaPart, rng: random.Random) -> FormulaPart:
    """Replace letters and digits of a part, except in names."""
    if {r"\mathrm", r"\operatorname", r"\operatorname*", r"\begin{array}"}.intersection(part):
        return part
    return tuple(
        rng.choice(_CLASS_OF[token]) if token in _CLASS_OF and rng.random() < 0.6 else token
        for token in part
    )


MARGIN, ENLARGEMENT, TOKEN_SIDE, MAX_PIXELS = 4, 1.6, 28, 200_704


def fit_formula_image(image: Image.Image) -> Image.Image:
    """Crop an image to its formula, enlarge it, and pad it to whole image tokens with white."""
    page = image.convert("L")
    page = page.crop(page.point(lambda value: 255 * (value < 200)).getbbox() or (0, 0, 8, 8))
    width, height = page.width + 2 * MARGIN, page.height + 2 * MARGIN
    factor = min(ENLARGEMENT, 0.9 * (MAX_PIXELS / (width * height)) ** 0.5)
    page = page.resize(
        (max(1, round(page.width * factor)), max(1, round(page.height * factor))),
        Image.Resampling.BICUBIC,
    )
    margin = round(MARGIN * factor)
    sides = [-(-(side + 2 * margin) // TOKEN_SIDE) * TOKEN_SIDE for side in page.size]
    canvas = Image.new("L", (sides[0], max(2 * TOKEN_SIDE, sides[1])), 255)
    canvas.paste(page, (margin, margin))
    return canvas
