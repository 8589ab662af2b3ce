"""Render HTML pages without network access: templates and embedded images."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypedDict

from jinja2 import BaseLoader, Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from finesight import __version__
from finesight.errors import UserError
from finesight.files.storage import check_new_path, find_free_path, write_file
from finesight.report.i18n import LANGUAGE_TAGS, get_language, get_translations, translate_markup

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


NO_DIGEST = "0" * 64
"""Placeholder in the generator tag of a page, which `PageFile` replaces by its digest."""

_GENERATOR_TAG = re.compile(rb'<meta name="generator" content="finesight [^";]*; ([0-9a-f]{64})">')

MAX_TAG_OFFSET = 1024
"""Maximum position of the generator tag in a page."""

MAX_REPLACED_BYTES = 1 << 30
"""Maximum size of a page to replace."""

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
        digest=NO_DIGEST,
        version=__version__,
    )
    # File names may contain undecodable bytes, which Python represents as surrogates.
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class PageFile:
    """HTML file of a command, which replaces only its own page.

    The page contains a digest of itself, of the command and of its inputs. A page that was edited,
    or that another command or other inputs made, is as foreign as any other file.

    Attributes:
        inputs: Files and folders that the page describes.
    """

    file: Path
    command: str
    inputs: Sequence[Path]

    def check(self) -> None:
        """Raise UserError if the page cannot be written.

        Commands call this before minutes of computation, since `write` would fail.
        """
        if not os.path.lexists(self.file):
            check_new_path(self.file)
        elif not self._is_own():
            raise UserError(
                f"{self.file.name} exists, and is not an unchanged page of `finesight"
                f" {self.command}` about the same files",
                where=str(self.file),
                expected="a new file name, or an older page of the same command and files",
                remedy="move it away first, or choose another name, such as"
                f" {find_free_path(self.file)}",
            )

    def write(self, page: str) -> None:
        """Write the page atomically. Raises UserError like `check`."""
        self.check()
        content = page.encode()
        digest = self._compute_digest(content)
        write_file(self.file, content.replace(NO_DIGEST.encode(), digest, 1))

    def _is_own(self) -> bool:
        if not self.file.is_file() or self.file.stat().st_size > MAX_REPLACED_BYTES:
            return False
        with self.file.open("rb") as stream:
            content = stream.read(MAX_TAG_OFFSET)
            found = _GENERATOR_TAG.search(content)
            if found is None:
                return False
            content += stream.read()
        start, end = found.span(1)
        unsigned = content[:start] + NO_DIGEST.encode() + content[end:]
        return found[1] == self._compute_digest(unsigned)

    def _compute_digest(self, content: bytes) -> bytes:
        # Relative paths remain valid if the page is moved with its inputs, such as a run folder.
        folder = os.path.realpath(self.file.parent)
        names = [os.path.relpath(os.path.realpath(path), folder) for path in self.inputs]
        key = json.dumps([self.command, *names]).encode()
        return hashlib.sha256(key + content).hexdigest().encode()


@cache
def _get_environment() -> Environment:
    return create_environment(FunctionLoader(_read_asset))


def create_environment(loader: BaseLoader) -> Environment:
    """Create an environment of strict templates whose texts are translated and escaped."""
    environment = Environment(
        loader=loader,
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
