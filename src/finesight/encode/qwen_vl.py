"""The first Qwen-VL: numbered pictures, boxes between its own tokens in thousandths below 1000."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finesight.encode.dialect import (
    BELOW_1000,
    THOUSANDTHS,
    Box,
    Marks,
    Piece,
    PlacedBox,
    Shot,
    Special,
    in_whole_numbers,
    scaled,
)
from finesight.encode.encoded import Size
from finesight.encode.qwen2_vl import Qwen2VL
from finesight.errors import UserError
from finesight.hub import ModelFolder

TOKENS = {
    "<|object_ref_start|>": "<ref>",
    "<|object_ref_end|>": "</ref>",
    "<|box_start|>": "<box>",
    "<|box_end|>": "</box>",
}
"""The marks of Qwen2-VL's boxes, and those of this family."""


@dataclass(frozen=True, slots=True)
class QwenVL:
    """Qwen-VL (Bai et al. 2023, arXiv 2308.12966): what stands around pictures, and its boxes.

    A prompt is published as text, with a picture's path between `<img>` and `</img>`; the path's
    bytes stand in 256 places that the picture's features then take. Here the places hold
    `<imgpad>`, whatever the picture's name.
    """

    name: str = "qwen"
    system_prompt: str | None = "You are a helpful assistant."
    thinks: bool = False
    flat: bool = True
    apart: bool = True
    id_keys: Mapping[str, str] = field(default_factory=lambda: {"<img>": "visual.image_start_id"})

    def marks(self, kind: Literal["image", "video"], number: int) -> Marks:
        """`Picture 1: <img>`, the places, `</img>` and a newline; the number counts the pictures of
        the conversation."""
        before = (f"Picture {number}: ", Special("<img>"))
        return Marks(before, "<imgpad>", (Special("</img>"), "\n"))

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """Each box as its label between the reference tokens, when it has one, and its corners,
        rounded to thousandths of the picture and below 1000, between the box tokens."""
        pieces: list[Piece] = []
        for box in boxes:
            if box.label is not None:
                pieces += [Special("<ref>"), box.label, Special("</ref>")]
            corners = in_whole_numbers(scaled(box.xyxy, box.original, THOUSANDTHS), THOUSANDTHS)
            x1, y1, x2, y2 = (min(corner, BELOW_1000) for corner in corners)
            pieces += [Special("<box>"), f"({x1},{y1}),({x2},{y2})", Special("</box>")]
        return pieces

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """Every box of an answer, in pixels of the original picture; as lenient as Qwen2-VL's."""
        for theirs, ours in TOKENS.items():
            text = text.replace(ours, theirs)
        return Qwen2VL().read_boxes(text, original, resized)

    def shots(self, frames: int, fps: float, depth: int) -> list[Shot]:
        """The family knows no videos: raises UserError."""
        raise UserError(
            f"a video of {frames} frames",
            where="sample",
            expected="pictures: the first Qwen-VL was never taught videos",
            remedy="give the frames as pictures, or choose a later family",
        )

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """One for a picture; positions do not read it."""
        return np.zeros(groups, dtype=np.int64)


def from_folder(folder: ModelFolder) -> QwenVL:
    """The same for every model. Raises UserError for the language model without pictures, which
    names the same family."""
    if not isinstance(folder.config.get("visual"), dict):
        raise UserError(
            f"visual is {folder.config.get('visual')!r:.40}: a Qwen that reads text alone",
            where=str(folder.path / "config.json"),
            expected="a Qwen-VL, with its vision tower under visual",
            remedy="choose Qwen/Qwen-VL-Chat or Qwen/Qwen-VL",
        )
    return QwenVL()
