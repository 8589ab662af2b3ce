"""Page of a labelling session: HTML, and JSON requests for items and decisions.

The page has its own editor of boxes, because labelling by keyboard needs one script for all keys.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

from anyio import to_thread
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from finesight.app.pages import create_app, find_studio, parse_body, render_page
from finesight.app.request_jobs import RequestJobs
from finesight.app.server import Access, AccessMiddleware
from finesight.errors import UserError, describe_indices
from finesight.files.worker_pool import WorkerPool
from finesight.infer.prediction import BOX_COLORS
from finesight.label.label_session import LabelSession, describe_answer
from finesight.label.label_store import AnswerContent, LabelEvent, LabelItem, get_text
from finesight.samples.boxes import InvalidBoxError, clip_to_image
from finesight.samples.default_prompts import NO_OBJECTS_ANSWER
from finesight.samples.frames import PIXELS, ImageSize
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import BoxPart, TextPart, create_region
from finesight.vision.image_reader import NUM_IMAGE_WORKERS, ImageReader

MAX_LISTED_ITEMS, MAX_LISTED_CHARS = 100, 200
"""Maximum number of items and of characters per answer in one part of the list."""

EVENTS = ("open", *get_args(LabelEvent))

ListState = Literal["", "open", "written", "accepted", "corrected", "skipped"]

MAX_ITEM_JOBS = 8
"""Maximum number of items whose image sizes are read at the same time."""

MAX_DISPLAY_SIDE = 2000
"""Maximum width and height of an image that the browser receives, in pixels."""

THUMBNAIL_SIDE = 96
"""Width and height of the images in the list, in pixels of a screen with doubled resolution."""


class BoxAnswer(BaseModel, frozen=True):
    """Box of an answer from the browser, or a point, whose corners are equal."""

    image: Annotated[int, Field(ge=0)] = 0
    label: Annotated[str, Field(max_length=1000)] | None = None
    xyxy: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]

    @property
    def is_point(self) -> bool:
        """Return whether the corners are equal."""
        return self.xyxy[:2] == self.xyxy[2:]


class DecisionRequest(BaseModel, frozen=True):
    """Decision from the browser: save an answer, skip the sample, or reopen it.

    Attributes:
        revision: `revision` of the item that the page shows; None to overwrite other decisions.
        edits: New texts of JSON fields in `text` by index; None for an answer without fields.
        question: Texts of the question, which the user may correct; None for an unchanged one.
    """

    id: str
    action: Literal["save", "skip", "reopen"]
    revision: int | None = None
    text: str = ""
    edits: dict[int, str] | None = None
    question: Annotated[list[str], Field(max_length=1000)] | None = None
    boxes: Annotated[list[BoxAnswer], Field(max_length=10_000)] = []


class BulkRequest(BaseModel, frozen=True):
    """Accept all open suggestions from a confidence on, or reopen items by index and revision."""

    action: Literal["accept", "reopen"]
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    items: list[tuple[Annotated[int, Field(ge=0)], int]] = []


class SearchQuery(BaseModel, frozen=True):
    """Query of a search in the list of items, which returns the items from `start`."""

    text: Annotated[str, Field(max_length=1000)] = ""
    state: ListState = ""
    start: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """Item with a suggestion to accept, unless its revision has changed meanwhile."""

    index: int
    item: LabelItem
    revision: int
    sizes: Sequence[ImageSize | CorruptImageError]


class LabelPage:
    """Requests of the page. Decisions are handled one after the other."""

    def __init__(self, session: LabelSession, images: ImageReader) -> None:
        self._session, self._images, self._lock = session, images, threading.Lock()
        self._items = [*session.store.items]
        # Browsers cache images; the same URL shows another image in the next session.
        self._version = secrets.token_hex(8)
        # Edits in the browser belong to a folder and a question. Servers may share an address.
        folder, task = str(session.store.folder.resolve()), session.task
        origin = json.dumps([folder, task.prompt, task.kind])
        self._key = hashlib.sha256(origin.encode()).hexdigest()[:16]
        self._index_by_id = {item.sample.sample.id: i for i, item in enumerate(self._items)}
        # Slow images wait for each other, and leave threads for the other requests.
        self._image_jobs = RequestJobs(NUM_IMAGE_WORKERS)
        self._item_jobs = RequestJobs(MAX_ITEM_JOBS)

    def list_routes(self) -> list[Route]:
        """Return the routes of the page."""
        return [
            Route("/", self.get_page),
            Route("/items", self.list_items),
            Route("/search", self.search),
            Route("/items/{index:int}", self.get_item),
            Route("/images/{index:int}/{number:int}", self.get_image),
            Route("/decision", self.post_decision, methods=["POST"]),
            Route("/decisions", self.post_decisions, methods=["POST"]),
        ]

    def get_page(self, request: Request) -> Response:
        """Return the page."""
        task = self._session.task
        settings = {
            "kind": "boxes" if task.has_regions else task.kind,
            "points": task.kind == "points",
            "session": self._key,
            "version": self._version,
            "choices": task.choices,
            "names": task.choices or task.names,
            "closed": task.has_fixed_choices,
            "colors": BOX_COLORS,
            "no_objects": NO_OBJECTS_ANSWER,
        }
        values = {"settings": settings, "task": task, "model": self._session.model}
        values |= {"is_review": self._session.review, "folder": str(self._session.store.folder)}
        values |= {"has_suggestions": any(item.suggestion for item in self._items)}
        page = render_page("label.html", EVENTS, **values, studio=find_studio(request))
        return HTMLResponse(page)

    def list_items(self, request: Request) -> Response:
        """Return the decisions of all items in their order."""
        decisions = [item.decision.event if item.decision else "" for item in self._items]
        counts = self._session.store.count_events()
        return JSONResponse({"decisions": decisions, "counts": counts})

    def search(self, request: Request) -> Response:
        """Return the items of a state with a text in their answers or file names."""
        query, found = SearchQuery.model_validate(dict(request.query_params)), []
        for index, item in enumerate(self._items):
            event = item.decision.event if item.decision else "open"
            content = self._session.select_proposal(item)
            labels = [part.label for part in content if isinstance(part, BoxPart) and part.label]
            answer = " ".join([get_text(content), *labels]).strip()
            name = ", ".join(path.name for path in item.images) or item.sample.sample.id
            is_found = query.text.casefold() in f"{name}\n{answer}".casefold()
            if query.state in ("", event) and is_found:
                row = {"index": index, "id": item.sample.sample.id, "name": name}
                row["url"] = self._make_url(index, 0) if item.images else None
                found.append({**row, "decision": event, "answer": answer[:MAX_LISTED_CHARS]})
        items = found[query.start : query.start + MAX_LISTED_ITEMS]
        return JSONResponse({"count": len(found), "items": items})

    async def get_item(self, request: Request) -> Response:
        """Return an item; see `describe`."""
        describe = partial(self.describe, request.path_params["index"])
        return JSONResponse(await self._item_jobs.run(request, describe))

    def _read_sizes(self, item: LabelItem) -> list[ImageSize | CorruptImageError]:
        """Return the size of each image of an item, or its error."""
        sizes: list[ImageSize | CorruptImageError] = []
        for path in item.images:
            try:
                sizes.append(self._images.read_size(path))
            except CorruptImageError as error:
                sizes.append(error)
        return sizes

    def describe(
        self, index: int, sizes: Sequence[ImageSize | CorruptImageError] | None = None
    ) -> dict[str, Any]:
        """Return an item with its choices and the sizes of its images.

        Args:
            sizes: Results of `_read_sizes`; None to read them.
        """
        item = self._find_item(index)
        if sizes is None:
            sizes = self._read_sizes(item)
        images = []
        for number, (path, size) in enumerate(zip(item.images, sizes, strict=True)):
            error = ""
            if isinstance(size, CorruptImageError):
                error, size = str(size), (1, 1)
            height, width = size
            image = {"url": self._make_url(index, number), "width": width, "height": height}
            images.append({**image, "error": error, "name": path.name})
        choices, template = self._list_choices(item), self._session.task.template
        values = {"index": index, "revision": len(item.history), "images": images}
        values |= {"choices": choices, "template": template}
        return values | self._session.describe_item(item)

    def _make_url(self, index: int, number: int) -> str:
        return f"images/{index}/{number}?v={self._version}"

    def _list_choices(self, item: LabelItem) -> list[str]:
        """Return the choices of the task and the labels that the sample has; empty for any text."""
        task, content = self._session.task, (*(item.existing_answer or ()), *(item.label or ()))
        if not task.choices or not (task.has_regions or task.kind == "classes"):
            return []
        labels = [part.label or "" for part in content if isinstance(part, BoxPart)]
        texts = [part.text for part in content if isinstance(part, TextPart)]
        return [*dict.fromkeys((*task.choices, *(labels if task.has_regions else texts)))]

    async def get_image(self, request: Request) -> Response:
        """Return an image without metadata as WebP, reduced to a side."""
        index, number = request.path_params["index"], request.path_params["number"]
        images = self._find_item(index).images
        if number >= len(images):
            raise HTTPException(404, "no such item")
        side = THUMBNAIL_SIDE if "small" in request.query_params else MAX_DISPLAY_SIDE
        encode = partial(self._images.encode, images[number], side)
        _, content, _ = await self._image_jobs.run(request, encode)
        headers = {"cache-control": "private, max-age=3600"}
        return Response(content, media_type="image/webp", headers=headers)

    def _find_item(self, index: int) -> LabelItem:
        if index >= len(self._items):
            raise HTTPException(404, "no such item")
        return self._items[index]

    async def post_decision(self, request: Request) -> Response:
        """Save a decision; see `decide`."""
        decision = await parse_body(request, DecisionRequest)
        return JSONResponse(await to_thread.run_sync(self.decide, decision))

    async def post_decisions(self, request: Request) -> Response:
        """Save several decisions; see `decide_many`."""
        decision = await parse_body(request, BulkRequest)
        return JSONResponse(await to_thread.run_sync(self.decide_many, decision))

    def decide(self, request: DecisionRequest) -> dict[str, Any]:
        """Save a decision, and return the item and the counts."""
        store = self._session.store
        # Without the lock, so that no decision waits for the images of another one.
        sizes = self._read_sizes(store.find(request.id))
        with self._lock:
            item = store.find(request.id)
            if request.revision not in (None, len(item.history)):
                raise UserError(
                    "the image was changed in another tab",
                    expected="the decisions that the page shows",
                    remedy="reload the page",
                )
            if request.action == "save":
                self._save(item, request, sizes)
            elif request.action == "skip":
                store.skip(request.id)
            else:
                store.reopen(request.id)
            index = self._index_by_id[request.id]
            return {"item": self.describe(index, sizes), "counts": store.count_events()}

    def decide_many(self, request: BulkRequest) -> dict[str, Any]:
        """Accept the suggestions that a person could accept, or reopen items of a revision."""
        store, changed = self._session.store, []
        if request.action == "accept" and self._session.review:
            raise UserError(
                "labels are reviewed one by one", expected="new labels", remedy="reload the page"
            )
        candidates: list[Candidate] = []
        if request.action == "accept":
            # Without the lock, because it reads images.
            candidates = self._list_candidates(request.min_confidence)
        with self._lock, store.write_once():
            for candidate in candidates:
                if self._accept(candidate):
                    changed.append((candidate.index, len(candidate.item.history)))
            for index, revision in request.items:
                item = self._find_item(index)
                if len(item.history) == revision:
                    store.reopen(item.sample.sample.id)
                    changed.append((index, len(item.history)))
            return {"items": changed, "counts": store.count_events()}

    def _list_candidates(self, min_confidence: float) -> list[Candidate]:
        """Return the open items with a suggestion from a confidence on."""
        candidates: list[Candidate] = []
        for index, item in enumerate(self._items):
            revision = len(item.history)
            confidence = item.suggestion.confidence if item.suggestion else None
            is_open = item.decision is None and not item.draft
            if is_open and confidence is not None and confidence >= min_confidence:
                candidates.append(Candidate(index, item, revision, self._read_sizes(item)))
        return candidates

    def _accept(self, candidate: Candidate) -> bool:
        """Accept a suggestion, and return whether it is valid and its item unchanged."""
        item = candidate.item
        if len(item.history) != candidate.revision:
            return False
        answer = describe_answer(self._session.select_suggestion(item))
        values = {"id": item.sample.sample.id, "action": "save", **answer}
        try:
            self._save(item, DecisionRequest.model_validate(values), candidate.sizes)
        except (UserError, ValidationError) as error:
            # Invalid suggestions stay open. Errors of the disk end the request.
            if isinstance(error.__cause__, OSError):
                raise
            return False
        return True

    def _save(
        self,
        item: LabelItem,
        request: DecisionRequest,
        found_sizes: Sequence[ImageSize | CorruptImageError],
    ) -> None:
        text = request.text
        if request.edits is not None:
            text = self._session.edit_fields(text, request.edits)
        self._session.check_answer(item, text, bool(request.boxes))
        updated = request.model_copy(update={"text": text})
        sizes: list[ImageSize] = []
        for size in found_sizes:
            if isinstance(size, CorruptImageError):
                raise size
            sizes.append(size)
        content = _build_content(item, updated, sizes, self._session.task.kind)
        self._check_classes(item, updated)
        if not content:
            raise UserError("the answer is empty", remedy="enter an answer, or skip (S)")
        self._session.save(item, content, request.question)

    def _check_classes(self, item: LabelItem, request: DecisionRequest) -> None:
        """Raise UserError for a class that is none of the choices of the user.

        A new box also needs a class if the known boxes have one.
        """
        task, choices = self._session.task, self._list_choices(item)
        names, remedy = [request.text], "choose a class, or skip (S)"
        if task.has_regions:
            names = [box.label or "" for box in request.boxes]
            remedy = "choose its class, or delete it"
        known = f"{', '.join(choices or task.names):.200}"
        old = [part for part in item.proposal if isinstance(part, BoxPart)]
        unlabeled = [n for n, box in enumerate(request.boxes, 1) if not box.label]
        is_optional = not task.has_fixed_choices and not all(part.label for part in old)
        if known and task.has_regions and unlabeled and not is_optional:
            kind = "point" if request.boxes[unlabeled[0] - 1].is_point else "box"
            what = f"{kind} {unlabeled[0]} has no class"
            raise UserError(what, expected=known, remedy=remedy)
        for name in names if task.has_fixed_choices and choices else ():
            # An empty text is reported as an empty answer.
            if name.strip() and name not in choices:
                what = f"{name!r:.80} is not one of the classes"
                raise UserError(what, expected=known, remedy=remedy)


def _build_content(
    item: LabelItem, request: DecisionRequest, sizes: Sequence[ImageSize], kind: str
) -> AnswerContent:
    """Build the answer of a request; an unchanged one has the parts of the proposal.

    It is empty without a text and boxes. Raises UserError if a box is outside of its image.
    """
    answer = request.model_dump(mode="json", include={"text", "boxes"})
    proposals = [one for one in (item.proposal, item.suggestion and item.suggestion.content) if one]
    parts = (part for one in proposals for part in one if isinstance(part, BoxPart))
    has_points = kind == "points" or any(part.is_point for part in parts)
    boxes = []
    for box in request.boxes:
        if box.image >= len(sizes):
            raise UserError(
                f"a box in image {box.image} (0-based)",
                where=request.id,
                expected=describe_indices(len(sizes), "image"),
                remedy="reload the page",
            )
        # Equal corners are a point only where points are expected, and else a box without area.
        size, is_point = sizes[box.image], box.is_point and has_points
        try:
            corners = clip_to_image(box.xyxy, size, PIXELS, is_point=is_point)
        except InvalidBoxError as error:
            remedy = "draw it again"
            raise UserError(error.what, expected=error.expected, remedy=remedy) from error
        boxes.append(create_region(corners, box.label or None, is_point=is_point, image=box.image))
    for known in proposals:
        if describe_answer(known) == answer:
            clipped = iter(boxes)
            return tuple(next(clipped) if isinstance(part, BoxPart) else part for part in known)
    return ((TextPart(text=request.text),) if request.text.strip() else ()) + tuple(boxes)


def make_label_app(session: LabelSession, access: Access, pool: WorkerPool) -> AccessMiddleware:
    """Build the page as an ASGI application with access control.

    Args:
        pool: Worker processes that read images.
    """
    page = LabelPage(session, ImageReader(pool))
    return AccessMiddleware(create_app(page.list_routes()), access)
