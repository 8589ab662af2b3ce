"""Qwen2.5-VL: boxes as JSON in pixels of the resized picture; time in shares of a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode import json_dialect
from finesight.encode.dialect import Box, Piece, PlacedBox, SinceQwen2VL
from finesight.encode.encoded import Size
from finesight.errors import UserError
from finesight.hub import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen25VL(SinceQwen2VL):
    """Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923): dialect of boxes and rule of time.

    `tokens_per_second` is how many temporal positions pass in a second of video.
    """

    tokens_per_second: float = 2
    name: str = "qwen2_5_vl"

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """JSON in whole pixels of the picture as the model sees it, after resizing."""
        return json_dialect.write(boxes, lambda box: box.resized)

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """Every box of an answer, in pixels of the original picture."""
        return json_dialect.read(text, resized, original)

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """The temporal position of each group of frames, `seconds` apart, rounded down.

        In single precision and in the published order of the products: a step of a third of a
        second lands on the same side of a whole number as in the original.
        """
        at = np.arange(groups, dtype=np.float32) * np.float32(seconds)
        return (at * np.float32(self.tokens_per_second)).astype(np.int64)


def from_folder(folder: ModelFolder) -> Qwen25VL:
    """With what the configuration says of time. Raises UserError where it says no number."""
    vision = folder.config.get("vision_config")
    value = vision.get("tokens_per_second", 2) if isinstance(vision, dict) else 2
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(
            f"vision_config.tokens_per_second is {value!r}",
            where=str(folder.path / "config.json"),
            expected="a number above 0",
            remedy="take the config.json of the published model",
        )
    return Qwen25VL(tokens_per_second=value)
