"""Model family Qwen3-VL: JSON boxes in thousandths of the image size.

Videos have text timestamps, and Thinking models generate reasoning before the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode import family
from finesight.encode.family import ModelFamily, VideoSegment
from finesight.model_folder import ModelFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3VL(ModelFamily):
    """Box format and video timestamps of Qwen3-VL models, dense or MoE.

    See the Qwen3-VL Technical Report (Bai et al. 2025). `has_reasoning` is True for Thinking
    models.
    """

    name: str = "qwen3_vl"
    system_prompt: str | None = None
    limits_video_pixels = True

    def sample_frames(
        self, num_frames: int, video_fps: float, fps: float, temporal_patch_size: int
    ) -> list[int]:
        """Return evenly spaced indices that include the first and the last frame."""
        count = max(int(num_frames / video_fps * fps), family.MIN_SAMPLED_FRAMES)
        count = min(count, family.MAX_SAMPLED_FRAMES, num_frames)
        indices: list[int] = np.linspace(0, num_frames - 1, count).round().astype(int).tolist()
        return indices

    def split_video(
        self, frame_times: Sequence[float], fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Return one segment per frame group, with the timestamp of the middle of the group.

        An incomplete last group is padded with the last frame.
        """
        segments = []
        for first_frame in range(0, len(frame_times), temporal_patch_size):
            last_frame = min(first_frame + temporal_patch_size, len(frame_times)) - 1
            # Same order of operations as published, for identical rounding of halves.
            middle = (frame_times[first_frame] + frame_times[last_frame]) / 2
            segments.append(
                VideoSegment(
                    f"<{middle:.1f} seconds>",
                    slice(first_frame, last_frame + 1),
                    temporal_patch_size / fps,
                )
            )
        return segments

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return zeros, because each frame group is a separate segment with a text timestamp."""
        return np.zeros(grid_t, dtype=np.int64)


def from_folder(folder: ModelFolder) -> Qwen3VL:
    """Create the Qwen3-VL family; a chat template with `<think>` marks a Thinking model."""
    return Qwen3VL(has_reasoning="<think>" in folder.chat_template, name=folder.family)
