"""Images to label, and suggestions without a model."""

from __future__ import annotations

import base64
import json
import random
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from finesight.data.sample import BoxPart, TextPart
from finesight.label.label_session import LabelSession, open_session
from finesight.label.label_store import AnswerContent, SuggestedPart, Suggestion

MODEL = "finesight-tiny"
COLORS = ("red", "green", "blue")
FIELDS = (
    {"shop": "Vade Mart", "total": 3},
    {"shop": "Olp", "total": 2**53 + 1},
    {"shop": "Rab", "total": 8},
)
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
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Which color?"},
    ]
    with urllib.request.urlopen(f"{address}models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(
        f"{address}chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def make_suggestion(
    sample_id: str, content: Sequence[TextPart | BoxPart] | str, *confidences: float
) -> Suggestion:
    """Build a suggestion whose parts are the fields of a JSON text, the boxes, or the text."""
    if isinstance(content, str):
        content = [TextPart(text=content)]
    paths: list[tuple[str | int, ...]] = [(index,) for index in range(len(content))]
    if isinstance(content[0], TextPart):
        text = content[0].text
        paths = [(key,) for key in json.loads(text)] if text.startswith("{") else [()]
    parts = [SuggestedPart(*pair) for pair in zip(paths, confidences, strict=True)]
    answer: AnswerContent = tuple(content)
    return Suggestion(sample_id, answer, min(confidences), tuple(parts))


def open_fields_session(folder: Path) -> LabelSession:
    """Open a session with suggested fields for three images; the last image is least certain."""
    photos = draw_images(folder)
    session = open_session(folder / "labels", MODEL, [photos], prompt="Read.", kind="fields")
    suggestions = [
        make_suggestion(str(photos / f"{index}.png"), json.dumps(fields), 0.9 - index / 10, 0.95)
        for index, fields in enumerate(FIELDS)
    ]
    session.store.add_suggestions([(one, None) for one in suggestions], MODEL)
    return session


def open_boxes_session(folder: Path) -> LabelSession:
    """Open a session with two suggested boxes, shop and total, in each of two images."""
    photos = draw_images(folder, 2)
    names = ("shop", "total")
    session = open_session(
        folder / "labels", MODEL, [photos], prompt="Find.", kind="boxes", choices=names
    )
    boxes = [BoxPart(label=name, xyxy=xyxy) for name, xyxy in zip(names, CORNERS, strict=True)]
    suggestions = [make_suggestion(str(photos / f"{i}.png"), boxes, 0.4, 0.8) for i in range(2)]
    session.store.add_suggestions([(one, None) for one in suggestions], MODEL)
    return session
