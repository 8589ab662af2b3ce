"""What all pages share: templates, languages, static files, uploads, and errors as JSON."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EDQUOT, ENOSPC
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from anyio import to_thread
from jinja2 import FileSystemLoader
from pydantic import AfterValidator, BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from finesight.bounded_files import is_utf8
from finesight.errors import Remedy, Step, UserError
from finesight.report.html import create_environment
from finesight.report.i18n import (
    LANGUAGE_TAGS,
    Language,
    add_translations,
    get_language,
    get_translations,
    translate,
)

STATIC_FOLDER = Path(__file__).parent / "static"
REPORT_FOLDER = Path(str(resources.files("finesight.report"))) / "templates"
"""Folder of the styles and scripts that pages share with reports."""

STATIC_FILES = {
    file.name: file
    for folder in (REPORT_FOLDER, STATIC_FOLDER)
    for file in folder.iterdir()
    if file.suffix in (".css", ".js")
}

UPLOADS_PATH = "/uploads"

PREFIX_HEADER = "x-forwarded-prefix"
"""Header by which a page knows that it is part of the studio."""

FILE_HEADERS = {"content-security-policy": "default-src 'none'; sandbox"}
"""Headers of a file of a user, which runs nothing when it is opened in a tab."""

VIEW_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src"
    " 'unsafe-inline'; img-src data:; frame-ancestors 'self'; sandbox allow-scripts"
    " allow-downloads",
    "x-frame-options": "SAMEORIGIN",
}
"""Headers of a report in a frame, which runs its own script without access to this server."""

ERROR_TEXTS = (
    *("{} is not one of the classes", "box {} has no class", "point {} has no class"),
    "the box [{}] in pixels (read as xyxy in units of pixel) is outside its image",
    "the point [{}] in pixels (read as xyxy in units of pixel) is outside its image",
    "the box [{}] in pixels (read as xyxy in units of pixel) has inverted corners or no area",
    "the box [{}] in pixels (read as xyxy in units of pixel) is smaller than a pixel",
    "x1 < x2 up to {} and y1 < y2 up to {}, after EXIF rotation",
    *("the answer is not JSON: {}", "the answer is not JSON of an object: {}"),
    "{} is not a sample of this session",
    "the loss still falls: train twice as long",
    *("{} of {} answers are correct: label about {} more images", "{} of {} answers are correct"),
)
"""Texts of errors and advice with values, which are translated; others are in English."""

add_translations(STATIC_FOLDER)
_ENVIRONMENT = create_environment(FileSystemLoader([STATIC_FOLDER, REPORT_FOLDER]))

Model = TypeVar("Model", bound=BaseModel)


def _check_text(text: str) -> str:
    if not is_utf8(text):
        raise ValueError("half of a surrogate pair, which is not UTF-8 text")
    return text


Utf8Text = Annotated[str, AfterValidator(_check_text)]
"""Text that samples can store. JSON may contain lone surrogates."""


def create_app(
    routes: Sequence[BaseRoute], name_actions: Callable[[Remedy], str] = str
) -> Starlette:
    """Create the application of a page with its static files and errors as JSON.

    Args:
        name_actions: See `describe_error`.
    """

    def report(request: Request, error: Exception) -> Response:
        status, text, field = 422, str(error), ""
        if isinstance(error, UserError):
            text, field = describe_error(error, name_actions), Path(error.where).name
        elif isinstance(error, ValidationError):
            # The inputs may be no JSON: NaN, or half of a surrogate pair.
            problems = [f"{(*one['loc'], '')[0]!r:.80}: {one['msg']}" for one in error.errors()[:3]]
            text = "; ".join(problems).encode(errors="replace").decode()
        elif isinstance(error, HTTPException):
            status, text = error.status_code, translate(error.detail)
        content = {"error": text, "field": field}
        return JSONResponse(content, status, headers={"cache-control": "no-store"})

    static = Route("/static/{name}", _get_static)
    handlers: Any = dict.fromkeys((UserError, ValidationError, HTTPException), report)
    return Starlette(routes=[static, *routes], exception_handlers=handlers)


def describe_error(error: UserError, name_actions: Callable[[Remedy], str] = str) -> str:
    """Return the message of an error in the current language, without folders of the server.

    The page marks fields, so that their names are left out.

    Args:
        name_actions: Replaces operations and options by what the page has.
    """
    what, expected = map(translate_error, (error.what, error.expected))
    remedy = error.remedy if isinstance(error.remedy, Step) else translate_error(error.remedy)
    where = name_actions(error.where)
    prefix = f"{Path(where).name}: " if re.search(r"[ ./]", where) else ""
    lines = [prefix + what, expected and translate("expected: {}", expected), name_actions(remedy)]
    return "\n".join(filter(None, lines))


def translate_error(text: str) -> str:
    """Translate a text of `ERROR_TEXTS` with its values."""
    for known in ERROR_TEXTS:
        if match := re.fullmatch(re.escape(known).replace(r"\{\}", "(.*)"), text, re.DOTALL):
            return translate(known, *match.groups())
    return translate(text)


def _get_static(request: Request) -> Response:
    file = STATIC_FILES.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404, "no such file")
    # A newer version has another page, so the browser asks again.
    return FileResponse(file, headers={"cache-control": "no-cache"})


async def parse_body(request: Request, model: type[Model]) -> Model:
    """Validate the JSON body of a request. Raises ValidationError, which the page reports."""
    return model.model_validate_json(await request.body())


def read_language(request: Request) -> Language:
    """Return the language of a request: that of the query, else of the browser, else English."""
    names = request.query_params.get("lang", ""), request.headers.get("accept-language", "")
    for entry in ",".join(names).lower().split(","):
        for language in LANGUAGE_TAGS:
            if entry.split(";")[0].strip().split("-")[0] == language:
                return language
    return "en"


def render_page(name: str, words: Sequence[str] = (), **values: Any) -> str:
    """Render a template in the current language.

    Args:
        words: Words that the script of the page translates, besides the texts in its code.
        values: Variables of the template, besides `language`, its tag, and `other_language`.
    """
    language, script = get_language(), f"{Path(name).stem}.js"
    if script in STATIC_FILES:
        texts = _translate_script(script, language) | {word: translate(word) for word in words}
        values["settings"] = {**values.get("settings", {}), "texts": texts}
    return _ENVIRONMENT.get_template(name).render(
        language=LANGUAGE_TAGS[language],
        other_language="en" if language == "zh" else "zh",
        translate_error=translate_error,
        **values,
    )


@cache
def _translate_script(script: str, language: Language) -> dict[str, str]:
    """Return the translations of the texts in the code of a page to the current language."""
    code = "".join(STATIC_FILES[name].read_text(encoding="utf-8") for name in (script, "app.js"))
    return {text: new for text, new in get_translations().items() if f'"{text}"' in code}


def find_studio(request: Request) -> str:
    """Return the relative URL of the studio that a page is part of; empty for a page alone."""
    return "../../" if PREFIX_HEADER in request.headers else ""


MAX_STORED_BYTES = 2 << 30
"""Maximum size of the stored files of all users in bytes."""

UPLOAD_TTL_S, MIN_UPLOAD_TTL_S = 3600, 300
"""Seconds after which an uploaded file is deleted, with enough space and if space is short.

