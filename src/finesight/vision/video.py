"""Videos as the pictures of their frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finesight.data.headers import DamagedPicture, picture_size
from finesight.vision.patches import PatchGeometry, to_patches
from finesight.vision.picture import open_picture
from finesight.vision.resize import Size


def frame_size(files: Sequence[Path]) -> Size:
    """Height and width that all frames share, from their headers.

    Raises DamagedPicture for a frame that cannot be used or differs in size from the first.
    """
    assert files, "a video without frames"
    first = picture_size(files[0])
    for file in files[1:]:
        size = picture_size(file)
        if size != first:
            raise DamagedPicture(
                f"{size[1]} x {size[0]} pixels, but the first frame has {first[1]} x {first[0]}",
                where=str(file),
                expected="frames of one size in a video",
                remedy="extract the frames again, all at one size",
            )
    return first


def video_patches(files: Sequence[Path], size: Size, geometry: PatchGeometry) -> NDArray[np.uint8]:
    """The frames resized to `size` and cut into patches, uint8 [N, D], in pairs along time.

    The recipe's picture rule, or the family's, applies to each frame as to a picture; the last
    frame is repeated where their number is odd, as the published video processor does.
    """
    return to_patches([open_picture(file) for file in files], size, geometry)
