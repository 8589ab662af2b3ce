"""Reading of videos that are stored as sequences of frame images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finesight.data.image_header import CorruptImageError, read_image_size
from finesight.vision.image_decoding import load_image
from finesight.vision.patches import PatchConfig, patchify
from finesight.vision.resize import ImageSize


def get_frame_size(files: Sequence[Path]) -> ImageSize:
    """Return the common height and width of all frames of a video.

    Only image headers are read.

    Raises:
        CorruptImageError: A frame cannot be used, or the frame sizes differ.
    """
    assert files, "the video has no frames"
    first_size = read_image_size(files[0])
    for file in files[1:]:
        size = read_image_size(file)
        if size != first_size:
            raise CorruptImageError(
                f"{size[1]} x {size[0]} pixels, but the first frame has"
                f" {first_size[1]} x {first_size[0]}",
                where=str(file),
                expected="frames of equal size",
                remedy="extract the frames again at one size",
            )
    return first_size


def patchify_video(
    files: Sequence[Path], size: ImageSize, config: PatchConfig
) -> NDArray[np.uint8]:
    """Resize the frames of a video and split them into patches, uint8 [N, D].

    Each patch spans several frames. As in the reference video processor, the last frame is repeated
    if the last group of frames is incomplete.
    """
    return patchify([load_image(file) for file in files], size, config)