Data sets take over the files that they use.
"""

MAX_OWNER_BYTES = MAX_STORED_BYTES // 4
"""Maximum size of the stored files of an owner, who so leaves space to others."""

MAX_NAME_BYTES = 200
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class DiskFullError(HTTPException):
    """Raised when stored files would exceed a limit, or the disk is full."""

    def __init__(self) -> None:
        text = "The server has no disk space for more files. Delete some, or try again later."
        super().__init__(507, text)


class DiskBudget:
    """Limits the disk space of the files in the subfolders of a folder.

    A file has its size before it is written, so that concurrent writers respect the limit.

    Args:
        free_space: Deletes unused files, or returns False if there are none.
    """

    def __init__(self, folder: Path, free_space: Callable[[], bool]) -> None:
        self._folder, self._free_space = folder, free_space
        self._lock = threading.Lock()

    def allocate(
        self, num_bytes: int, open_file: Callable[[], IO[bytes]], owner: str = ""
    ) -> IO[bytes]:
        """Open a new file with a number of bytes, which its writer replaces.

        Args:
            owner: Start of the names of the subfolders of a user, with a limit of its own.

        Raises:
            DiskFullError: The stored bytes would exceed a limit.
        """
        with self._lock:
            while self._count_bytes() + num_bytes > MAX_STORED_BYTES:
                if not self._free_space():
                    raise DiskFullError
            if owner and self._count_bytes(owner) + num_bytes > MAX_OWNER_BYTES:
                raise DiskFullError
            file = open_file()
            file.truncate(num_bytes)
        return file

    def _count_bytes(self, owner: str = "") -> int:
        files = _iter_files(self._folder)
        return sum(state.st_size for file, state in files if file.parent.name.startswith(owner))


def _iter_files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, _, names in os.walk(root):
        for file in (Path(folder, name) for name in names):
            # Files of a closed chat may disappear in the meantime.
            with contextlib.suppress(FileNotFoundError):
                yield file, file.stat()


async def receive_file(
    request: Request,
    folder: Path,
    budget: DiskBudget,
    max_bytes: int,
    *,
    prefix: str = "",
    owner: str = "",
) -> Path:
    """Store the body of a request in a folder. The query has the name of the file.

    Args:
        max_bytes: Maximum size of the file. The access middleware checks it first.
        prefix: Start of the name of the stored file.
        owner: See `DiskBudget.allocate`.
    """
    size = int(request.headers.get("content-length", max_bytes))
    name = _CONTROL_CHARACTERS.sub("", request.query_params.get("name", ""))
    name = name.replace("\\", "/").rpartition("/")[2].strip(". ")
    suffix = Path(name).suffix[:20]
    stem = name.removesuffix(suffix).encode()[: MAX_NAME_BYTES - len(suffix.encode())]
    path = folder / (prefix + ((stem.decode(errors="ignore") + suffix) or "file"))
    try:
        # In a thread, because all files are counted.
        allocate = partial(budget.allocate, size, lambda: path.open("xb"), owner)
        with await to_thread.run_sync(allocate) as file:
            async for chunk in request.stream():
                await to_thread.run_sync(file.write, chunk)
            file.truncate()
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            raise DiskFullError from error
        raise
    return path


class UploadStore:
    """Uploaded files, each in a folder with a secret name, which is its ID.

    Args:
        max_bytes: See `receive_file`.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._budget = DiskBudget(folder, partial(self._expire, MIN_UPLOAD_TTL_S))

    def _expire(self, max_age_s: float) -> bool:
        """Delete the uploads beyond an age. Returns whether there are any."""
        min_mtime, files = time.time() - max_age_s, _iter_files(self._folder)
        old = [file.parent.name for file, state in files if state.st_mtime < min_mtime]
        self.remove(old)
        return bool(old)

    async def receive(self, request: Request) -> Response:
        """Store the body of a request, whose query has the name of the file. Return its ID."""
        await to_thread.run_sync(self._expire, UPLOAD_TTL_S)
        folder = self._folder / secrets.token_urlsafe(24)
        try:
            folder.mkdir(mode=0o700)
            file = await receive_file(request, folder, self._budget, self._max_bytes)
        except BaseException:
            self.remove([folder.name])
            raise
        return JSONResponse({"id": folder.name, "name": file.name})

    def find(self, upload_id: str) -> Path:
        """Return the file of an upload. Raises UserError for an unknown or expired ID."""
        with contextlib.suppress(OSError, StopIteration):
            if re.fullmatch(r"[\w-]{32}", upload_id):
                return next((self._folder / upload_id).iterdir())
        raise UserError(
            "an uploaded file has expired",
            where="files",
            expected=f"files uploaded within {UPLOAD_TTL_S // 60} minutes",
            remedy="add the file again",
        )

    def remove(self, upload_ids: Iterable[str]) -> None:
        """Delete the files of uploads that `find` has returned."""
        for upload_id in upload_ids:
            shutil.rmtree(self._folder / upload_id, ignore_errors=True)
