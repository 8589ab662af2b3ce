"""Pages of one file that open without a network, whose data can run no script."""

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
from finesight.report.language import TAGS, say_in_page, spoken, table
from finesight.storage import write_file

MADE_HERE = '<meta name="generator" content="finesight'
"""How a page of this package begins, within its first kilobyte."""

_TEMPLATES = importlib.resources.files("finesight.report") / "templates"


def render(template: str, data: object = None, assets: Sequence[str] = (), **values: object) -> str:
    """The page `templates/TEMPLATE.html`, which extends `base.html`, filled with `values`.

    Every value is escaped wherever it stands. `base.html` needs `title`, and offers the blocks
    `lead` (below the heading) and `main`. The page gets the style of `base.css`, `NAME.css` of each
    of the `assets` and `TEMPLATE.css`, of those that there are, and scripts likewise, all written
    into it. Templates and scripts have `say`, for texts in the language in force.

    `data` is any JSON data without NaN or infinity (ValueError), which the script reads as
    `DATA`. It is text to the page: scripts put it there through `make` of `base.js`, as text.
    What would still be read as a script of its own does not run: the page's policy (Content
    Security Policy Level 3, section 6.1) allows the one script whose SHA-256 it names, pictures
    within the page, and nothing from outside.
    """
    names = dict.fromkeys(("base", *assets, template))
    script, style = (
        "".join(_asset(f"{name}.{kind}", optional=True) for name in names) for kind in ("js", "css")
    )
    assert "</script" not in script, f"the script of {template} would end too early"
    page = _environment().get_template(f"{template}.html")
    text = page.render(
        **values,
        data=Markup(_as_json(data)),
        language=TAGS[spoken()],
        policy=_policy(script),
        script=Markup(script),
        style=Markup(style),
        words=json.dumps(dict(table()), ensure_ascii=False),
        version=__version__,
    )
    # Names of files may hold bytes that are no text, which Python keeps as lone surrogates.
    return text.encode("utf-8", "replace").decode()


def write_page(file: Path, page: str) -> None:
    """Write a page in one piece, over an older page of this package if `file` is one.

    Raises UserError, and leaves what is there, where `file` is anything else or cannot be written.
    """
    refuse_other_files(file)
    write_file(file, page.encode())


def refuse_other_files(file: Path) -> None:
    """Raise UserError where `file` exists and is no page of this package.

    For commands that work for minutes before there is a page to write.
    """
    if file.exists() and not _made_here(file):
        raise UserError(
            f"{file.name} exists already and is not a page that finesight made",
            where=str(file),
            expected="a name that is free, or an older page to replace",
            remedy="choose another name, or move it away first",
        )


def _made_here(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return MADE_HERE.encode() in stream.read(1024)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"say": say_in_page, "code": _code, "key": _key, "marked": _marked}
    return environment


def _code(text: str) -> Markup:
    """What is typed, within a sentence."""
    return Markup("<code>{}</code>").format(text)


def _key(name: str) -> Markup:
    """A key to press, within a sentence."""
    return Markup("<kbd>{}</kbd>").format(name)


def _marked(kind: str, text: str) -> Markup:
    """A word of a sentence in the colour of boxes of a kind."""
    return Markup('<b class="{}">{}</b>').format(kind, say_in_page(text))


def _asset(name: str, *, optional: bool = False) -> str:
    file = _TEMPLATES / name
    return "" if optional and not file.is_file() else file.read_text(encoding="utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _as_json(data: object) -> str:
    """JSON in which no text can end the element that holds it, or open a comment in it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
