"""Render validation images with reference boxes, boxes before training and current boxes.

Trackers show them. The samples are the same at every evaluation of a run.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from pathlib import Path

from PIL import Image

from finesight.infer.prediction import draw_boxes
from finesight.report.examples import pair_predictions, read_boxes, read_image_paths
from finesight.report.run_reader import JsonObject
from finesight.samples.frames import rescale
from finesight.samples.image_file import CorruptImageError, read_image_size
from finesight.samples.sample import BoxPart
from finesight.track.tracker_records import TrackedImage
from finesight.vision.image_processing import load_image

MAX_SAMPLES = 8
"""Maximum number of rendered samples, evenly spaced over the validation data."""

MAX_PANEL_SIDE = 640
"""Maximum side length of a panel in pixels; each panel shows the image with one set of boxes."""

PANEL_GAP = 6
"""Gap between two panels in pixels."""

MAX_CAPTION_CHARS = 1000


def render_example_images(
    before: Path, after: Path, sample_ids: Collection[str] | None = None
) -> list[TrackedImage]:
    """Render validation samples with the boxes of two prediction files.

    Args:
        before: Prediction file before training; may be missing, or equal to `after`.
        after: Prediction file of the evaluation.
        sample_ids: Samples to choose from; None for all.

    Returns:
        One captioned image per sample. Samples without a readable image are skipped.
    """
    if not after.is_file():
        return []
    baseline = before if before.is_file() and before != after else None
    line_pairs = []
    for old, new in pair_predictions(baseline, after):
        if new is not None and (sample_ids is None or new.get("id") in sample_ids):
            line_pairs.append((old, new))
    num_samples = min(len(line_pairs), MAX_SAMPLES)
    images = []
    for n in range(num_samples):
        index = round(n * (len(line_pairs) - 1) / max(1, num_samples - 1))
        before_line, after_line = line_pairs[index]
        image = _render_example(before_line, after_line)
        if image is not None:
            images.append(image)
    return images


def _render_example(before: JsonObject | None, after: JsonObject) -> TrackedImage | None:
    boxes_by_name = {
        "reference": read_boxes(after.get("gold_boxes")),
        "before": read_boxes((before or {}).get("boxes")),
        "after": read_boxes(after.get("boxes")),
    }
    paths = read_image_paths(after)
    # A tracker gets one image per sample, so one with boxes is chosen.
    first = next(chain.from_iterable(boxes_by_name.values()), None)
    image_index = 0 if first is None else first["image"]
    if not 0 <= image_index < len(paths):
        return None
    try:
        image, scale = _open_resized(Path(paths[image_index]))
    except (CorruptImageError, OSError, ValueError):
        return None
    panels = {}
    for name, boxes in boxes_by_name.items():
        shown = [_scale_box(box, scale) for box in boxes if box["image"] == image_index]
        if boxes:
            panels[name] = draw_boxes(image, shown)
    width, height = image.size
    num_panels = max(1, len(panels))
    combined = Image.new("RGB", (num_panels * (width + PANEL_GAP) - PANEL_GAP, height), "white")
    for panel_index, panel in enumerate(panels.values() if panels else [image]):
        combined.paste(panel, (panel_index * (width + PANEL_GAP), 0))
    return TrackedImage(image=combined, caption=_format_caption(before, after, ", ".join(panels)))


def _open_resized(path: Path) -> tuple[Image.Image, float]:
    """Return an image of at most MAX_PANEL_SIDE, and its scale relative to the original."""
    height, width = read_image_size(path)
    scale = min(1.0, MAX_PANEL_SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return load_image(path, min_side=min(size)).resize(size), scale


def _scale_box(box: JsonObject, scale: float) -> BoxPart:
    corners = rescale(box["xyxy"], (1, 1), (scale, scale))
    return BoxPart(image=box["image"], label=box["label"] or None, xyxy=corners)


def _format_caption(before: JsonObject | None, after: JsonObject, panel_names: str) -> str:
    lines = {
        "id": after.get("id"),
        "question": after.get("prompt"),
        "reference": after.get("gold"),
        "before": None if before is None else before.get("answer"),
        "after": after.get("answer"),
        "boxes, left to right": panel_names or None,
    }
    texts = []
    for name, text in lines.items():
        if text:
            texts.append(f"{name}: {str(text)[:MAX_CAPTION_CHARS]}")
    return "\n".join(texts)
