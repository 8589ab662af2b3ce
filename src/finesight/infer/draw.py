"""Boxes of answers drawn into copies of their pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finesight.data.sample import BoxPart
from finesight.infer.predict import Prediction
from finesight.storage import make_folder, write_file
from finesight.vision.picture import open_picture

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def draw(predictions: Sequence[Prediction], folder: Path) -> list[Path]:
    """Write one PNG for each picture of each prediction, boxes drawn, into `folder`.

    A name that is taken gets a number: no file is overwritten, an input least of all. Returns the
    files written, in order.
    """
    make_folder(folder)
    written = []
    for prediction in predictions:
        for number, path in enumerate(prediction.images):
            target = free_name(folder, path.stem)
            buffer = io.BytesIO()
            drawn(prediction, number).save(buffer, format="PNG")
            write_file(target, buffer.getvalue())
            written.append(target)
    return written


def drawn(prediction: Prediction, number: int) -> Image.Image:
    """A copy of one of its pictures, in RGB and its own size, with the boxes that are in it."""
    boxes = [box for box in prediction.boxes if box.image == number]
    return draw_boxes(open_picture(prediction.images[number]), boxes)


def draw_boxes(picture: Image.Image, boxes: Sequence[BoxPart]) -> Image.Image:
    """A copy of an RGB picture with boxes [x1, y1, x2, y2] in its pixels and their labels."""
    copy = picture.copy()
    pen = ImageDraw.Draw(copy)
    shorter = min(copy.size)
    line = max(1, round(shorter / 150))
    font = ImageFont.load_default(size=max(10, shorter / 30))
    for number, box in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        x1, y1, x2, y2 = box.xyxy
        # Corners in the wrong order are drawn as the box they span; they still score nothing.
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        pen.rectangle(corners, outline=colour, width=line)
        if box.label:
            _write_label(pen, font, box.label, corners, colour)
    return copy


def _write_label(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    label: str,
    corners: tuple[float, float, float, float],
    colour: str,
) -> None:
    """Above the box where there is room, else inside its top edge."""
    _, _, width, height = pen.textbbox((0, 0), label, font=font)
    x, y = corners[0], corners[1]
    top = y - height if y >= height else y
    pen.rectangle((x, top, x + width, top + height), fill=colour)
    pen.text((x, top), label, fill="white", font=font)


def free_name(folder: Path, stem: str) -> Path:
    """A name in `folder` for a PNG that no file has: `stem`, or that with a number."""
    target, number = folder / f"{stem}.png", 1
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}.png"
    return target
