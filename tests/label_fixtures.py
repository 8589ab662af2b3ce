"""Images to label, and suggestions without a model."""

import base64
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from browser import Browser
from PIL import Image, ImageDraw
from starlette.testclient import TestClient
from web_server_fixture import get_image_pool, run_app

from finesight.app.label_page import make_label_app
from finesight.app.server import Access
from finesight.label.label_session import LabelSession, open_session
from finesight.label.label_store import LABELS_FILE, AnswerContent, SuggestedPart, Suggestion
from finesight.samples.sample import BoxPart, TextPart, read_samples

MODEL = "finesight-tiny"
COLORS = ("red", "green", "blue")
TOTALS = {"Vade Mart": 3, "Olp": 2**53 + 1, "Rab": 8}
FIELDS = tuple({"shop": shop, "total": total} for shop, total in TOTALS.items())
CORNERS = ((10.0, 20.0, 40.0, 50.0), (60.0, 20.0, 90.0, 45.0))


def draw_images(folder: Path, count: int = 3) -> Path:
    """Write images named 0.png, 1.png, ... of 120 x 80 pixels into the folder `photos`."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (120, 80), (250, 240 - 20 * index, 200)).save(photos / f"{index}.png")
    return photos


def draw_dots(folder: Path, count: int) -> dict[str, str]:
    """Write images of a white dot on a color, and return the colors by file name."""
    folder.mkdir(parents=True)
    colors = {f"{index:03}.png": COLORS[index % 3] for index in range(count)}
    for index, (name, color) in enumerate(colors.items()):
        image, rng = Image.new("RGB", (56, 56), color), random.Random(index)
        x, y, size = rng.randrange(40), rng.randrange(40), rng.randrange(6, 16)
        ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), fill="white")
        image.save(folder / name)
    return colors


def ask_server(address: str, image: Path) -> str:
    """Return the answer of an OpenAI-compatible server about an image."""
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    image_part = {"type": "image_url", "image_url": {"url": url}}
    content = [image_part, {"type": "text", "text": "Which color?"}]
    model = httpx.get(f"{address}models", timeout=60).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    answer = httpx.post(f"{address}chat/completions", json=body, timeout=60)
    return str(answer.json()["choices"][0]["message"]["content"])


def make_suggestion(
    sample_id: str, content: Sequence[TextPart | BoxPart] | str, *confidences: float
) -> Suggestion:
    """Build a suggestion whose parts are the fields of a JSON text, the boxes, or the text.

    The confidence of each part is 0.9 by default.
    """
    if isinstance(content, str):
        content = [TextPart(text=content)]
    paths: list[tuple[str | int, ...]] = [(index,) for index in range(len(content))]
    if isinstance(content[0], TextPart):
        text = content[0].text
        paths = [(key,) for key in json.loads(text)] if text.startswith("{") else [()]
    confidences = confidences or (0.9,) * len(paths)
    parts = [SuggestedPart(*pair) for pair in zip(paths, confidences, strict=True)]
    answer: AnswerContent = tuple(content)
    return Suggestion(sample_id, answer, min(confidences), tuple(parts))


def open_suggested_session(
    folder: Path, *answers: Sequence[TextPart | BoxPart] | str, **options: Any
) -> LabelSession:
    """Open a session about three images, with suggestions for the first of them."""
    photos = folder / "photos"
    if not photos.exists():
        draw_images(folder)
    session = open_session(folder / "labels", MODEL, [photos], **({"prompt": "Read."} | options))
    for index, answer in enumerate(answers):
        suggestion = make_suggestion(str(photos / f"{index}.png"), answer)
        session.store.add_suggestions([suggestion], MODEL)
    session.complete_task()
    return session


def open_fields_session(folder: Path) -> LabelSession:
    """Open a session with suggested fields for three images; the last image is least certain."""
    photos = draw_images(folder)
    session = open_session(folder / "labels", MODEL, [photos], prompt="Read.", kind="fields")
    suggestions = [
        make_suggestion(str(photos / f"{index}.png"), json.dumps(fields), 0.9 - index / 10, 0.95)
        for index, fields in enumerate(FIELDS)
    ]
    session.store.add_suggestions(suggestions, MODEL)
    return session


def open_boxes_session(folder: Path) -> LabelSession:
    """Open a session with two suggested boxes, shop and total, in each of two images."""
    photos, names = draw_images(folder, 2), ("shop", "total")
    options = {"prompt": "Find.", "kind": "boxes", "choices": names}
    session = open_session(folder / "labels", MODEL, [photos], **options)
    boxes = [BoxPart(label=name, xyxy=xyxy) for name, xyxy in zip(names, CORNERS, strict=True)]
    suggestions = [make_suggestion(str(photos / f"{i}.png"), boxes, 0.4, 0.8) for i in range(2)]
    session.store.add_suggestions(suggestions, MODEL)
    return session


@contextmanager
def open_client(session: LabelSession, password: str | None = None) -> Iterator[TestClient]:
    app = make_label_app(session, Access(password), get_image_pool())
    with session.store, TestClient(app, "http://127.0.0.1") as client:
        yield client


def read_answers(folder: Path) -> dict[str, str]:
    samples = read_samples(folder / LABELS_FILE)
    return {Path(one.id).name: one.messages[-1].content[0].text for one in samples}


def save(client: TestClient, item: dict[str, Any], **values: object) -> Any:
    return client.post("/decision", json={"id": item["id"], "action": "save", **values})


@contextmanager
def serve(session: LabelSession) -> Iterator[str]:
    app = make_label_app(session, Access(), get_image_pool())
    with session.store, run_app(app) as port:
        yield f"http://127.0.0.1:{port}"


def run_in_page(browser: Browser, script: str) -> Any:
    """Run a function body with the exports of the page's script as `page`."""
    url = 'new URL("static/label.js", document.baseURI)'
    return browser.run(f"return import({url}).then((page) => {{ {script} }});")


def press(browser: Browser, key: str, modifiers: int = 0) -> None:
    browser.press(key, modifiers=modifiers)


def check_layouts(browser: Browser, address: str) -> None:
    for lang in ("en", "zh"):
        browser.visit(f"{address}/?lang={lang}")
        browser.wait_for("document.querySelector('#form .row')")
        browser.wait_for("document.querySelector('#image').naturalWidth")
        assert browser.find_layout_problems() == [], lang
        assert browser.messages() == []
