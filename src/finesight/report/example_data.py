"""Convert validation samples to page data: thumbnails, boxes, and formulas as MathML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from finesight.data.image_header import MAX_IMAGE_PIXELS, CorruptImageError, read_image_size
from finesight.report.examples import Example, read_image_paths, read_scores
from finesight.report.i18n import translate
from finesight.report.inline_image import build_inline_image
from finesight.report.mathml import FormulaConverter
from finesight.report.metrics import format_metric_name
from finesight.report.run_reader import JsonObject, is_finite
from finesight.vision.image_decoding import load_image

MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS = 200 * 260, 480 * 640, 40_000_000
"""Minimum and maximum pixels of a thumbnail, and maximum pixels of all thumbnails.

Thumbnails are limited by area, which keeps wide formulas and tall pages readable.
"""

THUMBNAIL_QUALITY = 70
"""JPEG quality of thumbnails."""

MAX_ANSWER_CHARS = 4000
"""Maximum number of displayed characters of an answer."""

MAX_BOXES = 200
"""Maximum number of boxes that are drawn per answer."""

NUM_DECODE_THREADS = 8
"""Number of threads that decode images for thumbnails."""

MAX_PARALLEL_PIXELS = 16_000_000
"""Pixels of an image above which it is not decoded in parallel with others.

