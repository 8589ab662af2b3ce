r"""New formulas in the style of given LaTeX labels, drawn as LaTeX prints them.

A formula of published datasets is a sequence of parts: a symbol, a group or a command with its
arguments, and its scripts. A new formula follows one label and continues in another one after a
part that both contain. Its letters change within their alphabets, and arguments and scripts come
from other labels, because most parts of a real formula are in no other one. So it has the symbols,
spaces and braces of the labels.

mathtext takes most of its time to parse. Here its parser only draws: it gets the parts.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from synthetic_tasks.formula_grammar import GREEK_LETTERS, LETTERS

SWITCH_PROBABILITY = 0.2
"""Probability to continue in another label after a part that it contains, too."""

MAX_LETTER_RATE, ARGUMENT_RATE, SCRIPT_RATE = 0.6, 0.15, 0.05
"""Largest probability that a letter changes in a formula; probabilities that an argument comes from
another label, and that a script is left out or added."""

MAX_TOKENS = 140
FONT_SIZE, RENDER_SCALE = 15.0, 2
"""Font size of the published images in pixels per em; factor of the size that is rendered."""

LARGE_OPERATORS = frozenset((r"\int", r"\oint", r"\sum", r"\prod"))
_STYLES = {
    **{rf"\{name}": f"{name}" for name in ("rm", "it", "bf", "sf", "tt", "cal")},
    **{rf"\math{name}": f"{name}" for name in ("rm", "it", "bf", "sf", "tt", "cal")},
    r"\operatorname": "rm",
    r"\operatorname*": "rm",
    r"\textrm": "rm",
}
"""Font of commands that change the style of a group or an argument."""

_SYNONYMS = {
    r"\ne": r"\neq",
    r"\le": r"\leq",
    r"\ge": r"\geq",
    r"\to": r"\rightarrow",
    r"\dots": r"\ldots",
    r"\vert": "|",
    r"\Vert": r"\|",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\colon": ":",
    r"\dag": r"\dagger",
    r"\bot": r"\perp",
    "<": r"\langle",
    ">": r"\rangle",
}
_SPACES = {
    r"\,": 0.167,
    r"\:": 0.222,
    r"\>": 0.222,
    r"\;": 0.278,
    "\\": 0.333,
    "~": 0.333,
    r"\quad": 1.0,
    r"\qquad": 2.0,
    r"\!": -0.167,
}
"""Widths of spaces in em."""

_ACCENTS = {name: name[1:] for name in (r"\hat", r"\bar", r"\tilde", r"\dot", r"\ddot", r"\vec")}
_ACCENTS |= {r"\breve": "breve", r"\overrightarrow": "overrightarrow"}
_ACCENTS |= {r"\widehat": "widehat", r"\widetilde": "widetilde", r"\overleftarrow": "overleftarrow"}
_DELIMITER_EMS = {"big": 1.2, "Big": 1.8, "bigg": 2.4, "Bigg": 3.0}
_UNIT_EMS = {"mm": 0.285, "cm": 2.85, "em": 1.0, "pt": 0.1, "ex": 0.43, "in": 7.2}
_LENGTH = re.compile(rf"(-?[\d.]+)({'|'.join(_UNIT_EMS)})")
_DELIMITER = re.compile(r"\\([bB]igg?)[lrm]?")
_LEFT = re.compile(r"\\left([^A-Za-z]|\\.+|[lr]?vert)")
_SWITCHES = frozenset(rf"\{name}" for name in ("rm", "it", "bf", "sf", "tt", "cal"))
"""Commands that apply to the rest of their group."""

_COMMANDS = frozenset(
    (*_STYLES, *_ACCENTS, r"\frac", r"\sqrt", r"\stackrel", r"\overline", r"\underline", r"\hspace")
)
"""Commands with arguments."""

_IGNORED = frozenset((r"\displaystyle", r"\textstyle", r"\smallskip"))
_LIMITS = (r"\limits", r"\nolimits")
_NAMES = frozenset(
    (r"\mathrm", r"\operatorname", r"\operatorname*", r"\textrm", r"\rm", r"\hspace")
)
_UNDRAWABLE = frozenset((r"\not", r"\surd", r"\boldmath"))
"""Commands that mathtext draws apart from their argument, or not at all."""

_CLASSES = (tuple(LETTERS), GREEK_LETTERS, tuple("0123456789"))
_CLASS_OF = {token: tokens for tokens in _CLASSES for token in tokens}


@dataclass(frozen=True, slots=True)
class FormulaGroup:
    r"""Parts between braces, between `\left` and `\right`, or in an environment.

    Attributes:
        opening: Tokens before the parts, such as `{` or `\begin{array} { c c }`.
    """

    opening: tuple[str, ...]
    parts: tuple[FormulaPart, ...]
    closing: str


FormulaPart = tuple[str | FormulaGroup, ...]
"""A symbol, group or command with its arguments, and its scripts."""


def parse_formula(latex: str) -> tuple[FormulaPart, ...]:
    """Parse space-separated LaTeX tokens into the parts of a formula.

    Raises:
        ValueError: A group is not closed.
    """
    return _FormulaParser(latex.split()).parse_parts("")


def format_formula(parts: Sequence[FormulaPart]) -> str:
    """Return the LaTeX of parts, the inverse of `parse_formula`."""
    return " ".join(_iter_tokens(parts))


def _iter_tokens(parts: Sequence[FormulaPart]) -> Iterator[str]:
    for item in (item for part in parts for item in part):
        if isinstance(item, str):
            yield item
        else:
            yield from item.opening
            yield from _iter_tokens(item.parts)
            yield item.closing


class _FormulaParser:
    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens, self._next = tokens, 0

    def parse_parts(self, closing: str) -> tuple[FormulaPart, ...]:
        """Parse until a token that starts with `closing`, which becomes the next token."""
        parts = list[FormulaPart]()
        while token := self._peek():
            if closing and token.startswith(closing) and not token.startswith(r"\rightarrow"):
                return tuple(parts)
            part = () if token in ("_", "^") else self._parse_argument()
            while self._peek() in ("_", "^", *_LIMITS):
                token = self._take()
                part += (token, *(self._parse_argument() if token in ("_", "^") else ()))
            parts.append(part)
        if closing:
            raise ValueError(f"no {closing}")
        return tuple(parts)

    def _parse_argument(self) -> FormulaPart:
        token = self._take()
        if token == "{":
            return (self._parse_group((token,), "}"),)
        if _LEFT.fullmatch(token):
            return (self._parse_group((token,), r"\right"),)
        if token.startswith(r"\begin"):
            columns = tuple(self._take_braced()) if token == r"\begin{array}" else ()
            return (self._parse_group((token, *columns), r"\end"),)
        if _DELIMITER.fullmatch(token):
            return token, self._take()
        items: list[str | FormulaGroup] = [token]
        if token in _COMMANDS:
            if token == r"\sqrt" and self._peek() == "[":
                items.append(self._parse_group((self._take(),), "]"))
            is_switch = token in _SWITCHES and self._peek() != "{"
            for _ in range(0 if is_switch else 2 if token in (r"\frac", r"\stackrel") else 1):
                items += self._parse_argument() if self._peek() == "{" else (self._take(),)
        return tuple(items)

    def _parse_group(self, opening: tuple[str, ...], closing: str) -> FormulaGroup:
        parts = self.parse_parts(closing)
        return FormulaGroup(opening, parts, self._take())

    def _take_braced(self) -> Iterator[str]:
        while (token := self._take()) != "}":
            yield token
        yield token

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        if not (token := self._peek()):
            raise ValueError("an incomplete formula")
        self._next += 1
        return token


class FormulaRecombiner:
    """Samples formulas in the style of labels, and draws them like published images.

    Parts that cannot be drawn are left out.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._formulas = list[tuple[FormulaPart, ...]]()
        for label in labels:
            try:
                self._formulas.append(parse_formula(label))
            except (ValueError, RecursionError):  # such labels exist in published datasets
                continue
        self._occurrences: dict[FormulaPart, list[tuple[int, int]]] = defaultdict(list)
        self._arguments: dict[str, list[FormulaGroup]] = defaultdict(list)
        for number, parts in enumerate(self._formulas):
            self._collect_arguments(parts)
            for position, part in enumerate(parts):
                self._occurrences[part].append((number, position))
        self._drawing = FormulaDrawing(FONT_SIZE * RENDER_SCALE)

    def _collect_arguments(self, parts: Sequence[FormulaPart]) -> None:
        for part in parts:
            for previous, item in zip(("", *part), part, strict=False):
                if isinstance(item, FormulaGroup):
                    self._arguments[_name_place(part, previous, item)].append(item)
                    self._collect_arguments(item.parts)

    def sample(self, rng: random.Random) -> tuple[str, Image.Image]:
        """Sample a formula and its image: dark on white, mode L, cropped to the formula."""
        while True:
            parts = self._sample_parts(rng)
            if parts and (mask := self._drawing.draw(parts, rng)) is not None:
                return format_formula(parts), mask

    def _sample_parts(self, rng: random.Random) -> list[FormulaPart]:
        number, position = rng.randrange(len(self._formulas)), 0
        letter_rate = MAX_LETTER_RATE * rng.random() ** 2
        parts, num_tokens = list[FormulaPart](), 0
        while position < len(self._formulas[number]):
            original = self._formulas[number][position]
            if rng.random() < SWITCH_PROBABILITY:
                number, position = rng.choice(self._occurrences[original])
            part = self._vary(original, letter_rate, rng)
            if not self._drawing.is_drawable(part):
                part = original if self._drawing.is_drawable(original) else ()
            num_tokens += sum(1 for _ in _iter_tokens([part]))
            if num_tokens > MAX_TOKENS:
                break
            parts += [part] if part else []
            position += 1
        return parts

    def _vary(self, part: FormulaPart, letter_rate: float, rng: random.Random) -> FormulaPart:
        """Change letters, arguments and scripts of a part."""
        if part[0] in _NAMES:
            return part
        items = list[str | FormulaGroup]()
        previous: str | FormulaGroup = ""
        for item in part:
            if isinstance(item, FormulaGroup):
                if previous in ("_", "^") and rng.random() < SCRIPT_RATE:
                    items.pop()  # without the script
                else:
                    similar = self._arguments[_name_place(part, previous, item)]
                    chosen = rng.choice(similar) if rng.random() < ARGUMENT_RATE else item
                    items.append(self._vary_group(chosen, letter_rate, rng))
            elif item in _CLASS_OF and rng.random() < letter_rate:
                items.append(rng.choice(_CLASS_OF[item]))
            else:
                items.append(item)
            previous = item
        if len(part) == 1 and part[0] in _CLASS_OF and rng.random() < SCRIPT_RATE:
            operator = rng.choice("_^")
            if self._arguments[operator]:
                items += [operator, rng.choice(self._arguments[operator])]
        return tuple(items)

    def _vary_group(
        self, group: FormulaGroup, letter_rate: float, rng: random.Random
    ) -> FormulaGroup:
        if group.parts and group.parts[0][0] in _NAMES:
            return group
        parts = tuple(self._vary(part, letter_rate, rng) for part in group.parts)
        return FormulaGroup(group.opening, parts, group.closing)


