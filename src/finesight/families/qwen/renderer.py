"""Model family Qwen-VL: numbered images, and special-token boxes with coordinates 0 to 999."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import (
    QWEN_VL_MAX_COORDINATE,
    SpecialToken,
    VideoSegment,
    VisualMarkers,
)
from finesight.errors import UserError
from finesight.families.qwen2_vl.renderer import Qwen2VL
from finesight.model_folder import ModelFolder
from finesight.samples.frames import ImageSize
from finesight.samples.sample import BoxPart


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVL(Qwen2VL):
    """Image markup and box format of Qwen-VL (Bai et al. 2023, arXiv 2308.12966).

    The published prompt contains the image path between `<img>` and `</img>`, padded to 256 tokens,
    whose embeddings are replaced by image features. This class uses `<imgpad>` tokens instead, so
    that the tokens do not depend on the path.
    """

    name: str = "qwen"
    uses_1d_positions: ClassVar[bool] = True
    splits_role_tokens: ClassVar[bool] = True
    box_tokens = ("<ref>", "</ref>", "<box>", "</box>")
    max_box_coordinate = QWEN_VL_MAX_COORDINATE
    token_id_keys: ClassVar[Mapping[str, str]] = {"<img>": "visual.image_start_id"}

    def visual_markers(self, kind: Literal["image", "video"], visual_number: int) -> VisualMarkers:
        """Return the markup of an image: `Picture 1: <img>`, placeholder, `</img>` and newline.

        The number is the 1-based position of the image in the conversation.
        """
        prefix = (f"Picture {visual_number}: ", SpecialToken("<img>"))
        return VisualMarkers(prefix, "<imgpad>", (SpecialToken("</img>"), "\n"))

    def read_boxes(
        self, text: str, original_size: ImageSize, resized_size: ImageSize
    ) -> list[BoxPart]:
        """Parse the boxes of an answer and scale them to pixels of the original image.

        Accepts the same deviations from the box format as `Qwen2VL.read_boxes`.
        """
        for qwen2_token, qwen_token in BOX_TOKENS.items():
            text = text.replace(qwen_token, qwen2_token)
        return Qwen2VL.read_boxes(self, text, original_size, resized_size)

    def split_video(
        self, frame_times: Sequence[float], fps: float, temporal_patch_size: int
    ) -> list[VideoSegment]:
        """Raise UserError, because Qwen-VL does not support videos."""
        raise UserError(
            f"a video of {len(frame_times)} frames",
            where="sample",
            expected="images; Qwen-VL does not support videos",
            remedy="use the frames as images, or choose a later family",
        )

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return zeros, because 1D position ids have no temporal component."""
        return np.zeros(grid_t, dtype=np.int64)


BOX_TOKENS = dict(zip(Qwen2VL.box_tokens, QwenVL.box_tokens, strict=True))
"""Special tokens of Qwen2-VL boxes, mapped to the corresponding tokens of Qwen-VL."""


def from_folder(folder: ModelFolder) -> QwenVL:
    """Create the Qwen-VL family for a model folder."""
    if not isinstance(folder.config.get("visual"), dict):
        raise UserError(
            f"visual is {folder.config.get('visual')!r:.40}: a text-only Qwen model",
            where=str(folder.path / "config.json"),
            expected="a Qwen-VL config with the vision encoder under visual",
            remedy="choose Qwen/Qwen-VL-Chat or Qwen/Qwen-VL",
        )
    return QwenVL()
