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
"""Coordinate frame (height, width) of boxes in thousandths of the image size."""

QWEN_VL_MAX_COORDINATE = 999
"""Largest box coordinate of Qwen-VL, whose boxes are in thousandths of the image size."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token of a prompt, given by its text, for example `<|im_end|>`.

    Strings in a prompt are always tokenized as text, even if they contain a special token.
    """

    token: str


PromptPiece = str | SpecialToken


@dataclass(frozen=True, slots=True)
class VisualMarkers:
    """Prompt pieces around an image or video, and the placeholder token of its features."""

    prefix: tuple[PromptPiece, ...]
    placeholder: str
    suffix: tuple[PromptPiece, ...]


VISION_TOKEN_ID_KEYS: Mapping[str, str] = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
"""Keys of config.json with the ids of image and video tokens (Qwen2-VL and later)."""


@dataclass(frozen=True, slots=True)
class VideoSegment:
    """Consecutive frames of a video that the prompt contains as one unit.

    Attributes:
        timestamp_text: Text before the frames; empty without a timestamp.
        frame_slice: Frames of the segment.
        seconds_per_grid: Time between consecutive frame groups of the segment.
    """

    timestamp_text: str
    frame_slice: slice
    seconds_per_grid: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VLBase:
    """Base class of Qwen2-VL and later families.

    Subclasses add the box format and the temporal positions; see `encode.family.ModelFamily`.
    """

    name: str
    system_prompt: str | None = "You are a helpful assistant."
    has_reasoning: bool = False
    uses_1d_positions: bool = False
    splits_role_tokens: bool = False

    @property
    def token_id_keys(self) -> Mapping[str, str]:
        """Keys of config.json with the ids of the image and video placeholder tokens."""
        return VISION_TOKEN_ID_KEYS

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the vision start and end tokens and the placeholder of an image or video."""
        start, end = SpecialToken("<|vision_start|>"), SpecialToken("<|vision_end|>")
        return VisualMarkers((start,), f"<|{kind}_pad|>", (end,))

    def split_video(
        self, num_frames: int, fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Return one segment that contains all frames of the video."""
        return [VideoSegment("", slice(0, num_frames), temporal_patch_size / fps)]


@dataclass(frozen=True, slots=True)
class PredictedBox:
    """A bounding box parsed from a generated answer, in pixels of the original image."""

    label: str | None
    xyxy: BoxCorners


@dataclass(frozen=True, slots=True)
class ImageBox:
    """A bounding box of a sample before formatting, in pixels of the original image."""

    label: str | None
    xyxy: BoxCorners
    original_size: ImageSize
    resized_size: ImageSize


def scale_box(xyxy: BoxCorners, source_frame: ImageSize, target_frame: ImageSize) -> BoxCorners:
    """Scale box corners from one coordinate frame (height, width) to another."""
    scale_x, scale_y = target_frame[1] / source_frame[1], target_frame[0] / source_frame[0]
    x1, y1, x2, y2 = xyxy
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def round_to_frame(xyxy: BoxCorners, frame: ImageSize) -> tuple[int, int, int, int]:
    """Round box corners to integers (halves up) and clamp them to a frame (height, width)."""
    height, width = frame
    x1, y1, x2, y2 = (math.floor(value + 0.5) for value in xyxy)
    return (
        min(max(x1, 0), width),
        min(max(y1, 0), height),
        min(max(x2, 0), width),
        min(max(y2, 0), height),
    )
