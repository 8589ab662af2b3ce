"""Render HTML pages without network access: templates, embedded images and formulas.

Formulas in answers are converted by latex2mathml (extra `latex`), which receives short sources
without macros to bound its work. Only known elements, and attributes with harmless values, remain.
The page builds the formula from a JSON tree without parsing markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypedDict
from xml.etree.ElementTree import Element

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from finesight import __version__
from finesight.errors import UserError
from finesight.evaluate.latex_metrics import strip_math_delimiters
from finesight.report.i18n import LANGUAGE_TAGS, get_language, get_translations, translate_markup
from finesight.storage import write_file

JPEG_QUALITY = 88

MAX_PNG_COLORS = 4096
"""Maximum number of colors for which PNG is tried.

PNG of images with more colors would be slow to encode and larger than JPEG.
"""


class InlineImage(TypedDict):
    """Embedded image, the argument of `drawImage` in `base.js`.

    Attributes:
        src: Data URL, possibly of a smaller version of the image.
        width: Width of the original image, to which boxes refer.
    """

    src: str
    width: int
    height: int


def build_inline_image(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> InlineImage:
    """Embed an RGB image in PNG or JPEG, whichever is smaller, with sides of at most `max_side`.

    The width and height of the result are those of the original image, to which boxes refer.
    """
    assert image.mode == "RGB", f"image mode is {image.mode}, not RGB"
    width, height = image.size
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    encodings = []
    if image.getcolors(MAX_PNG_COLORS) is not None:
        encodings.append(("png", _encode_image(image, "PNG")))
    encodings.append(("jpeg", _encode_image(image, "JPEG", quality=quality)))
    name, content = min(encodings, key=lambda encoding: len(encoding[1]))
    data_url = f"data:image/{name};base64,{base64.b64encode(content).decode()}"
    return InlineImage(src=data_url, width=width, height=height)


def _encode_image(image: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


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


class FormulaConverter:
    """Converts LaTeX formulas to MathML and caches the results."""

    def __init__(self) -> None:
        self._convert_element: Callable[[str], Element] | None = None
        with suppress(ImportError):
            from latex2mathml.converter import convert_to_element

            self._convert_element = convert_to_element
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
        if source in self._cache:
            return self._cache[source]
        formula, tree = strip_math_delimiters(source), None
        is_supported = 0 < len(formula) <= MAX_FORMULA_CHARS and not _MACRO_PATTERN.search(formula)
        if self._convert_element is not None and is_supported:
            # The converter raises many types of errors for generated text.
            with suppress(Exception):
                tree = _sanitize(self._convert_element(formula), MAX_TREE_DEPTH)
                # Display style: fractions and sums in full size.
                tree[1] = {"displaystyle": "true"}
        self._cache[source] = tree
        return tree


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


GENERATOR_TAG = b'<meta name="generator" content="finesight'
"""Prefix of the HTML tag that marks pages of this package, within their first kilobyte."""

_TEMPLATES_FOLDER = importlib.resources.files("finesight.report") / "templates"


def render_page(
    template: str, data: object = None, assets: Sequence[str] = (), **values: object
) -> str:
    """Render the template `templates/TEMPLATE.html` as a self-contained HTML page.

    The template extends `base.html`, which requires `title` and has the blocks `lead` and `main`.
    All values are escaped. The styles and scripts of `base`, of the assets and of the template are
    embedded. Templates and scripts have a function `translate` for texts in the current language.

    The page treats `data` as text: scripts insert it with `createElement` of `base.js` as text
    nodes. A content security policy (CSP Level 3, section 6.1) allows only the script with the
    given SHA-256, and embedded images.

    Args:
        data: JSON data without NaN or infinity, available to scripts as `DATA`.
    """
    names = dict.fromkeys(("base", *assets, template))
    script, style = (
        "".join(_read_asset(f"{name}.{extension}", optional=True) for name in names)
        for extension in ("js", "css")
    )
    assert "</script" not in script, f"the script of {template} contains an end tag"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    page = _get_environment().get_template(f"{template}.html")
    text = page.render(
        **values,
        data=Markup(_to_safe_json(data)),
        language=LANGUAGE_TAGS[get_language()],
        policy=policy,
        script=Markup(script),
        style=Markup(style),
        translations=json.dumps(dict(get_translations()), ensure_ascii=False),
        version=__version__,
    )
    # File names may contain undecodable bytes, which Python represents as surrogates.
    return text.encode("utf-8", "replace").decode()


def write_page(file: Path, page: str) -> None:
    """Write an HTML page atomically. An older page of this package is replaced.

    Raises:
        UserError: The file exists and is not a page of this package, or it cannot be written.
    """
    raise_if_not_generated(file)
    write_file(file, page.encode())


def raise_if_not_generated(file: Path) -> None:
    """Raise UserError if a file exists and is not a page of this package.

    Commands call this function before minutes of computation, since `write_page` would fail.
    """
    if not file.exists():
        return
    start = b""
    if file.is_file():
        with file.open("rb") as stream:
            start = stream.read(1024)
    if GENERATOR_TAG not in start:
        raise UserError(
            f"{file.name} exists and is not a page of finesight",
            where=str(file),
            expected="a new file name, or an older page to replace",
            remedy="choose another name, or move the file",
        )


@cache
def _get_environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["translate"] = translate_markup
    return environment


def _read_asset(name: str, *, optional: bool = False) -> str:
    file = _TEMPLATES_FOLDER / name
    return "" if optional and not file.is_file() else file.read_text(encoding="utf-8")


def _to_safe_json(data: object) -> str:
    """Return JSON that can be embedded in a script element.

    It contains no characters that could end the element or start a comment.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
