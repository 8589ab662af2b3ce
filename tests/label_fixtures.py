"""Images to label, and suggestions without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finesight.data.sample import BoxPart, TextPart
from finesight.label.label_session import LabelSession, open_session
from finesight.label.suggestion import AnswerContent, SuggestedPart, Suggestion

MODEL = "finesight-tiny"
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
