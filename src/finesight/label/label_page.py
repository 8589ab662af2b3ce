"""Page of a labelling session: HTML, and JSON requests for items and decisions.

The page has its own editor of boxes, because labelling by keyboard needs one script for all keys.
"""

from __future__ import annotations

import io
import re
import secrets
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, Field, FiniteFloat

from finesight.data.boxes import BoxConvention, clip_to_image
from finesight.data.formats.image_annotations import NO_OBJECTS_ANSWER
from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.data.sample import BoxPart, ImagePart, TextPart
from finesight.errors import UserError
from finesight.infer.prediction import BOX_COLORS
from finesight.label.label_session import LabelSession, describe_answer
from finesight.label.label_store import ANSWER_EVENTS, LabelItem
from finesight.label.suggestion import AnswerContent, get_text
from finesight.report import i18n
from finesight.report.i18n import LANGUAGE_TAGS, Language, translate, translate_markup, use_language
from finesight.vision.image_processing import load_image
from finesight.web.access_middleware import AccessMiddleware
from finesight.web.chat_html import STATIC_FOLDER, select_ui_text
from finesight.web.web_server import CHATS_FOLDER, UPLOADS_FOLDER
from finesight.web.web_sessions import DiskBudget

LABEL_STATIC_FOLDER = Path(__file__).parent / "static"
GET_ROUTES = re.compile(
    r"/|/sign-in|/page\.css|/label\.(?:css|js)|/search|/items(?:/\d{1,9})?|/images/\d{1,9}/\d{1,4}"
)
POST_ROUTES = re.compile(r"/sign-in|/decision")

MAX_LISTED_ITEMS, MAX_LISTED_CHARS = 100, 200
"""Maximum number of items and of characters per answer in one part of the list."""

ListState = Literal["", "open", "labeled", "skipped"]

MAX_DISPLAY_SIDE = 2000
"""Maximum width and height of an image that the browser receives, in pixels."""

SCRIPT_TEXTS = (
    *("No suggestion", "confidence {}", "error score {}", "The model suggests:"),
    *("{} of {}", "Image {} of {}", "Box {}", "Class", "Text", "Delete"),
    *("open", "suggested", "written", "accepted", "corrected", "skipped", "reopened"),
    *("All images are decided.", "Not saved", "The server does not answer."),
    *("The image cannot be read.", "No objects", "Answer without JSON:"),
    *("before:", "after:", "{} images"),
)
"""Texts of the script, which are translated on the page."""


class BoxAnswer(BaseModel, frozen=True):
    """Box of an answer from the browser."""

    image: Annotated[int, Field(ge=0)] = 0
    label: Annotated[str, Field(max_length=1000)] | None = None
    xyxy: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class DecisionRequest(BaseModel, frozen=True):
    """Decision from the browser: save an answer, skip the sample, or reopen it.

    Attributes:
        edits: New texts of JSON fields in `text` by index; None for an answer without fields.
    """

    id: str
    action: Literal["save", "skip", "reopen"]
    text: str = ""
    edits: dict[int, str] | None = None
    boxes: Annotated[list[BoxAnswer], Field(max_length=10_000)] = []


