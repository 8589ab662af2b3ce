"""Convert answers in LaTeX to MathML that is safe to display.

The converter (latex2mathml, extra `latex`) receives short sources without macros, which bounds its
work. Only known elements, and attributes with harmless values, remain. The page builds the formula
from a JSON tree without parsing markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from xml.etree.ElementTree import Element

from finesight.evaluate.latex_metrics import strip_math_delimiters

MathMLTree = list["str | dict[str, str] | MathMLTree"]
"""MathML element as JSON: name, attributes, then texts and child elements."""

MAX_FORMULA_CHARS = 2000
"""Maximum length of a LaTeX source. Longer sources are displayed as text."""

MAX_TREE_DEPTH = 60
"""Maximum nesting depth of MathML elements."""

ALLOWED_ELEMENTS = {
    *("math", "mrow", "mstyle", "mi", "mn", "mo", "mtext", "mspace", "ms", "mpadded", "mphantom"),
    *("mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder", "mover", "munderover"),
    *("mmultiscripts", "mprescripts", "menclose", "merror", "mtable", "mtr", "mtd"),
}

_KEYWORD_PATTERN = re.compile(r"[a-z -]{1,24}")
_INTEGER_PATTERN = re.compile(r"[+-]?\d{1,2}")
_LENGTH_PATTERN = re.compile(r"[+-]?(\d{1,2}(\.\d{1,4})?|\.\d{1,4})(em|ex|px|pt|mm|cm|%)?")
_COLOR_PATTERN = re.compile(r"#[0-9a-fA-F]{3,8}|[a-zA-Z]{1,24}")

ALLOWED_ATTRIBUTES = {
    **dict.fromkeys(["accent", "accentunder", "displaystyle", "fence", "form"], _KEYWORD_PATTERN),
    **dict.fromkeys(
        ["largeop", "movablelimits", "separator", "stretchy", "symmetric"], _KEYWORD_PATTERN
    ),
    **dict.fromkeys(["columnalign", "mathvariant", "notation"], _KEYWORD_PATTERN),
    **dict.fromkeys(["scriptlevel", "columnspan", "rowspan"], _INTEGER_PATTERN),
    **dict.fromkeys(["width", "height", "depth", "lspace", "rspace", "voffset"], _LENGTH_PATTERN),
    **dict.fromkeys(["minsize", "maxsize", "mathsize", "linethickness"], _LENGTH_PATTERN),
    **dict.fromkeys(["mathcolor", "mathbackground"], _COLOR_PATTERN),
}
"""Allowed MathML attributes, each with the pattern of its values."""

_MACRO_PATTERN = re.compile(r"\\(?:[egx]?def|let|(?:re)?new|provide|Declare)")


class FormulaConverter:
    """Converts LaTeX formulas to MathML and caches the results."""

    def __init__(self) -> None:
        self._convert_element = _import_converter()
        self._cache: dict[str, MathMLTree | None] = {}

    @property
    def is_available(self) -> bool:
        """True if the converter package latex2mathml is installed."""
        return self._convert_element is not None

    def convert(self, source: str) -> MathMLTree | None:
        """Convert a LaTeX formula to MathML.

        Returns None if the page should display the source: it is empty, too long, invalid or
        defines macros, or the converter package is not installed.
        """
        if source not in self._cache:
            self._cache[source] = self._convert_uncached(source)
        return self._cache[source]

    def _convert_uncached(self, source: str) -> MathMLTree | None:
        formula = strip_math_delimiters(source)
        if self._convert_element is None or not formula or len(formula) > MAX_FORMULA_CHARS:
            return None
        if _MACRO_PATTERN.search(formula):
            return None
        try:
            tree = _sanitize(self._convert_element(formula), MAX_TREE_DEPTH)
        except Exception:  # the converter raises many types for generated text
            return None
        # Display style: fractions and sums in full size.
        return [tree[0], {"displaystyle": "true"}, *tree[2:]]


def _import_converter() -> Callable[[str], Element] | None:
    try:
        from latex2mathml.converter import convert_to_element
    except ImportError:
        return None
    convert: Callable[[str], Element] = convert_to_element
    return convert


def _sanitize(element: Element, max_depth: int) -> MathMLTree:
    """Convert a MathML element to JSON, without disallowed elements and attributes.

    Unknown elements become rows.

    Raises:
        ValueError: Elements are nested too deeply.
    """
    if not max_depth:
        raise ValueError(f"<{element.tag}> is nested deeper than {MAX_TREE_DEPTH} elements")
    name = element.tag if element.tag in ALLOWED_ELEMENTS else "mrow"
    attributes = {
        key: value
        for key, value in element.attrib.items()
        if key in ALLOWED_ATTRIBUTES and ALLOWED_ATTRIBUTES[key].fullmatch(value)
    }
    tree: MathMLTree = [name, attributes]
    if element.text:
        # The converter writes symbols as character references.
        tree.append(html.unescape(element.text))
    tree += [_sanitize(child, max_depth - 1) for child in element]
    return tree
