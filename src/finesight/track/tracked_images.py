"""Render validation images with reference boxes, boxes before training and current boxes.

Trackers show them. The samples are the same at every evaluation of a run.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.data.sample import BoxPart
from finesight.infer.prediction import draw_boxes
from finesight.report.examples import pair_predictions, read_boxes, read_image_paths
from finesight.report.run_reader import JsonObject
from finesight.track.tracker_records import TrackedImage
from finesight.vision.image_decoding import load_image

MAX_SAMPLES = 8
"""Maximum number of rendered samples, evenly spaced over the validation data."""

MAX_PANEL_SIDE = 640
"""Maximum side length of a panel in pixels; each panel shows the image with one set of boxes."""

PANEL_GAP = 6
"""Gap between two panels in pixels."""

MAX_CAPTION_CHARS = 1000
"""Maximum number of characters of each text in a caption, such as the answer."""


def render_example_images(before: Path, after: Path) -> list[TrackedImage]:
    """Render validation samples with the boxes of two prediction files.

    Args:
        before: Prediction file before training; may be missing, or equal to `after`.

    Returns:
        One captioned image per sample. Samples without a readable image are skipped.
    """
    baseline = before if before.is_file() and before != after else None
    line_pairs = list(pair_predictions(baseline, after)) if after.is_file() else []
    selected = (line_pairs[index] for index in _spread_indices(len(line_pairs)))
    images = (
        _render_example(before_line, after_line)
        for before_line, after_line in selected
        if after_line is not None
    )
    return [image for image in images if image is not None]


def _spread_indices(count: int) -> list[int]:
    num_samples = min(count, MAX_SAMPLES)
    return [
        round(position * (count - 1) / max(1, num_samples - 1)) for position in range(num_samples)
    ]


def _render_example(before: JsonObject | None, after: JsonObject) -> TrackedImage | None:
    named_boxes = [("reference", after.get("gold_boxes")), ("before", (before or {}).get("boxes"))]
    named_boxes.append(("after", after.get("boxes")))
    parsed_boxes = [(name, read_boxes(boxes)) for name, boxes in named_boxes]
    paths = read_image_paths(after)
    # Of several images, use the one with boxes.
    image_index = next((box["image"] for _, boxes in parsed_boxes for box in boxes), 0)
    if not 0 <= image_index < len(paths):
        return None
    try:
        image, scale = _open_resized(Path(paths[image_index]))
    except (CorruptImageError, OSError, ValueError):
        return None
    panels = [
        (
            name,
            draw_boxes(
                image, [_scale_box(box, scale) for box in boxes if box["image"] == image_index]
            ),
        )
        for name, boxes in parsed_boxes
        if boxes
    ]
    combined = _join_panels([panel for _, panel in panels] or [image])
    panel_names = ", ".join(name for name, _ in panels)
    return TrackedImage(
        jpeg=_encode_jpeg(combined), caption=_format_caption(before, after, panel_names)
    )


def _open_resized(path: Path) -> tuple[Image.Image, float]:
    """Return an image of at most MAX_PANEL_SIDE, and its scale relative to the original."""
    height, width = read_image_size(path)
    scale = min(1.0, MAX_PANEL_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return load_image(path, min_side=min(size)).resize(size), scale


def _scale_box(box: JsonObject, scale: float) -> BoxPart:
    x1, y1, x2, y2 = (corner * scale for corner in box["xyxy"])
    return BoxPart(image=box["image"], label=box["label"] or None, xyxy=(x1, y1, x2, y2))


def _join_panels(panels: Sequence[Image.Image]) -> Image.Image:
    width, height = panels[0].size
    combined = Image.new("RGB", (len(panels) * (width + PANEL_GAP) - PANEL_GAP, height), "white")
    for panel_index, panel in enumerate(panels):
        combined.paste(panel, (panel_index * (width + PANEL_GAP), 0))
    return combined


def _encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # Without chroma subsampling, so that thin lines keep their colors.
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def _format_caption(before: JsonObject | None, after: JsonObject, panel_names: str) -> str:
    lines = {
        "id": after.get("id"),
        "question": after.get("prompt"),
        "reference": after.get("gold"),
        "before": None if before is None else before.get("answer"),
        "after": after.get("answer"),
        "boxes, left to right": panel_names or None,
    }
    return "\n".join(
        f"{name}: {str(text)[:MAX_CAPTION_CHARS]}" for name, text in lines.items() if text
    )
