"""What all pages share: templates, languages, static files, and errors as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from jinja2 import FileSystemLoader
from pydantic import AfterValidator, BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from finesight.bounded_files import is_utf8
from finesight.errors import UserError
from finesight.report.html import create_environment
from finesight.report.i18n import (
    LANGUAGE_TAGS,
    Language,
    add_translations,
    translate,
    use_language,
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
    routes: Sequence[BaseRoute],
    describe_error: Callable[[UserError], str] = str,
) -> Starlette:
    """Create the application of a page with its static files and errors as JSON.

    Args:
        describe_error: Returns the message of an error in the current language.
    """

    def report_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError), "registered for this class"
        with use_language(read_language(request)):
            text = describe_error(error)
        return _report(422, text, field=error.where)

    def report_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, ValidationError), "registered for this class"
        # The inputs may be no JSON: NaN, or half of a surrogate pair.
        problems = [f"{(*one['loc'], '')[0]!r:.80}: {one['msg']}" for one in error.errors()[:3]]
        return _report(422, "; ".join(problems).encode(errors="replace").decode())

    def report_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for this class"
        return _report(error.status_code, error.detail)

    handlers: Mapping[Any, Any] = {
        UserError: report_error,
        ValidationError: report_invalid,
        HTTPException: report_status,
    }
    static = Route("/static/{name}", _get_static)
    return Starlette(routes=[static, *routes], exception_handlers=handlers)


def _report(status: int, text: str, **values: str) -> Response:
    return JSONResponse({"error": text, **values}, status, headers={"cache-control": "no-store"})


def _get_static(request: Request) -> Response:
    file = STATIC_FILES.get(request.path_params["name"])
    if file is None:
        raise HTTPException(404, "no such file")
    # A newer version has another page, so the browser asks again.
    return FileResponse(file, headers={"cache-control": "no-cache"})


async def parse_body(request: Request, model: type[Model]) -> Model:
    """Validate the JSON body of a request. Raises ValidationError, which the page reports."""
    return model.model_validate_json(await request.body())


def parse_query(request: Request, model: type[Model]) -> Model:
    """Validate the query of a request. Raises ValidationError, which the page reports."""
    return model.model_validate(dict(request.query_params))


def read_language(request: Request) -> Language:
    """Return the language of a request: that of the query, else of the browser, else English."""
    names = request.query_params.get("lang", ""), request.headers.get("accept-language", "")
    for entry in ",".join(names).lower().split(","):
        for language in LANGUAGE_TAGS:
            if entry.split(";")[0].strip().split("-")[0] == language:
                return language
    return "en"


def render_page(name: str, language: Language, **values: Any) -> str:
    """Render a template in a language.

    Args:
        values: Variables of the template, besides `language`, its tag, and `other_language`.
    """
    with use_language(language):
        return _ENVIRONMENT.get_template(name).render(
            language=LANGUAGE_TAGS[language],
            other_language="en" if language == "zh" else "zh",
            **values,
        )


def find_studio(request: Request) -> str:
    """Return the relative URL of the studio that a page is part of; empty for a page alone."""
    return "../../" if PREFIX_HEADER in request.headers else ""


def translate_texts(texts: Sequence[str], language: Language) -> dict[str, str]:
    """Return the translations of the texts of a script."""
    with use_language(language):
        return {text: translate(text) for text in texts}
