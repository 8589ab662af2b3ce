"""Qwen3-VL: boxes as JSON in thousandths of the picture, times of a video as text, thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode import json_dialect
from finesight.encode.dialect import THOUSANDTHS, Box, Piece, PlacedBox, Shot, SinceQwen2VL
from finesight.encode.encoded import Size
from finesight.hub import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VL(SinceQwen2VL):
    """Qwen3-VL (Bai et al. 2025, Qwen3-VL Technical Report), dense or with experts: dialect of
    boxes and rule of time.

    `thinks` tells the Thinking edition, whose answers begin with a thought, from Instruct.
    """

    name: str = "qwen3_vl"
    system_prompt: str | None = None

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """JSON in whole thousandths of the picture."""
        return json_dialect.write(boxes, lambda box: THOUSANDTHS)

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """Every box of an answer, in pixels of the original picture."""
        return json_dialect.read(text, THOUSANDTHS, original)

    def shots(self, frames: int, fps: float, depth: int) -> list[Shot]:
        """One for each group of `depth` frames, the time of its middle in front; the last frame
        stands for those that a group lacks."""
        shots = []
        for first in range(0, frames, depth):
            last = min(first + depth, frames) - 1
            # The sum and its order as published, so that halves round alike.
            middle = (first / fps + last / fps) / 2
            shots.append(Shot(f"<{middle:.1f} seconds>", slice(first, last + 1), depth / fps))
        return shots

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """Every group is a picture of its own, at the position where it stands."""
        return np.zeros(groups, dtype=np.int64)


def from_folder(folder: ModelFolder) -> Qwen3VL:
    """The edition is told by the chat template, which opens a thought or does not."""
    return Qwen3VL(thinks="<think>" in folder.chat_template, name=folder.family)
