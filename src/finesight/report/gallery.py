"""Examples as data of a page: thumbnails, boxes, and formulas ready to be drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from finesight.data.headers import DamagedPicture
from finesight.report.examples import Example, pictures_of, scores_of
from finesight.report.formulas import Formulas
from finesight.report.picture import picture
from finesight.report.record import Line
from finesight.vision.picture import open_picture

LEAST_PIXELS, MOST_PIXELS, ALL_PIXELS = 200 * 260, 480 * 640, 40_000_000
"""Of a thumbnail, and of all: fewer pictures are larger ones. An area and not a side is what is
bounded, so that a wide formula and a tall page stay readable alike."""

QUALITY = 70
"""Of thumbnails as JPEG."""

LONGEST = 4000
"""Characters of an answer that are shown."""

MOST_BOXES = 200
"""Boxes of an answer that are drawn."""

READERS = 8
"""Threads that decode pictures."""

Data = dict[str, Any]


class Gallery:
    """Makes data of examples; a picture that several of them ask about is held once.

    `folders` are tried in turn for paths that are not absolute. `formulas` is None where answers
    are no formulas.
    """

    def __init__(self, folders: Sequence[Path], formulas: Formulas | None) -> None:
        self._folders, self._formulas = folders, formulas

    def data(self, examples: Sequence[Example]) -> Data:
        """`examples`, and the `pictures` that they name by number."""
        paths = dict.fromkeys(path for one in examples for path in pictures_of(one.any))
        number = {path: i for i, path in enumerate(paths)}
        pixels = min(MOST_PIXELS, max(LEAST_PIXELS, ALL_PIXELS // max(1, len(paths))))
        with ThreadPoolExecutor(READERS) as pool:
            pictures = list(pool.map(partial(self._picture, pixels), paths))
        return {
            "pictures": pictures,
            "examples": [self._example(one, number) for one in examples],
        }

    def _picture(self, pixels: int, name: str) -> Data:
        """A thumbnail of so many pixels at most, or why there is none."""
        try:
            image = open_picture(self._found(name))
        except DamagedPicture as error:
            return {"path": name, "problem": error.what}
        except (OSError, ValueError) as error:  # no permission; a null byte in the path
            return {"path": name, "problem": f"cannot be read ({error})"}
        longest = max(image.size) * min(1.0, math.sqrt(pixels / (image.width * image.height)))
        return {"path": name, **picture(image, max(1, round(longest)), QUALITY)}

    def _found(self, name: str) -> Path:
        places = [folder / name for folder in self._folders]
        return next((place for place in places if place.exists()), Path(name))

    def _example(self, example: Example, number: dict[str, int]) -> Data:
        line = example.any
        gold = line.get("gold")
        references = line.get("references")
        texts = [gold, *(references if isinstance(references, list) else [])]
        right = [text for text in texts if isinstance(text, str) and text]
        return {
            "id": str(line.get("id")),
            "kind": example.kind,
            "change": round(example.change, 4),
            "pictures": [number[path] for path in pictures_of(line)],
            "question": _shortened(str(line.get("prompt", ""))),
            "right": [_shortened(text) for text in right],
            "formula": self._formula(right[0]) if right else None,
            "boxes": boxes_of(line.get("gold_boxes")),
            "before": self._answer(example.before),
            "after": self._answer(example.after),
        }

    def _answer(self, line: Line | None) -> Data | None:
        if line is None:
            return None
        text = str(line.get("answer", ""))
        return {
            "text": _shortened(text),
            "formula": self._formula(text),
            "boxes": boxes_of(line.get("boxes")),
            "scores": {name: round(value, 4) for name, value in scores_of(line).items()},
            "stopped": line.get("stopped") is not False,
            "tokens": line.get("tokens"),
        }

    def _formula(self, text: str) -> object:
        return self._formulas.tree(text) if self._formulas else None


def boxes_of(content: object) -> list[Data]:
    """Boxes that can be drawn: `image`, `label` and `xyxy`, all numbers finite."""
    boxes = content if isinstance(content, list) else []
    return [_box(box) for box in boxes[:MOST_BOXES] if isinstance(box, dict) and _corners(box)]


def _box(box: Line) -> Data:
    label = box.get("label")
    return {
        "image": box.get("image", 0),
        "label": str(label)[:80] if label else "",
        "xyxy": [float(corner) for corner in box["xyxy"]],
    }


def _corners(box: Line) -> bool:
    corners = box.get("xyxy")
    return isinstance(corners, list) and len(corners) == 4 and _all_finite(corners)


def _all_finite(values: Iterable[object]) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} [and {len(text) - LONGEST:,} more characters]"
