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
"""Default JPEG quality of embedded images."""

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
    """Embed an RGB image, shrunk to sides of at most `max_side`.

    The width and height of the result are those of the original image, to which boxes refer.
    """
    data_url = encode_data_url(image, max_side, quality)
    return InlineImage(src=data_url, width=image.width, height=image.height)


def encode_data_url(
    image: Image.Image, max_side: int | None = None, quality: int = JPEG_QUALITY
) -> str:
    """Encode an RGB image as a data URL, in PNG or JPEG, whichever is smaller.

    Larger images are shrunk to sides of at most `max_side`.
    """
    assert image.mode == "RGB", f"image mode is {image.mode}, not RGB"
    if max_side is not None and max(image.size) > max_side:
        image = image.copy()
        image.thumbnail((max_side, max_side))
    image_format, encoded = "jpeg", _encode_image(image, "JPEG", quality=quality)
    if image.getcolors(MAX_PNG_COLORS) is not None:
        png = _encode_image(image, "PNG")
        image_format, encoded = (
            ("png", png) if len(png) <= len(encoded) else (image_format, encoded)
        )
    return f"data:image/{image_format};base64,{base64.b64encode(encoded).decode()}"


def _encode_image(image: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


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


GENERATOR_TAG = '<meta name="generator" content="finesight'
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
    page = _get_environment().get_template(f"{template}.html")
    text = page.render(
        **values,
        data=Markup(_to_safe_json(data)),
        language=LANGUAGE_TAGS[get_language()],
        policy=_build_policy(script),
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
    if file.exists() and not _is_generated_page(file):
        raise UserError(
            f"{file.name} exists and is not a page of finesight",
            where=str(file),
            expected="a new file name, or an older page to replace",
            remedy="choose another name, or move the file",
        )


def _is_generated_page(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return GENERATOR_TAG.encode() in stream.read(1024)


@cache
def _get_environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_read_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "translate": translate_markup,
        "code": _code_markup,
        "key": _key_markup,
        "mark_box_kind": _mark_box_kind,
    }
    return environment


def _code_markup(text: str) -> Markup:
    """Format a command as code within a sentence."""
    return Markup("<code>{}</code>").format(text)


def _key_markup(name: str) -> Markup:
    """Format the name of a key as a keyboard key within a sentence."""
    return Markup("<kbd>{}</kbd>").format(name)


def _mark_box_kind(kind: str, text: str) -> Markup:
    """Format a word in the color of a kind of boxes, such as predicted boxes."""
    return Markup('<b class="{}">{}</b>').format(kind, translate_markup(text))


def _read_asset(name: str, *, optional: bool = False) -> str:
    file = _TEMPLATES_FOLDER / name
    return "" if optional and not file.is_file() else file.read_text(encoding="utf-8")


def _build_policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _to_safe_json(data: object) -> str:
    """Return JSON that can be embedded in a script element.

    It contains no characters that could end the element or start a comment.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