class LabelPage:
    """Requests of the page. Decisions are handled one after the other."""

    def __init__(self, session: LabelSession) -> None:
        self._session, self._lock = session, threading.Lock()
        self._items = [*session.store.items]
        # Browsers cache images; the same URL shows another image in the next session.
        self._version = secrets.token_hex(8)
        self._index_by_id = {item.sample.sample.id: i for i, item in enumerate(self._items)}
        templates = Path(i18n.__file__).parent / "templates"
        self._environment = Environment(
            loader=FileSystemLoader(LABEL_STATIC_FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals |= {"translate": translate_markup}
        files = (templates / "base.css", LABEL_STATIC_FOLDER / "label.css")
        self.style = "".join(file.read_text(encoding="utf-8") for file in files)
        self.script = (LABEL_STATIC_FOLDER / "label.js").read_text(encoding="utf-8")

    def render(self, language: Language) -> str:
        """Render the page."""
        task = self._session.task
        with use_language(language):
            settings = {
                "kind": task.kind,
                "choices": task.choices,
                "colors": BOX_COLORS,
                "no_objects": NO_OBJECTS_ANSWER,
                "texts": {text: translate(text) for text in SCRIPT_TEXTS},
            }
            return self._environment.get_template("label.html").render(
                settings=settings,
                task=task,
                model=self._session.model,
                language=LANGUAGE_TAGS[language],
                other="en" if language == "zh" else "zh",
            )

    def list_items(self) -> dict[str, Any]:
        """Return decision and confidence of all items in their order."""
        return {
            "decisions": [item.decision.event if item.decision else "" for item in self._items],
            "counts": self._session.store.count_events(),
        }

    def search(self, text: str, state: ListState, start: int) -> dict[str, Any]:
        """Return the items of a state with a text in their answers or file names, from `start`."""
        found = []
        for index, item in enumerate(self._items):
            event = item.decision.event if item.decision else "open"
            content = self._session.select_proposal(item)
            labels = [part.label for part in content if isinstance(part, BoxPart) and part.label]
            answer = " ".join([get_text(content), *labels]).strip()
            name = ", ".join(path.name for path in _list_images(item)) or item.sample.sample.id
            is_of_state = state in ("", "labeled" if event in ANSWER_EVENTS else event)
            if is_of_state and text.casefold() in f"{name}\n{answer}".casefold():
                answer = answer[:MAX_LISTED_CHARS]
                found.append({"index": index, "name": name, "decision": event, "answer": answer})
        return {"count": len(found), "items": found[start : start + MAX_LISTED_ITEMS]}

    def describe(self, index: int) -> dict[str, Any]:
        """Return an item with the sizes of its images."""
        item = self._items[index]
        images = []
        for number, path in enumerate(_list_images(item)):
            url, error = f"images/{index}/{number}?v={self._version}", ""
            try:
                height, width = read_image_size(path)
            except CorruptImageError as corrupt:
                height, width, error = 1, 1, str(corrupt)
            image = {"url": url, "width": width, "height": height, "error": error}
            images.append({**image, "name": path.name})
        return {"index": index, "images": images, **self._session.describe_item(item)}

    def read_image(self, index: int, number: int) -> bytes:
        """Return an image without metadata as WebP, reduced to `MAX_DISPLAY_SIDE`."""
        image = load_image(_list_images(self._items[index])[number])
        image.thumbnail((MAX_DISPLAY_SIDE, MAX_DISPLAY_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=90)
        return buffer.getvalue()

    def decide(self, request: DecisionRequest) -> dict[str, Any]:
        """Save a decision, and return the item and the counts."""
        store = self._session.store
        with self._lock:
            item = store.find(request.id)
            if request.action == "save":
                text = request.text
                if request.edits is not None:
                    text = self._session.edit_fields(text, request.edits)
                self._session.check_answer(item, text, bool(request.boxes))
                request = request.model_copy(update={"text": text})
                self._session.save(item, _build_content(item, request))
            elif request.action == "skip":
                store.skip(request.id)
            else:
                store.reopen(request.id)
            index = self._index_by_id[request.id]
            return {"item": self.describe(index), "counts": store.count_events()}


def _list_images(item: LabelItem) -> list[Path]:
    sample = item.sample
    return [
        sample.resolve_path(part.image)
        for part in sample.sample.iter_parts()
        if isinstance(part, ImagePart)
    ]


def _build_content(item: LabelItem, request: DecisionRequest) -> AnswerContent:
    """Return the answer of a request, with the parts of the proposal if nothing was changed.

    Raises:
        UserError: A box is outside of its image, or an image is unreadable.
    """
    answer = request.model_dump(mode="json", include={"text", "boxes"})
    boxes, sizes = [], [read_image_size(path) for path in _list_images(item)]
    for box in request.boxes:
        if box.image >= len(sizes):
            raise UserError(
                f"a box in image {box.image} (0-based)",
                where=request.id,
                expected=f"an index below {len(sizes)}",
                remedy="reload the page",
            )
        corners = clip_to_image(box.xyxy, sizes[box.image], BoxConvention())
        boxes.append(BoxPart(image=box.image, label=box.label or None, xyxy=corners))
    for known in (item.proposal, item.suggestion.content if item.suggestion else ()):
        if known and describe_answer(known) == answer:
            clipped = iter(boxes)
            return tuple(next(clipped) if isinstance(part, BoxPart) else part for part in known)
    text = (TextPart(text=request.text),) if request.text.strip() else ()
    if not text and not boxes:
        raise UserError(
            "the answer is empty", expected="a text or a box", remedy="enter an answer or skip (S)"
        )
    return (*text, *boxes)


def make_label_app(
    session: LabelSession, folder: Path, password: str | None, loopback_only: bool, port: int
) -> AccessMiddleware:
    """Build the page as an ASGI application with access control.

    Args:
        folder: Private folder, which remains empty.
        loopback_only: Whether the page is for this machine only. See `AccessMiddleware`.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = LabelPage(session)
    error_headers = {"cache-control": "no-store"}

    @app.exception_handler(UserError)
    def report_error(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 422, headers=error_headers)

    @app.exception_handler(IndexError)
    def report_missing(request: Request, error: IndexError) -> Response:
        return JSONResponse({"error": "no such item"}, 404, headers=error_headers)

    @app.get("/")
    def get_page(request: Request) -> Response:
        # A supported language in the URL precedes those of the header.
        names = (request.query_params.get("lang", ""), request.headers.get("accept-language", ""))
        return HTMLResponse(page.render(select_ui_text(",".join(names)).language))

    @app.get("/page.css")
    def get_sign_in_style() -> Response:
        style = (STATIC_FOLDER / "page.css").read_text(encoding="utf-8")
        return Response(style, media_type="text/css")

    @app.get("/label.{name}")
    def get_static(name: Literal["css", "js"]) -> Response:
        media_type = "text/css" if name == "css" else "text/javascript"
        return Response(page.style if name == "css" else page.script, media_type=media_type)

    @app.get("/items")
    def get_items() -> Any:
        return page.list_items()

    @app.get("/search")
    def search_items(
        text: Annotated[str, Query(max_length=1000)] = "",
        state: ListState = "",
        start: Annotated[int, Query(ge=0)] = 0,
    ) -> Any:
        return page.search(text, state, start)

    @app.get("/items/{index}")
    def get_item(index: int) -> Any:
        return page.describe(index)

    @app.get("/images/{index}/{number}")
    def get_image(index: int, number: int) -> Response:
        headers = {"cache-control": "private, max-age=3600"}
        return Response(page.read_image(index, number), media_type="image/webp", headers=headers)

    @app.post("/decision")
    def post_decision(decision: DecisionRequest) -> Any:
        return page.decide(decision)

    uploads = folder / UPLOADS_FOLDER
    return AccessMiddleware(
        app,
        uploads,
        DiskBudget(uploads, folder / CHATS_FOLDER),
        {},
        lambda name: False,
        password,
        loopback_only,
        get_routes=GET_ROUTES,
        post_routes=POST_ROUTES,
        session_cookie=f"finesight-label-{port}",
    )
