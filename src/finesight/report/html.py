"""Render self-contained HTML pages whose data cannot execute scripts."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from finesight import __version__
from finesight.errors import UserError
from finesight.report.i18n import LANGUAGE_TAGS, get_language, get_translations, translate_markup
from finesight.storage import write_file

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
        template: Name of the template.
        data: JSON data without NaN or infinity, available to scripts as `DATA`.
        assets: Names of additional styles and scripts.
        **values: Values of the template.
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
