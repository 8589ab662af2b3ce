"""What all pages share: templates, languages, static files, uploads, and errors as JSON."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC
from functools import cache
from glob import glob
from importlib import resources
from pathlib import Path
from typing import IO, Any, TypeVar

from anyio import to_thread
from jinja2 import FileSystemLoader
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

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
    "{} is not one of the classes",
    "box {} has no class",
    "point {} has no class",
    "the box [{}] in pixels (read as xyxy in units of pixel) has inverted corners or no area",
    "the box [{}] in pixels (read as xyxy in units of pixel) is smaller than a pixel",
    "x1 < x2 up to {} and y1 < y2 up to {}, after EXIF rotation",
    "the answer is not JSON: {}",
    "the answer is not JSON of an object: {}",
    "{} is not a sample of this session",
    "{} exists already and is never overwritten",
    "choose another name, such as {}",
    "the records have no key {}",
    "{} keys have the same role: {}",
)
"""Texts of errors with values, which are translated; others are in English."""

add_translations(STATIC_FOLDER)
_ENVIRONMENT = create_environment(FileSystemLoader([STATIC_FOLDER, REPORT_FOLDER]))

Model = TypeVar("Model", bound=BaseModel)


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

UPLOAD_TTL_S = 3600
"""Seconds without use after which a file may be deleted. Data sets take over files they use."""

UNUSED_TTL_S = 30
"""Seconds after which files that nothing has used are deleted if space is needed for others.

A page sends the files of an action one after the other, and uses them immediately afterwards.
"""

MAX_BATCH_CHARS = 100

MAX_NAME_BYTES = 200
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class DiskFullError(HTTPException):
    """Raised when stored files would exceed a limit, or the disk is full."""

    def __init__(self) -> None:
        text = "The server has no disk space for more files. Delete some, or try again later."
        super().__init__(507, text)


@dataclass
class UploadBatch:
    """Files that one action of a page uses together.

    Attributes:
        used_at: Time of the last use of one of the files.
        is_used: Whether one of the files was used.
        num_bytes: Size of the files.
    """

    ids: list[str] = field(default_factory=list)
    used_at: float = 0.0
    is_used: bool = False
    num_bytes: int = 0


class UploadStore:
    """Uploaded files, each in a folder with a secret name, which is its ID.

    Args:
        max_bytes: Maximum size of a file. The access middleware checks it first.
        ttl_s: Seconds without use after which a file is deleted, even with enough space.
        used_ttl_s: Seconds after the last use for which a file is kept without enough space.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        ttl_s: float = UPLOAD_TTL_S,
        used_ttl_s: float = UPLOAD_TTL_S,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._used_ttl_s = used_ttl_s
        # Files of a batch are deleted together. A file without a batch has its own ID as the name.
        self._batch_names = dict[str, str]()
        self._receiving = set[str]()
        self._used = set[str]()
        self._lock = threading.Lock()

    async def receive(self, request: Request) -> Response:
        """Store the body of a request; see `store`. Return its ID and name."""
        file = await self.store(request)
        return JSONResponse({"id": file.parent.name, "name": file.name})

    async def store(self, request: Request) -> Path:
        """Store the body of a request, whose query names the file and its batch.

        Raises:
            DiskFullError: The stored files would exceed the limit, or the disk is full.
        """
        size = int(request.headers.get("content-length", self._max_bytes))
        name = _CONTROL_CHARACTERS.sub("", request.query_params.get("name", ""))
        name = name.replace("\\", "/").rpartition("/")[2].strip(". ")
        suffix = Path(name).suffix[:20]
        stem = name.removesuffix(suffix).encode()[: MAX_NAME_BYTES - len(suffix.encode())]
        upload_id = secrets.token_urlsafe(24)
        path = self._folder / upload_id / ((stem.decode(errors="ignore") + suffix) or "file")
        batch_name = request.query_params.get("batch", "")[:MAX_BATCH_CHARS] or upload_id
        self._receiving.add(upload_id)
        self._batch_names[upload_id] = batch_name
        try:
            # In a thread, because all files are counted.
            with await to_thread.run_sync(self._open, path, size, batch_name) as file:
                async for chunk in request.stream():
                    await to_thread.run_sync(file.write, chunk)
                file.truncate()
        except BaseException as error:
            self.remove([upload_id])
            if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                raise DiskFullError from error
            raise
        finally:
            self._receiving.discard(upload_id)
        return path

    def _open(self, path: Path, num_bytes: int, batch_name: str) -> IO[bytes]:
        """Open a new file of its final size, so that concurrent uploads respect the limit."""
        with self._lock:
            self._make_space(num_bytes, batch_name)
            path.parent.mkdir(mode=0o700)
            file = path.open("xb")
            file.truncate(num_bytes)
        return file

    def _make_space(self, num_bytes: int, batch_name: str) -> None:
        """Delete old batches and, with too little space, the least recently used of the others.

        Args:
            batch_name: Batch of the new file, which is kept.
        """
        batches = self._list_batches()
        max_bytes = MAX_STORED_BYTES - num_bytes
        num_stored = sum(batch.num_bytes for batch in batches.values())
        for name, batch in sorted(batches.items(), key=lambda item: item[1].used_at):
            if name == batch_name or not self._receiving.isdisjoint(batch.ids):
                continue
            age_s = time.time() - batch.used_at
            ttl_s = self._ttl_s
            if num_stored > max_bytes:
                ttl_s = self._used_ttl_s if batch.is_used else UNUSED_TTL_S
            if age_s > ttl_s:
                self.remove(batch.ids)
                num_stored -= batch.num_bytes
        if num_stored > max_bytes:
            raise DiskFullError

    def _list_batches(self) -> dict[str, UploadBatch]:
        batches = defaultdict[str, UploadBatch](UploadBatch)
        # Files may disappear in the meantime. Path.glob would fail at a deleted folder.
        for name in glob("*/*", root_dir=self._folder):
            with contextlib.suppress(FileNotFoundError):
                state = (self._folder / name).stat()
                upload_id = Path(name).parent.name
                batch = batches[self._batch_names.get(upload_id, upload_id)]
                batch.ids.append(upload_id)
                batch.used_at = max(batch.used_at, state.st_mtime)
                batch.is_used = batch.is_used or upload_id in self._used
                batch.num_bytes += state.st_size
        return batches

    def find(self, upload_id: str) -> Path:
        """Return the file of an upload, and note its use.

        Raises UserError for an unknown or expired ID.
        """
        # An upload that needs space must not delete the file between its search and its use.
        with self._lock, contextlib.suppress(OSError, StopIteration):
            if re.fullmatch(r"[\w-]{32}", upload_id):
                file = next((self._folder / upload_id).iterdir())
                os.utime(file)
                self._used.add(upload_id)
                return file
        raise UserError(
            "an uploaded file has expired",
            where="files",
            expected="a file that is on the server",
            remedy="add the file again",
        )

    def remove(self, upload_ids: Iterable[str]) -> None:
        """Delete the files of uploads that `find` has returned."""
        for upload_id in upload_ids:
            shutil.rmtree(self._folder / upload_id, ignore_errors=True)
            self._batch_names.pop(upload_id, None)
            self._used.discard(upload_id)
