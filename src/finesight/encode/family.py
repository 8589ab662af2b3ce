"""Registry of model families, and the interface that each family implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.data.image_header import ImageSize
from finesight.encode import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from finesight.encode.family_base import (
    ImageBox,
    PredictedBox,
    PromptPiece,
    VideoSegment,
    VisualMarkers,
)
from finesight.errors import UserError
from finesight.model_folder import ModelFolder


class ModelFamily(Protocol):
    """Family-specific parts of prompt rendering and answer parsing."""

    @property
    def name(self) -> str:
        """Name of the model family: `model_type` of config.json."""

    @property
    def system_prompt(self) -> str | None:
        """System prompt of the published chat template; None if it has no system turn."""

    @property
    def has_reasoning(self) -> bool:
        """True if the model generates reasoning before its answer (see `encode.reasoning`)."""

    @property
    def uses_1d_positions(self) -> bool:
        """True if the decoder uses 1D position ids instead of M-RoPE."""

    @property
    def splits_role_tokens(self) -> bool:
        """True if role name, newline and content of a chat turn are tokenized separately."""

    @property
    def token_id_keys(self) -> Mapping[str, str]:
        """Keys of config.json (dotted paths) that store the ids of special tokens, by token.

        The renderer checks that these ids match the tokenizer.
        """

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the special tokens and text around an image or video in the prompt.

        Args:
            visual_number: 1-based number of the image or video in the conversation.
        """

    def write_boxes(self, boxes: Sequence[ImageBox]) -> list[PromptPiece]:
        """Format one or more adjacent boxes in the box format of the family."""

    def read_boxes(
        self, text: str, original_size: ImageSize, resized_size: ImageSize
    ) -> list[PredictedBox]:
        """Parse the boxes of a generated answer.

        Args:
            original_size: Size of the original image. The returned boxes are in its pixels.
        """

    def split_video(
        self, num_frames: int, fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Split a video into the segments that the prompt contains separately."""

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return the temporal position id of each frame group of a video, starting at 0."""


FAMILIES: Mapping[str, Callable[[ModelFolder], ModelFamily]] = {
    "qwen2_vl": qwen2_vl.from_folder,
    "qwen2_5_vl": qwen2_5_vl.from_folder,
    "qwen3_vl": qwen3_vl.from_folder,
    "qwen3_vl_moe": qwen3_vl.from_folder,
    "qwen": qwen_vl.from_folder,
}
"""Constructors of native families by `model_type` of config.json. Add new families here."""


def load_family(folder: ModelFolder) -> ModelFamily:
    """Create the `ModelFamily` of the model in a folder."""
    if folder.family not in FAMILIES:
        raise UserError(
            f"unsupported model family {folder.family}",
            where=str(folder.path / "config.json"),
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="choose a model of one of these families",
        )
    return FAMILIES[folder.family](folder)


def is_native(folder: ModelFolder) -> bool:
    """Return whether finesight has its own implementation of the model family."""
    return folder.family in FAMILIES
