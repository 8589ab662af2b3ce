"""Conversion of LaTeX formulas in generated answers to MathML.

latex2mathml (extras `latex` and `web`) receives short sources without macros to bound its work.
Only known elements, and attributes with harmless values, remain. Reports build a formula from a
JSON tree without parsing markup; the chat page inserts escaped HTML.
"""

from __future__ import annotations

import html
import re
from contextlib import suppress
from functools import lru_cache
from importlib import import_module, util
from xml.etree.ElementTree import Element

from markupsafe import Markup

from finesight.evaluate.text_metrics import strip_math_delimiters

MathMLTree = list["str | dict[str, str] | MathMLTree"]
"""MathML element as JSON: name, attributes, then texts and child elements."""

MAX_FORMULA_CHARS = 2000
"""Maximum length of a LaTeX source. Longer sources are displayed as text."""

MAX_TREE_DEPTH = 60

_ELEMENT_NAMES = (
    "math mrow mstyle mi mn mo mtext mspace ms mpadded mphantom mfrac msqrt mroot msub msup msubsup"
    " munder mover munderover mmultiscripts mprescripts menclose merror mtable mtr mtd"
)
ALLOWED_ELEMENTS = set(_ELEMENT_NAMES.split())

_ATTRIBUTES_BY_PATTERN = {
    r"[a-z -]{1,24}": "accent accentunder displaystyle fence form largeop movablelimits separator"
    " stretchy symmetric columnalign mathvariant notation",
    r"[+-]?\d{1,2}": "scriptlevel columnspan rowspan",
    r"[+-]?(\d{1,2}(\.\d{1,4})?|\.\d{1,4})(em|ex|px|pt|mm|cm|%)?": "width height depth lspace"
    " rspace voffset minsize maxsize mathsize linethickness",
    r"#[0-9a-fA-F]{3,8}|[a-zA-Z]{1,24}": "mathcolor mathbackground",
}
ALLOWED_ATTRIBUTES = {
    name: re.compile(pattern)
    for pattern, names in _ATTRIBUTES_BY_PATTERN.items()
    for name in names.split()
}
"""Allowed MathML attributes, each with the pattern of its values."""

_MACRO_PATTERN = re.compile(r"\\(?:[egx]?def|let|(?:re)?new|provide|Declare)")


def is_converter_installed() -> bool:
    """Return whether latex2mathml is installed."""
    with suppress(ImportError):
        return util.find_spec("latex2mathml.converter") is not None
    return False


@lru_cache(maxsize=4096)
def convert_formula(source: str) -> MathMLTree | None:
    """Convert a LaTeX formula to MathML.

    Returns None if the page should display the source: it is empty, too long, invalid or defines
    macros, or the converter package is not installed.
    """
    formula = strip_math_delimiters(source)
    if 0 < len(formula) <= MAX_FORMULA_CHARS and not _MACRO_PATTERN.search(formula):
        # The converter raises many types of errors for generated text.
        with suppress(Exception):
            element = import_module("latex2mathml.converter").convert_to_element(formula)
            # Display style: fractions and sums in full size.
            name, _, *children = _sanitize(element, MAX_TREE_DEPTH)
            return [name, {"displaystyle": "true"}, *children]
    return None


def render_mathml(tree: MathMLTree) -> Markup:
    """Render a formula as HTML. Texts and attribute values are escaped."""
    name, attributes, *children = tree
    assert isinstance(attributes, dict), f"attributes of <{name}> are {attributes!r}"
    pairs = (Markup(' {}="{}"').format(*pair) for pair in attributes.items())
    content: list[str] = []
    for child in children:
        if isinstance(child, str):
            content.append(child)
        elif not isinstance(child, dict):
            content.append(render_mathml(child))
    return Markup("<{}{}>{}</{}>").format(
        name, Markup("").join(pairs), Markup("").join(content), name
    )


def _sanitize(element: Element, max_depth: int) -> MathMLTree:
    """Convert a MathML element to JSON, without disallowed elements and attributes.

    Unknown elements become rows.

    Raises:
        ValueError: Elements are nested too deeply.
    """
    if not max_depth:
        raise ValueError(f"<{element.tag}> is nested deeper than {MAX_TREE_DEPTH} elements")
    name = element.tag if element.tag in ALLOWED_ELEMENTS else "mrow"
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        pattern = ALLOWED_ATTRIBUTES.get(key)
        if pattern is not None and pattern.fullmatch(value):
            attributes[key] = value
    tree: MathMLTree = [name, attributes]
    if element.text:
        # The converter writes symbols as character references.
        tree.append(html.unescape(element.text))
    tree += [_sanitize(child, max_depth - 1) for child in element]
    return tree
