"""Crops of the zoom tool, in the coordinate frame of the model family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from PIL import Image
from pydantic import Field

from finesight.encode.family import parse_corners
from finesight.samples.frames import ImageSize, rescale, smart_resize
from finesight.settings.config import PixelRange

MIN_SIDE = 32
"""Side in pixels to which smaller sides of a crop grow."""

MIN_PIXELS = 256 * MIN_SIDE * MIN_SIDE
"""Number of pixels to which smaller crops are resized."""

MAX_PIXELS = 1 << 24

MAX_ASPECT_RATIO = 100


class ImageZoomInTool:
    """Environment with the tool `image_zoom_in_tool`, without an own reward."""

    def reset(self, images: Sequence[Image.Image], frames: Sequence[ImageSize]) -> None:
        """Start an episode.

        Args:
            images: Images of the question.
            frames: Height and width of the coordinate frame of the boxes of each image.
        """
        self._images = images
        self._frames = frames

    def image_zoom_in_tool(
        self,
        bbox_2d: Annotated[list[float], Field(min_length=4, max_length=4)],
        label: str,
        img_idx: float,
    ) -> str | Image.Image:
        """Zoom in on a region of an image: crop the region and show it enlarged.

        Args:
            bbox_2d: Box of the region as [x1, y1, x2, y2], from its upper left to its lower right
                corner.
            label: Name of the object in the region.
            img_idx: Index of the image in the question, from 0.
        """
        if img_idx not in range(len(self._images)):
            return f"Error: img_idx is {img_idx:g}, but there are {len(self._images)} images"
        image = self._images[int(img_idx)]
        corners = parse_corners(bbox_2d)
        if corners is None:
            return "Error: bbox_2d has numbers that are not finite"
        frame = self._frames[int(img_idx)]
        x1, y1, x2, y2 = rescale(corners, frame, (image.height, image.width))
        left, right = grow_side(x1, x2, image.width)
        top, bottom = grow_side(y1, y2, image.height)
        if left >= right or top >= bottom:
            return "Error: bbox_2d is empty or outside of the image"
        width = right - left
        height = bottom - top
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            return f"Error: a side of bbox_2d is over {MAX_ASPECT_RATIO} times the other"
        return enlarge(image.crop((left, top, right, bottom)))


def grow_side(start: float, stop: float, size: int) -> tuple[int, int]:
    """Return the side of a crop in whole pixels, within the image and of at least `MIN_SIDE`.

    A side that is empty or outside of the image stays empty.

    Args:
        size: Size of the image in pixels, which may be less than `MIN_SIDE`.
    """
    start = max(start, 0)
    stop = min(stop, size)
    if start >= stop:
        return 0, 0
    first = math.floor(start)
    last = math.ceil(stop)
    missing = min(MIN_SIDE, size) - (last - first)
    if missing > 0:
        first = max(0, min(first - missing // 2, size - min(MIN_SIDE, size)))
        last = first + min(MIN_SIDE, size)
    return first, last


def enlarge(crop: Image.Image) -> Image.Image:
    """Resize a crop to multiples of `MIN_SIDE`, with at least `MIN_PIXELS` pixels."""
    limits = PixelRange(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    height, width = smart_resize((crop.height, crop.width), limits, MIN_SIDE)
    return crop.resize((width, height), Image.Resampling.BICUBIC)
