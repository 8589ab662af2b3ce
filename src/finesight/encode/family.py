"""Registry of model families, and the interface that each family implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from finesight.encode.family_base import (
    ImageBox,
    PredictedBox,
    PromptPiece,
    VideoSegment,
    VisualMarkers,
)
from finesight.encode.tokenized_sample import ImageSize
from finesight.errors import UserError
from finesight.model_folder import ModelFolder


class ModelFamily(Protocol):
    """Family-specific parts of prompt rendering and answer parsing."""

    @property
    def name(self) -> str:
        """`model_type` of the model config."""

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of the published chat template; None for no system turn."""

    @property
    def has_reasoning(self) -> bool:
        """True if completions start with reasoning (see `encode.reasoning`)."""

    @property
    def uses_1d_positions(self) -> bool:
        """True for 1D position ids instead of M-RoPE."""

    @property
    def splits_role_tokens(self) -> bool:
        """True if role, newline and content of a turn are tokenized separately."""

    @property
    def token_id_keys(self) -> Mapping[str, str]:
        """Dotted config.json keys that repeat the id of a token, by token."""

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the markup around the image or video with this 1-based number."""

    def write_boxes(self, boxes: Sequence[ImageBox]) -> list[PromptPiece]:
        """Format adjacent boxes (at least one) in the format of the family."""

    def read_boxes(
        self, text: str, original_size: ImageSize, resized_size: ImageSize
    ) -> list[PredictedBox]:
        """Parse the boxes of an answer with special tokens, in pixels of the original image."""

    def split_video(
        self, num_frames: int, fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Split a video with `fps` frames per second into segments of the prompt.

        Each patch covers `temporal_patch_size` frames.
        """

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return temporal position ids, from 0, of frame groups `seconds_per_grid` apart."""


FAMILIES: Mapping[str, Callable[[ModelFolder], ModelFamily]] = {
    "qwen2_vl": qwen2_vl.from_folder,
    "qwen2_5_vl": qwen2_5_vl.from_folder,
    "qwen3_vl": qwen3_vl.from_folder,
    "qwen3_vl_moe": qwen3_vl.from_folder,
    "qwen": qwen_vl.from_folder,
}
"""Constructors by `model_type` of config.json. Add new families here."""


def load_family(folder: ModelFolder) -> ModelFamily:
    """Create the family of a model folder.

    Raises:
        UserError: The family is not supported.
    """
    if folder.family not in FAMILIES:
        raise UserError(
            f"unsupported model family {folder.family}",
            where=str(folder.path / "config.json"),
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="choose a model of one of these families",
        )
    return FAMILIES[folder.family](folder)
