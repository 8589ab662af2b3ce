"""Qwen2-VL: boxes between special tokens, in thousandths of the picture; time in whole steps."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode.dialect import (
    THOUSANDTHS,
    Box,
    Piece,
    PlacedBox,
    SinceQwen2VL,
    Special,
    in_whole_numbers,
    scaled,
)
from finesight.encode.encoded import Size
from finesight.hub import ModelFolder

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_BOX = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>(?:(?!<\|object_ref_).)*)<\|object_ref_end\|>\s*)?"
    rf"(?:<\|box_start\|>)?\s*{_POINT}\s*,\s*{_POINT}\s*(?:<\|box_end\|>)?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VL(SinceQwen2VL):
    """Qwen2-VL (Wang et al. 2024, arXiv 2409.12191): dialect of boxes and rule of time."""

    name: str = "qwen2_vl"

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """Each box as its label between the reference tokens, when it has one, and its corners,
        rounded to thousandths of the picture, between the box tokens (section 2.2.1)."""
        pieces: list[Piece] = []
        for box in boxes:
            if box.label is not None:
                pieces += [Special("<|object_ref_start|>"), box.label]
                pieces += [Special("<|object_ref_end|>")]
            corners = scaled(box.xyxy, box.original, THOUSANDTHS)
            x1, y1, x2, y2 = in_whole_numbers(corners, THOUSANDTHS)
            pieces += [Special("<|box_start|>"), f"({x1},{y1}),({x2},{y2})"]
            pieces += [Special("<|box_end|>")]
        return pieces

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """Every box of an answer, in pixels of the original picture.

        Lenient: the tokens may be missing, spaces and fractions are taken. A box that directly
        follows another without a label of its own shares that one's: the family names several
        objects of a kind once.
        """
        boxes: list[Box] = []
        label, end = None, 0
        for match in _BOX.finditer(text):
            adjacent = boxes and not text[end : match.start()].strip()
            label = match["label"] if match["label"] is not None else label if adjacent else None
            end = match.end()
            x1, y1, x2, y2 = (float(number) for number in match.groups()[1:])
            corners = scaled((x1, y1, x2, y2), THOUSANDTHS, original)
            # A model that repeats a digit for ever writes numbers beyond what floats hold.
            if all(map(math.isfinite, corners)):
                boxes.append(Box(label, corners))
        return boxes

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """The temporal position of each group of frames: its number, whatever time it spans."""
        return np.arange(groups, dtype=np.int64)


def from_folder(folder: ModelFolder) -> Qwen2VL:
    """The same for every model."""
    return Qwen2VL()
