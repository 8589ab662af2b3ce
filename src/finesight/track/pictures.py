"""Answers drawn for who looks at a tracker: the right boxes, those before training, those now.

The same samples at every evaluation, so that one can be followed from step to step.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finesight.data.headers import DamagedPicture, picture_size
from finesight.data.sample import BoxPart
from finesight.infer.draw import draw_boxes
from finesight.report.examples import pairs, pictures_of
from finesight.report.gallery import boxes_of
from finesight.report.record import Line
from finesight.track.records import Picture
from finesight.vision.picture import open_picture

MOST = 8
"""Samples that are shown, spread evenly over all."""

SIDE = 640
"""Pixels of the longer side of each panel."""

GAP = 6
"""Pixels between panels."""

LONGEST = 1000
"""Characters of each text in a caption."""


def drawn(before: Path, now: Path) -> list[Picture]:
    """Pictures of some samples with what was answered before training and now, of two files of
    answers, the same one or a missing one where there is no other. A sample whose picture cannot
    be read any more, or that has none, is left out."""
    first = before if before.is_file() and before != now else None
    both = list(pairs(first, now)) if now.is_file() else []
    chosen = (both[index] for index in _spread(len(both)))
    shown = (_picture(old, new) for old, new in chosen if new is not None)
    return [picture for picture in shown if picture is not None]


def _spread(count: int) -> list[int]:
    most = min(count, MOST)
    return [round(place * (count - 1) / max(1, most - 1)) for place in range(most)]


def _picture(before: Line | None, now: Line) -> Picture | None:
    rows = [("right", now.get("gold_boxes")), ("before", (before or {}).get("boxes"))]
    rows.append(("now", now.get("boxes")))
    named = [(name, boxes_of(boxes)) for name, boxes in rows]
    paths = pictures_of(now)
    # The picture that the boxes are in, of a sample with several.
    which = next((box["image"] for _, boxes in named for box in boxes), 0)
    if not 0 <= which < len(paths):
        return None
    try:
        shown, scale = _opened(Path(paths[which]))
    except (DamagedPicture, OSError, ValueError):
        return None
    panels = [
        (name, draw_boxes(shown, [_scaled(box, scale) for box in boxes if box["image"] == which]))
        for name, boxes in named
        if boxes
    ]
    whole = _side_by_side([panel for _, panel in panels] or [shown])
    order = ", ".join(name for name, _ in panels)
    return Picture(jpeg=_as_jpeg(whole), caption=_caption(before, now, order))


def _opened(path: Path) -> tuple[Image.Image, float]:
    """The picture at most SIDE long, and its pixels per pixel of the original."""
    height, width = picture_size(path)
    scale = min(1.0, SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return open_picture(path, at_least=min(size)).resize(size), scale


def _scaled(box: Line, scale: float) -> BoxPart:
    x1, y1, x2, y2 = (corner * scale for corner in box["xyxy"])
    return BoxPart(image=box["image"], label=box["label"] or None, xyxy=(x1, y1, x2, y2))


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    width, height = panels[0].size
    whole = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
    for number, panel in enumerate(panels):
        whole.paste(panel, (number * (width + GAP), 0))
    return whole


def _as_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Thin coloured lines keep their colours only so.
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def _caption(before: Line | None, now: Line, order: str) -> str:
    said = {
        "id": now.get("id"),
        "question": now.get("prompt"),
        "right": now.get("gold"),
        "before": None if before is None else before.get("answer"),
        "now": now.get("answer"),
        "boxes, left to right": order or None,
    }
    return "\n".join(f"{name}: {str(text)[:LONGEST]}" for name, text in said.items() if text)
