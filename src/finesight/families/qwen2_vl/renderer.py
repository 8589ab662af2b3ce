"""Renderer of Qwen2-VL: boxes of special tokens in thousandths of the image size.

The temporal position of a video token is the index of its frame group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import (
    ModelFamily,
    PromptPiece,
    SpecialToken,
)
from finesight.model_folder import ModelFolder
from finesight.samples.boxes import find_offsets, iter_json_boxes, iter_json_values
from finesight.samples.frames import FRAME_1000, ImageSize, ImageSizes, rescale, round_to_size
from finesight.samples.sample import BoxPart, create_region

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_BOX = re.compile(
    r"(?:<\|object_ref_start\|>(?P<label>(?:(?!<\|object_ref_).)*)<\|object_ref_end\|>\s*)?"
    # Each run of spaces is read once, from its start.
    rf"(?:(?:<\|box_start\|>)?(?:(?<!\s)\s*+|(?<=\s)){_POINT}\s*,\s*{_POINT}\s*(?:<\|box_end\|>)?"
    rf"|<\|box_start\|>\s*{_POINT}\s*<\|box_end\|>)",
    re.DOTALL,
)
"""Box, or a point between both tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VL(ModelFamily):
    """Box format and temporal positions of Qwen2-VL (Wang et al. 2024, arXiv 2409.12191)."""

    name: str = "qwen2_vl"
    box_tokens = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")

    def write_boxes(
        self, boxes: Sequence[BoxPart], images: Sequence[ImageSizes]
    ) -> list[PromptPiece]:
        """Format boxes with special tokens in thousandths of the image size (section 2.2.1).

        A point is a single pair, as in UI-TARS and ms-swift.
        """
        ref, ref_end, start, end = map(SpecialToken, self.box_tokens or ())
        pieces: list[PromptPiece] = []
        for box in boxes:
            if box.label is not None:
                pieces += [ref, box.label, ref_end]
            original_size = images[box.image].original
            corners = round_to_size(rescale(box.xyxy, original_size, FRAME_1000), FRAME_1000)
            x1, y1, x2, y2 = (min(corner, self.max_box_coordinate) for corner in corners)
            second = "" if box.is_point else f",({x2},{y2})"
            pieces += [start, f"({x1},{y1}){second}", end]
        return pieces

    def read_boxes(
        self, text: str, original_size: ImageSize, resized_size: ImageSize
    ) -> list[BoxPart]:
        """Parse the boxes of an answer and scale them to pixels of the original image.

        Missing special tokens, spaces and fractions are accepted. An unlabeled box directly after
        another box gets the label of that box, because the family writes a shared label once. A box
        in a string of JSON gets the label in the JSON.
        """
        boxes: list[BoxPart] = []
        json_labels = _iter_json_labels(text)
        offsets = {one for one in find_offsets(text) if text[one : one + 1] == '"'}
        label = None
        end = 0
        for match in _BOX.finditer(text):
            is_json = match.start() - 1 in offsets
            if offsets and not is_json and "<|box_start|>" not in match[0]:
                continue
            is_adjacent = boxes and not text[end : match.start()].strip()
            if is_json:
                label = next(json_labels, None)
            elif match["label"] is not None:
                label = match["label"]
            elif not is_adjacent:
                label = None
            end = match.end()
            numbers = [float(number) for number in match.groups()[1:] if number is not None]
            x1, y1, x2, y2 = (*numbers, *numbers)[:4]
            corners = rescale((x1, y1, x2, y2), FRAME_1000, original_size)
            # Degenerate completions may contain coordinates that overflow a float.
            if all(map(math.isfinite, corners)):
                boxes.append(create_region(corners, label, is_point=len(numbers) == 2))
        return boxes

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return the index of each frame group, independent of the frame rate."""
        return np.arange(grid_t, dtype=np.int64)


def _iter_json_labels(text: str) -> Iterator[str | None]:
    """Yield the labels of boxes with special tokens within JSON."""
    for found in iter_json_values(text, "{"):
        for box in iter_json_boxes(found.value):
            if box.is_tagged:
                yield box.label


def from_folder(folder: ModelFolder) -> Qwen2VL:
    """Create the Qwen2-VL family, which has no model-specific settings."""
    return Qwen2VL()