def _name_place(part: FormulaPart, previous: str | FormulaGroup, group: FormulaGroup) -> str:
    """Return a name that is the same for arguments which can replace each other."""
    if previous in ("_", "^"):
        return str(previous)
    command = part[0] if isinstance(part[0], str) else ""
    return command + " ".join(group.opening)


class FormulaDrawing:
    """Draws formulas in Computer Modern, with the layout of mathtext.

    Args:
        size: Font size in pixels per em.
    """

    def __init__(self, size: float) -> None:
        import pyparsing
        from matplotlib import _mathtext, rcParams
        from matplotlib._mathtext_data import tex2uni
        from matplotlib.font_manager import FontProperties
        from matplotlib.ft2font import LoadFlags

        self._mathtext: Any = _mathtext
        self._parse_error: type[Exception] = pyparsing.ParseBaseException
        self._symbols = frozenset(tex2uni)
        self._size = size
        fonts = _mathtext.BakomaFonts(
            FontProperties(math_fontfamily="cm", size=size), LoadFlags.NO_HINTING
        )
        self._parser: Any = _mathtext.Parser()
        self._parser._em_width_cache = {}
        self._parser._needs_space_after_subsuper = False
        state = _mathtext.ParserState(fonts, rcParams["mathtext.default"], "rm", size, 72)
        self._parser._state_stack = [state]
        self._is_drawable: dict[FormulaPart, bool] = {}
        self._has_italic_names = False

    def is_drawable(self, part: FormulaPart) -> bool:
        """Return whether all symbols and commands of a part are known."""
        if part not in self._is_drawable:
            if len(self._is_drawable) > 50_000:
                self._is_drawable.clear()
            try:
                self._build_formula([part])
                self._is_drawable[part] = True
            # Two superscripts, and labels that nest too deep, too.
            except (ValueError, LookupError, RuntimeError, self._parse_error):
                self._is_drawable[part] = False
        return self._is_drawable[part]

    def draw(self, parts: Sequence[FormulaPart], rng: random.Random) -> Image.Image | None:
        """Draw drawable parts, or return None if they leave no ink."""
        # Published labels call plain letters in the source of an image an operator.
        self._has_italic_names = rng.random() < 0.4
        raster = self._mathtext.ship(self._build_formula(parts)).to_raster(antialiased=True)
        mask = Image.fromarray(np.asarray(raster.image, dtype=np.uint8))
        if (bounds := mask.getbbox()) is None:
            return None
        mask = mask.crop(bounds)
        scale = rng.uniform(0.9, 1.05) / RENDER_SCALE
        size = tuple(max(1, round(side * scale)) for side in mask.size)
        mask = mask.resize((size[0], size[1]), Image.Resampling.BOX)
        # Published images have heavier strokes.
        weight = rng.uniform(1.4, 2.3)
        return mask.point(lambda ink: 255 - min(255, round(ink * weight)))

    def _build_formula(self, parts: Sequence[FormulaPart]) -> Any:
        self._parser.push_state()
        try:
            return self._build_parts(parts, depth=0)
        finally:
            del self._parser._state_stack[1:]

    def _build_parts(self, parts: Sequence[FormulaPart], depth: int) -> Any:
        """Build the box of parts; `depth` is the number of surrounding arguments."""
        boxes, previous = list[Any](), ""
        for part in parts:
            if part[0] in _STYLES and len(part) == 1:  # { \bf x }
                self._parser.get_state().font = _STYLES[str(part[0])]
                continue
            boxes += self._build_part(part, previous, depth)
            previous = next(iter(reversed(list(_iter_tokens([part])))))
        return self._mathtext.Hlist(boxes)

    def _build_part(self, part: FormulaPart, previous: str, depth: int) -> list[Any]:
        scripts = [i for i, item in enumerate(part) if item in ("_", "^")]
        end = scripts[0] if scripts else len(part)
        head = tuple(item for item in part[:end] if item not in _LIMITS)
        nucleus = self._build_nucleus(head, previous, depth)
        if scripts:
            operands = list[Any]()
            for i in scripts:
                stop = next((j for j in scripts if j > i), len(part))
                operands += [part[i], self._build_script(part[i + 1 : stop], depth)]
            tokens = {"nucleus": nucleus, "subsuper": operands}
            nucleus = _first(self._parser.subsuper("", 0, tokens))
        is_tall = part[0] == r"\frac" or format_formula([part]).startswith(r"{ \frac")
        space = self._mathtext.Kern(0.1 * self._size * is_tall * (depth == 0))
        after = 0.2 * (part[0] in LARGE_OPERATORS)
        return [space, nucleus, self._mathtext.Kern(after * self._size), space]

    def _build_script(self, items: FormulaPart, depth: int) -> Any:
        group = items[0]
        if isinstance(group, FormulaGroup):
            return self._build_group(group, depth + 2)
        return self._build_nucleus(items, "", depth + 2)

    def _build_group(self, group: FormulaGroup, depth: int) -> Any:
        """Build the box of the parts of a group in its own style."""
        self._parser.push_state()
        box = self._build_parts(group.parts, depth)
        self._parser.pop_state()
        return box

    def _build_nucleus(self, items: FormulaPart, previous: str, depth: int) -> Any:
        if not items:
            return self._mathtext.Hbox(0)
        head, arguments = items[0], items[1:]
        if isinstance(head, FormulaGroup):
            return self._build_enclosed(head, depth)
        if head in _SPACES:
            return self._parser._make_space(_SPACES[head])
        if head in _IGNORED:
            return self._mathtext.Hbox(0)
        if (match := _DELIMITER.fullmatch(head)) is not None:
            total = _DELIMITER_EMS[match[1]] * self._size
            return self._build_delimiter(str(arguments[0]), total)
        groups = [self._as_group(argument) for argument in arguments]
        if head == r"\hspace":
            return self._mathtext.Kern(_parse_ems(groups[0]) * self._size)
        if head in _STYLES and groups:
            return self._build_name(head, groups[0], depth)
        if groups:
            return self._build_command(head, groups, depth)
        if head[1:] in self._parser._function_names:
            return self._build_function(head[1:])
        return self._build_symbol(head, previous, depth)

    def _as_group(self, item: str | FormulaGroup) -> FormulaGroup:
        return item if isinstance(item, FormulaGroup) else FormulaGroup(("{",), ((item,),), "}")

    def _build_symbol(self, token: str, previous: str, depth: int) -> Any:
        if token not in ("<", ">"):
            token = _SYNONYMS.get(token, token)
        if token in _UNDRAWABLE:
            raise ValueError(f"cannot draw {token}")
        is_character = len(token) == 1 or token in (r"\{", r"\}", r"\|", r"\%", r"\#", r"\&", r"\$")
        if not is_character and not (token[0] == "\\" and token[1:] in self._symbols):
            raise ValueError(f"unknown command {token}")
        state = self._parser.get_state()
        if depth >= 2:  # no spaces around operators in scripts
            return self._mathtext.Char("\N{MINUS SIGN}" if token == "-" else token, state)
        return _first(self._parser.symbol(previous + token, len(previous), {"sym": token}))

    def _build_function(self, name: str) -> Any:
        self._parser.push_state()
        self._parser.get_state().font = "rm"
        chars = [self._mathtext.Char(c, self._parser.get_state()) for c in name]
        self._parser.pop_state()
        box = self._mathtext.Hlist(chars)
        box.function_name = name
        return box

    def _build_name(self, head: str, group: FormulaGroup, depth: int) -> Any:
        self._parser.push_state()
        if not (head.startswith(r"\operatorname") and self._has_italic_names):
            self._parser.get_state().font = _STYLES[head]
        box = self._build_parts(group.parts, depth)
        self._parser.pop_state()
        if head.startswith(r"\operatorname"):
            name = "".join(_iter_tokens(group.parts))
            box.function_name = name
            box = self._mathtext.Hlist([box, self._parser._make_space(0.167)])
            box.function_name = name
        return box

    def _build_command(self, head: str, groups: Sequence[FormulaGroup], depth: int) -> Any:
        parser = self._parser
        inner = depth + 1 if head == r"\frac" else depth
        boxes = [self._build_group(group, inner) for group in groups]
        if head == r"\frac":
            style = parser._MathStyle.TEXTSTYLE if depth else parser._MathStyle.DISPLAYSTYLE
            rule = parser.get_state().get_current_underline_thickness()
            return _first(parser._genfrac("", "", rule, style, *boxes))
        if head == r"\sqrt":
            root = [boxes[0]] if len(boxes) == 2 else None
            return _first(parser.sqrt({"root": root, "value": boxes[-1]}))
        if head == r"\stackrel":
            return parser._genset(r"\overset", 0, {"annotation": boxes[0], "body": boxes[1]})
        if head in (r"\overline", r"\underline"):
            method = parser.overline if head == r"\overline" else parser.underline
            return _first(method({"body": boxes[0]}))
        if head in _ACCENTS:
            letters = [child for child in boxes[0].children if child.width]
            symbol = letters[0] if len(letters) == 1 else boxes[0]
            return parser.accent({"accent": _ACCENTS[head], "sym": symbol})
        raise ValueError(f"unknown command {head}")

    def _build_enclosed(self, group: FormulaGroup, depth: int) -> Any:
        if group.opening[0].startswith(r"\begin"):
            return self._build_array(group, depth)
        box = self._build_group(group, depth)
        if not group.opening[0].startswith(r"\left"):
            return box
        names = group.opening[0].removeprefix(r"\left"), group.closing.removeprefix(r"\right")
        front, back = (_SYNONYMS.get(name, name) for name in names)
        # Delimiters are never smaller than in the text.
        box.height = max(box.height, 0.75 * self._size)
        box.depth = max(box.depth, 0.25 * self._size)
        return self._parser._auto_sized_delimiter(front, [box], back)

    def _build_delimiter(self, name: str, total: float) -> Any:
        axis = 0.25 * self._size
        state = self._parser.get_state()
        return self._mathtext.AutoHeightChar(
            _SYNONYMS.get(name, name), total / 2 + axis, total / 2 - axis, state
        )

    def _build_array(self, group: FormulaGroup, depth: int) -> Any:
        rows: list[list[list[FormulaPart]]] = [[[]]]
        for part in group.parts:
            if part == ("\\\\",):
                rows.append([[]])
            elif part == ("&",):
                rows[-1].append([])
            else:
                rows[-1][-1].append(part)
        grid = [[self._build_parts(cell, depth + 1) for cell in row] for row in rows if any(row)]
        widths = [
            max(row[i].width for row in grid if i < len(row)) for i in range(max(map(len, grid)))
        ]
        lines = list[Any]()
        for row in grid:
            cells = list[Any]()
            for box, width in zip(row, widths, strict=False):
                centered = self._mathtext.HCentered([box])
                centered.hpack(width, "exactly")
                cells += [centered, self._mathtext.Kern(self._size)]
            line = self._mathtext.Hlist(cells[:-1])
            line.height = max(line.height, 0.85 * self._size)
            line.depth = max(line.depth, 0.35 * self._size)
            lines.append(line)
        column = self._mathtext.Vlist(lines)
        total = column.height + column.depth
        column.shift_amount = total / 2 - 0.25 * self._size - column.depth
        box = self._mathtext.Hlist([column])
        # The delimiters around it have its height.
        box.height, box.depth = total / 2 + 0.25 * self._size, total / 2 - 0.25 * self._size
        return box


def _parse_ems(group: FormulaGroup) -> float:
    match = _LENGTH.fullmatch("".join(_iter_tokens(group.parts)))
    if match is None:
        raise ValueError(f"not a length: {group}")
    return float(match[1]) * _UNIT_EMS[match[2]]


def _first(boxes: Any) -> Any:
    return boxes[0] if isinstance(boxes, list) else boxes


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
