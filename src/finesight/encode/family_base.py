"""Prompt pieces, box types and the base class of model families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finesight.encode.tokenized_sample import ImageSize

BoxCorners = tuple[float, float, float, float]
"""A box as left, top, right, bottom."""

FRAME_1000: ImageSize = (1000, 1000)
"""Frame of box coordinates in thousandths, independent of the image size."""

QWEN_VL_MAX_COORDINATE = 999
"""Largest box coordinate of Qwen-VL."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token by name; a string is never parsed for special tokens."""

    token: str


PromptPiece = str | SpecialToken


@dataclass(frozen=True, slots=True)
class VisualMarkers:
    """Markup before and after an image, and its placeholder token."""

    prefix: tuple[PromptPiece, ...]
    placeholder: str
    suffix: tuple[PromptPiece, ...]


VISION_TOKEN_ID_KEYS: Mapping[str, str] = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
"""config.json keys that repeat the id of a token, since Qwen2-VL."""


@dataclass(frozen=True, slots=True)
class VideoSegment:
    """Consecutive frames of a video in the prompt, with a timestamp before them.

    `seconds_per_grid` is the time between frame groups.
    """

    timestamp_text: str
    frame_slice: slice
    seconds_per_grid: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VLBase:
    """Common parts of families since Qwen2-VL, without boxes and times; see `encode.family`."""

    name: str
    system_prompt: str | None = "You are a helpful assistant."
    has_reasoning: bool = False
    uses_1d_positions: bool = False
    splits_role_tokens: bool = False

    @property
    def token_id_keys(self) -> Mapping[str, str]:
        """Placeholder tokens of images and videos."""
        return VISION_TOKEN_ID_KEYS

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the vision start and end tokens."""
        start, end = SpecialToken("<|vision_start|>"), SpecialToken("<|vision_end|>")
        return VisualMarkers((start,), f"<|{kind}_pad|>", (end,))

    def split_video(
        self, num_frames: int, fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Return one segment for the full video."""
        return [VideoSegment("", slice(0, num_frames), temporal_patch_size / fps)]


@dataclass(frozen=True, slots=True)
class PredictedBox:
    """A box parsed from an answer, in pixels of the original image."""

    label: str | None
    xyxy: BoxCorners


@dataclass(frozen=True, slots=True)
class ImageBox:
    """A box to format, in pixels of the original image."""

    label: str | None
    xyxy: BoxCorners
    original_size: ImageSize
    resized_size: ImageSize


def scale_box(xyxy: BoxCorners, source_frame: ImageSize, target_frame: ImageSize) -> BoxCorners:
    """Scale corners from one frame (height, width) to another."""
    scale_x, scale_y = target_frame[1] / source_frame[1], target_frame[0] / source_frame[0]
    x1, y1, x2, y2 = xyxy
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def round_to_frame(xyxy: BoxCorners, frame: ImageSize) -> tuple[int, int, int, int]:
    """Round corners to integers (halves up) and clamp them to the frame."""
    height, width = frame
    x1, y1, x2, y2 = (math.floor(value + 0.5) for value in xyxy)
    return (
        min(max(x1, 0), width),
        min(max(y1, 0), height),
        min(max(x2, 0), width),
        min(max(y2, 0), height),
    )
