"""Examples as data of a page: thumbnails, boxes, and formulas ready to be drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from finesight.data.headers import MAX_PIXELS, DamagedPicture, picture_size
from finesight.report.examples import Example, pictures_of, scores_of
from finesight.report.figures import named
from finesight.report.formulas import Formulas
from finesight.report.language import say
from finesight.report.picture import picture
from finesight.report.record import Line, is_finite
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

LARGE = 16_000_000
"""Pixels above which pictures are decoded one after another: every thread keeps the memory of the
largest that it had, which in a process that goes on training are gigabytes for nothing."""

LONGEST_ID = 200
"""Characters of an id that are shown."""

Data = dict[str, Any]

Thumbnails = dict[tuple[str, int], Data]
"""By the path of the picture, and the pixels that they were made for."""


class Gallery:
    """Makes data of examples; a picture that several of them ask about is held once.

    `folders` are tried in turn for paths that are not absolute. `formulas` is None where answers
    are no formulas. `known` are the thumbnails of an earlier page, and then those of this one: they
    are not made again.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        formulas: Formulas | None,
        known: Thumbnails | None = None,
    ) -> None:
        self._folders, self._formulas = folders, formulas
        self._known: Thumbnails = {} if known is None else known

    def data(self, examples: Sequence[Example]) -> Data:
        """`examples`, and the `pictures` that they name by number."""
        pictures, number = self.pictures([one.any for one in examples])
        return {
            "pictures": pictures,
            "examples": [self._example(one, number) for one in examples],
        }

    def pictures(self, lines: Iterable[Line]) -> tuple[list[Data | None], dict[str, int]]:
        """Thumbnails of all pictures that these ask about, and their numbers by path."""
        paths = dict.fromkeys(path for line in lines for path in pictures_of(line))
        number = {path: i for i, path in enumerate(paths)}
        pixels = min(MOST_PIXELS, max(LEAST_PIXELS, ALL_PIXELS // max(1, len(paths))))
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(partial(self._once, pixels, LARGE), paths))
        shown = [
            self._once(pixels, MAX_PIXELS, path) if one is None else one
            for path, one in zip(paths, found, strict=True)
        ]
        self._known.clear()
        self._known |= {(one["path"], pixels): one for one in shown if one and "src" in one}
        return shown, number

    def _once(self, pixels: int, largest: int, name: str) -> Data | None:
        return self._known.get((name, pixels)) or self._picture(pixels, largest, name)

    def _picture(self, pixels: int, largest: int, name: str) -> Data | None:
        """A thumbnail of so many pixels at most, or why there is none. None, at once, of a picture
        that has more than `largest`."""
        try:
            path = self._found(name)
            height, width = picture_size(path)
            if height * width > largest:
                return None
            scale = min(1.0, math.sqrt(pixels / (width * height)))
            longest, shortest = (max(1, round(f(width, height) * scale)) for f in (max, min))
            shown = picture(open_picture(path, at_least=shortest), longest, QUALITY)
        except DamagedPicture as error:
            return {"path": name, "problem": error.what}
        except (OSError, ValueError) as error:  # no permission; a null byte in the path
            return {"path": name, "problem": f"cannot be read ({error})"}
        return {"path": name, "src": shown["src"], "width": width, "height": height}

    def _found(self, name: str) -> Path:
        places = [folder / name for folder in self._folders]
        return next((place for place in places if place.exists()), Path(name))

    def _example(self, example: Example, number: dict[str, int]) -> Data:
        return {
            **self.asked(example.any, number),
            "kind": example.kind,
            "change": round(example.change, 4),
            "before": self.answer(example.before),
            "after": self.answer(example.after),
        }

    def asked(self, line: Line, number: dict[str, int]) -> Data:
        """What was asked, and what would have been right."""
        gold = line.get("gold")
        references = line.get("references")
        texts = [gold, *(references if isinstance(references, list) else [])]
        right = [text for text in texts if isinstance(text, str) and text]
        return {
            "id": _shortened(str(line.get("id")), LONGEST_ID),
            "pictures": [number[path] for path in pictures_of(line)],
            "question": _shortened(str(line.get("prompt", ""))),
            "right": [_shortened(text) for text in right],
            "formula": self._formula(right[0]) if right else None,
            "boxes": boxes_of(line.get("gold_boxes")),
        }

    def answer(self, line: Line | None) -> Data | None:
        """What was answered, and its scores."""
        if line is None:
            return None
        text, stopped = str(line.get("answer", "")), line.get("stopped") is not False
        tokens = line.get("tokens")
        return {
            "text": _shortened(text),
            # What was cut off is no formula, but the beginning of one or of no end of words.
            "formula": self._formula(text) if stopped else None,
            "boxes": boxes_of(line.get("boxes")),
            "scores": {named(name): round(value, 4) for name, value in scores_of(line).items()},
            "stopped": stopped,
            "tokens": tokens if isinstance(tokens, int) else None,
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
    return all(map(is_finite, values))


def _shortened(text: str, longest: int = LONGEST) -> str:
    if len(text) <= longest:
        return text
    return say("{} [and {:,} more characters]", text[:longest], len(text) - longest)