Each thread retains the memory of its largest image. In a training process, this would add up to
gigabytes.
"""

MAX_ID_CHARS = 200
"""Maximum number of displayed characters of a sample ID."""

JsonData = dict[str, Any]

ThumbnailCache = dict[tuple[str, int], JsonData]
"""Thumbnails by image path and thumbnail pixel limit."""


class ExampleDataBuilder:
    """Converts validation samples with answers to page data. Each image is included once.

    Args:
        folders: Folders to which relative image paths may refer, tried in order.
        formula_converter: Converter for answers in LaTeX. None if answers are not formulas.
        thumbnails: Thumbnails of the previous page. They are reused, and replaced by those of the
            new page.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        formula_converter: FormulaConverter | None,
        thumbnails: ThumbnailCache | None = None,
    ) -> None:
        self._folders, self._formula_converter = folders, formula_converter
        self._thumbnails: ThumbnailCache = {} if thumbnails is None else thumbnails

    def build(self, examples: Sequence[Example]) -> JsonData:
        """Return page data with `examples`, and `images` to which the examples refer by index."""
        thumbnails, image_indices = self.build_thumbnails([example.latest for example in examples])
        return {
            "images": thumbnails,
            "examples": [self._build_example(example, image_indices) for example in examples],
        }

    def build_thumbnails(
        self, lines: Iterable[JsonObject]
    ) -> tuple[list[JsonData | None], dict[str, int]]:
        """Return the thumbnails of all images of the given samples, and their indices by path.

        A thumbnail that cannot be created has an error message.
        """
        paths = dict.fromkeys(path for line in lines for path in read_image_paths(line))
        image_indices = {path: index for index, path in enumerate(paths)}
        max_pixels = min(
            MAX_THUMBNAIL_PIXELS, max(MIN_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS // max(1, len(paths)))
        )
        with ThreadPoolExecutor(NUM_DECODE_THREADS) as pool:
            small_thumbnails = list(
                pool.map(partial(self._get_thumbnail, max_pixels, MAX_PARALLEL_PIXELS), paths)
            )
        thumbnails = [
            self._get_thumbnail(max_pixels, MAX_IMAGE_PIXELS, path)
            if thumbnail is None
            else thumbnail
            for path, thumbnail in zip(paths, small_thumbnails, strict=True)
        ]
        self._thumbnails.clear()
        self._thumbnails |= {
            (thumbnail["path"], max_pixels): thumbnail
            for thumbnail in thumbnails
            if thumbnail and "src" in thumbnail
        }
        return thumbnails, image_indices

    def _get_thumbnail(self, max_pixels: int, max_source_pixels: int, name: str) -> JsonData | None:
        return self._thumbnails.get((name, max_pixels)) or self._make_thumbnail(
            max_pixels, max_source_pixels, name
        )

    def _make_thumbnail(
        self, max_pixels: int, max_source_pixels: int, name: str
    ) -> JsonData | None:
        """Return the thumbnail of an image, or an error message if it is unreadable.

        Returns None without decoding if the image has more than `max_source_pixels`.
        """
        try:
            path = self._resolve_path(name)
            height, width = read_image_size(path)
            if height * width > max_source_pixels:
                return None
            scale = min(1.0, math.sqrt(max_pixels / (width * height)))
            longest, shortest = (
                max(1, round(side_fn(width, height) * scale)) for side_fn in (max, min)
            )
            inline_image = build_inline_image(
                load_image(path, min_side=shortest), longest, THUMBNAIL_QUALITY
            )
        except CorruptImageError as error:
            return {"path": name, "error": error.what}
        except (
            OSError,
            ValueError,
        ) as error:  # permission, null byte in path
            return {"path": name, "error": f"unreadable ({error})"}
        return {"path": name, "src": inline_image["src"], "width": width, "height": height}

    def _resolve_path(self, name: str) -> Path:
        candidates = [folder / name for folder in self._folders]
        return next((candidate for candidate in candidates if candidate.exists()), Path(name))

    def _build_example(self, example: Example, image_indices: dict[str, int]) -> JsonData:
        return {
            **self.build_question(example.latest, image_indices),
            "kind": example.kind,
            "change": round(example.change, 4),
            "before": self.build_answer(example.before),
            "after": self.build_answer(example.after),
        }

    def build_question(self, line: JsonObject, image_indices: dict[str, int]) -> JsonData:
        """Return the page data of a sample without answers: question, images and references."""
        reference = line.get("gold")
        references = line.get("references")
        texts = [reference, *(references if isinstance(references, list) else [])]
        reference_texts = [text for text in texts if isinstance(text, str) and text]
        return {
            "id": _truncate(str(line.get("id")), MAX_ID_CHARS),
            "images": [image_indices[path] for path in read_image_paths(line)],
            "question": _truncate(str(line.get("prompt", ""))),
            "references": [_truncate(text) for text in reference_texts],
            "formula": self._convert_formula(reference_texts[0]) if reference_texts else None,
            "boxes": read_boxes(line.get("gold_boxes")),
        }

    def build_answer(self, line: JsonObject | None) -> JsonData | None:
        """Return the page data of an answer and its scores, or None without a prediction."""
        if line is None:
            return None
        text, is_complete = str(line.get("answer", "")), line.get("stopped") is not False
        num_tokens = line.get("num_tokens")
        return {
            "text": _truncate(text),
            # A truncated answer is not a valid formula.
            "formula": self._convert_formula(text) if is_complete else None,
            "boxes": read_boxes(line.get("boxes")),
            "scores": {
                format_metric_name(name): round(value, 4)
                for name, value in read_scores(line).items()
            },
            "is_complete": is_complete,
            "num_tokens": num_tokens if isinstance(num_tokens, int) else None,
        }

    def _convert_formula(self, text: str) -> object:
        return self._formula_converter.convert(text) if self._formula_converter else None


def read_boxes(content: object) -> list[JsonData]:
    """Return the boxes of a prediction that have finite corners, at most `MAX_BOXES`.

    Each box has `image` (index), `label` and `xyxy` (corners in pixels).
    """
    boxes = content if isinstance(content, list) else []
    return [
        _to_box_data(box)
        for box in boxes[:MAX_BOXES]
        if isinstance(box, dict) and _has_valid_corners(box)
    ]


def _to_box_data(box: JsonObject) -> JsonData:
    label = box.get("label")
    return {
        "image": box.get("image", 0),
        "label": str(label)[:80] if label else "",
        "xyxy": [float(corner) for corner in box["xyxy"]],
    }


def _has_valid_corners(box: JsonObject) -> bool:
    corners = box.get("xyxy")
    return isinstance(corners, list) and len(corners) == 4 and _all_finite(corners)


def _all_finite(values: Iterable[object]) -> bool:
    return all(map(is_finite, values))


def _truncate(text: str, max_chars: int = MAX_ANSWER_CHARS) -> str:
    if len(text) <= max_chars:
        return text
    return translate("{} [and {:,} more characters]", text[:max_chars], len(text) - max_chars)
