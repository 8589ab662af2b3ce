"""Self-contained HTML pages whose data cannot execute scripts."""

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
"""Marker of pages of this package, within their first kilobyte."""

_TEMPLATES_FOLDER = importlib.resources.files("finesight.report") / "templates"


def render_page(
    template: str, data: object = None, assets: Sequence[str] = (), **values: object
) -> str:
    """Render `templates/TEMPLATE.html`, which extends `base.html`.

    All values are escaped. `base.html` requires `title` and has the blocks `lead` and `main`.
    Styles and scripts of `base`, the assets and the template are embedded. Templates and scripts
    have `translate` for texts in the current language.

    The page treats `data` as text: scripts insert it with `createElement` of `base.js` as text
    nodes. A content security policy (CSP Level 3, section 6.1) allows only the script with the
    given SHA-256, and embedded images.

    Args:
        template: Name of the template.
        data: JSON data without NaN or infinity, available to scripts as `DATA`.
        assets: Names of further styles and scripts.
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
    """Write a page atomically, replacing an older page of this package.

    Raises:
        UserError: The file exists and is not such a page, or cannot be written.
    """
    raise_if_not_generated(file)
    write_file(file, page.encode())


def raise_if_not_generated(file: Path) -> None:
    """Raise UserError if a file exists and is not a page of this package.

    For commands that compute for minutes before they write a page.
    """
    if file.exists() and not _is_generated_page(file):
        raise UserError(
            f"{file.name} exists and is not a page of finesight",
            where=str(file),
            expected="a new file name, or an older page to replace",
            remedy="Choose another name, or move the file.",
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
    """Mark a command within a sentence."""
    return Markup("<code>{}</code>").format(text)


def _key_markup(name: str) -> Markup:
    """Mark a key within a sentence."""
    return Markup("<kbd>{}</kbd>").format(name)


def _mark_box_kind(kind: str, text: str) -> Markup:
    """Mark a word in the color of a box kind."""
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
    """Return JSON that cannot end its script element or start a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
