"""The families that can be encoded, each in its own file, and what a family must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from finesight.encode.dialect import Box, Marks, Piece, PlacedBox, Shot
from finesight.encode.encoded import Size
from finesight.errors import UserError
from finesight.hub import ModelFolder


class Family(Protocol):
    """What differs between families on the way from a sample to tokens and back."""

    @property
    def name(self) -> str:
        """The `model_type` of the family's configuration."""

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of the published chat template; None for no system turn."""

    @property
    def thinks(self) -> bool:
        """Whether an answer begins with a thought (`encode.thought`)."""

    @property
    def flat(self) -> bool:
        """Whether positions count tokens, those of pictures included, and know no rows, columns and
        times."""

    @property
    def apart(self) -> bool:
        """Whether a turn's role, the newline after it and its content are each tokenised apart."""

    @property
    def id_keys(self) -> Mapping[str, str]:
        """Tokens whose ids config.json says again, and under which key, its sections before it."""

    def marks(self, kind: Literal["image", "video"], number: int) -> Marks:
        """What stands around the `number`-th picture or video of a conversation, from 1."""

    def write_boxes(self, boxes: Sequence[PlacedBox]) -> list[Piece]:
        """A run of adjacent boxes, at least one, in the family's dialect."""

    def read_boxes(self, text: str, original: Size, resized: Size) -> list[Box]:
        """The boxes of an answer, special tokens included, in pixels of the original picture."""

    def shots(self, frames: int, fps: float, depth: int) -> list[Shot]:
        """How the frames of a video, taken `fps` a second, stand among the tokens; `depth` of them
        become one group of patches."""

    def time_steps(self, groups: int, seconds: float) -> NDArray[np.int64]:
        """Temporal positions, from 0, of groups of frames that lie `seconds` apart."""


FAMILIES: Mapping[str, Callable[[ModelFolder], Family]] = {
    "qwen2_vl": qwen2_vl.from_folder,
    "qwen2_5_vl": qwen2_5_vl.from_folder,
    "qwen3_vl": qwen3_vl.from_folder,
    "qwen3_vl_moe": qwen3_vl.from_folder,
    "qwen": qwen_vl.from_folder,
}
"""By `model_type` of config.json: a new family is a file and a row here."""


def family_of(folder: ModelFolder) -> Family:
    """The family that a folder's config.json names. Raises UserError for any but FAMILIES."""
    if folder.family not in FAMILIES:
        raise UserError(
            f"a model of the family {folder.family}",
            where=str(folder.path / "config.json"),
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="choose a model of these families",
        )
    return FAMILIES[folder.family](folder)
