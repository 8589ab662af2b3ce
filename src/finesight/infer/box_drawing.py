"""Drawing of predicted boxes on copies of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finesight.data.sample import BoxPart
from finesight.infer.prediction import Prediction
from finesight.storage import make_folder, write_file
from finesight.vision.image_decoding import load_image

BOX_COLORS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
)


def save_annotated_images(predictions: Sequence[Prediction], out_dir: Path) -> list[Path]:
    """Write one PNG with drawn boxes per image of each prediction to `out_dir`.

    Existing files are not overwritten: a new file gets a numeric suffix.

    Returns:
        Paths of the written files, in order.
    """
    make_folder(out_dir)
    paths = []
    for prediction in predictions:
        for image_index, path in enumerate(prediction.images):
            target = find_unused_path(out_dir, path.stem)
            buffer = io.BytesIO()
            annotate_image(prediction, image_index).save(buffer, format="PNG")
            write_file(target, buffer.getvalue())
            paths.append(target)
    return paths


def annotate_image(prediction: Prediction, image_index: int) -> Image.Image:
    """Return an RGB copy of one image of a prediction with its boxes drawn."""
    boxes = [box for box in prediction.boxes if box.image == image_index]
    return draw_boxes(load_image(prediction.images[image_index]), boxes)


def draw_boxes(image: Image.Image, boxes: Sequence[BoxPart]) -> Image.Image:
    """Draw boxes and their labels on a copy of an RGB image.

    Args:
        image: RGB image.
        boxes: Boxes [x1, y1, x2, y2] in pixels of the image.
    """
    annotated = image.copy()
    draw = ImageDraw.Draw(annotated)
    short_side = min(annotated.size)
    line_width = max(1, round(short_side / 150))
    font = ImageFont.load_default(size=max(10, short_side / 30))
    for box_index, box in enumerate(boxes):
        color = BOX_COLORS[box_index % len(BOX_COLORS)]
        x1, y1, x2, y2 = box.xyxy
        # Inverted corners are sorted for drawing only; metrics still reject such a box.
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        draw.rectangle(corners, outline=color, width=line_width)
        if box.label:
            _draw_label(draw, font, box.label, corners, color)
    return annotated


def _draw_label(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    label: str,
    corners: tuple[float, float, float, float],
    color: str,
) -> None:
    """Draw a label above its box, or inside the box at the upper image border."""
    _, _, width, height = draw.textbbox((0, 0), label, font=font)
    x, y = corners[0], corners[1]
    top = y - height if y >= height else y
    draw.rectangle((x, top, x + width, top + height), fill=color)
    draw.text((x, top), label, fill="white", font=font)


def find_unused_path(folder: Path, stem: str) -> Path:
    """Return an unused PNG path in `folder`, with a numeric suffix if necessary."""
    target, suffix = folder / f"{stem}.png", 1
    while target.exists():
        suffix += 1
        target = folder / f"{stem}-{suffix}.png"
    return target
