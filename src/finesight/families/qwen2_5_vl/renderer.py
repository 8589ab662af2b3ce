"""Renderer of Qwen2.5-VL: JSON boxes in pixels of the resized image.

Temporal positions of video tokens are proportional to time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import ModelFamily
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.frames import ImageSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen25VL(ModelFamily):
    """Box format and temporal positions of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923).

    `tokens_per_second` is the number of temporal positions per second of video.
    """

    tokens_per_second: float = 2
    name: str = "qwen2_5_vl"
    max_box_coordinate = 99_999

    def box_frame(self, resized_size: ImageSize) -> ImageSize:
        """Return the size of the resized image, because coordinates are its pixels."""
        return resized_size

    def temporal_position_ids(self, grid_t: int, seconds_per_grid: float) -> NDArray[np.int64]:
        """Return the temporal position of each frame group, rounded down.

        The computation uses fp32 and the operation order of the published code, so that rounding is
        identical.
        """
        times = np.arange(grid_t, dtype=np.float32) * np.float32(seconds_per_grid)
        return (times * np.float32(self.tokens_per_second)).astype(np.int64)

    @classmethod
    def from_folder(cls, folder: ModelFolder) -> Qwen25VL:
        """Create the family with `tokens_per_second` from config.json."""
        vision = folder.config.get("vision_config")
        value = vision.get("tokens_per_second", 2) if isinstance(vision, dict) else 2
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UserError(
                f"vision_config.tokens_per_second is {value!r}",
                where=str(folder.path / "config.json"),
                expected="a positive number",
                remedy="use the config.json of the published model",
            )
        return cls(tokens_per_second=value)
