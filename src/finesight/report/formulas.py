"""LaTeX that a model wrote becomes MathML that a browser draws and that can do nothing else.

The converter (latex2mathml, of the extra `latex`) is given short sources without macros, so that
its work is bounded; of what it gives, only known elements and attributes with harmless values are
kept. The page builds the formula from that tree, element by element: no markup is ever parsed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from xml.etree.ElementTree import Element

from finesight.evaluate.latex import bare_formula

Tree = list["str | dict[str, str] | Tree"]
"""An element as JSON: its name, its attributes, then text and elements within."""

LONGEST = 2000
"""Characters of a source that is still converted: more is a runaway answer, not a formula."""

DEEPEST = 60
"""Elements within each other that are still drawn."""

ELEMENTS = {
    *("math", "mrow", "mstyle", "mi", "mn", "mo", "mtext", "mspace", "ms", "mpadded", "mphantom"),
    *("mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder", "mover", "munderover"),
    *("mmultiscripts", "mprescripts", "menclose", "merror", "mtable", "mtr", "mtd"),
}

_WORD = re.compile(r"[a-z -]{1,24}")
_NUMBER = re.compile(r"[+-]?\d{1,2}")
_LENGTH = re.compile(r"[+-]?(\d{1,2}(\.\d{1,4})?|\.\d{1,4})(em|ex|px|pt|mm|cm|%)?")
_COLOUR = re.compile(r"#[0-9a-fA-F]{3,8}|[a-zA-Z]{1,24}")

ATTRIBUTES = {
    **dict.fromkeys(["accent", "accentunder", "displaystyle", "fence", "form"], _WORD),
    **dict.fromkeys(["largeop", "movablelimits", "separator", "stretchy", "symmetric"], _WORD),
    **dict.fromkeys(["columnalign", "mathvariant", "notation"], _WORD),
    **dict.fromkeys(["scriptlevel", "columnspan", "rowspan"], _NUMBER),
    **dict.fromkeys(["width", "height", "depth", "lspace", "rspace", "voffset"], _LENGTH),
    **dict.fromkeys(["minsize", "maxsize", "mathsize", "linethickness"], _LENGTH),
    **dict.fromkeys(["mathcolor", "mathbackground"], _COLOUR),
}
"""Attributes that are kept, each with the values that it may have."""

_MACROS = re.compile(r"\\(?:[egx]?def|let|(?:re)?new|provide|Declare)")


class Formulas:
    """Converts formulas, each source once."""

    def __init__(self) -> None:
        self._convert = _converter()
        self._known: dict[str, Tree | None] = {}

    @property
    def installed(self) -> bool:
        """Whether there is a converter."""
        return self._convert is not None

    def tree(self, source: str) -> Tree | None:
        """The formula to be drawn. None when it is empty, too long, defines macros, is no LaTeX,
        or cannot be converted for want of a converter: its source has to do then."""
        if source not in self._known:
            self._known[source] = self._tree(source)
        return self._known[source]

    def _tree(self, source: str) -> Tree | None:
        formula = bare_formula(source)
        if self._convert is None or not formula or len(formula) > LONGEST:
            return None
        if _MACROS.search(formula):
            return None
        try:
            tree = _kept(self._convert(formula), DEEPEST)
        except Exception:  # what a model writes brings it to raise nearly anything
            return None
        # Fractions and sums as large as in a line of their own.
        return [tree[0], {"displaystyle": "true"}, *tree[2:]]


def _converter() -> Callable[[str], Element] | None:
    try:
        from latex2mathml.converter import convert_to_element
    except ImportError:
        return None
    convert: Callable[[str], Element] = convert_to_element
    return convert


def _kept(element: Element, depth: int) -> Tree:
    """The element without what could be more than a formula. Raises ValueError for what stands in
    too many others; an unknown element is replaced by a row of what it holds."""
    if not depth:
        raise ValueError(f"<{element.tag}> stands within {DEEPEST} elements")
    name = element.tag if element.tag in ELEMENTS else "mrow"
    attributes = {
        key: value
        for key, value in element.attrib.items()
        if key in ATTRIBUTES and ATTRIBUTES[key].fullmatch(value)
    }
    tree: Tree = [name, attributes]
    if element.text:
        # The converter writes its symbols as references to characters.
        tree.append(html.unescape(element.text))
    tree += [_kept(child, depth - 1) for child in element]
    return tree
