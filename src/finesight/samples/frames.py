"""Coordinate frames of boxes: order of the values, and size of the image in their unit.

All conversions between frames are in this module. The formulas apply to single values, and
elementwise to arrays. Sizes of images are (height, width), after EXIF rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from finesight.settings.config import PixelRange

ImageSize = tuple[int, int]
"""Height and width in pixels."""

FRAME_1000: ImageSize = (1000, 1000)
"""Coordinate frame (height, width) of boxes in thousandths of the image size."""


class ImageSizes(NamedTuple):
    """Height and width of an image in its file, and as a model receives it."""

    original: ImageSize
    resized: ImageSize


Floats = NDArray[np.float64]

Box = tuple[float, float, float, float]
"""Two corners of a box: x1, y1, x2, y2."""

Order = Literal["xyxy", "xywh", "cxcywh", "yxyx"]
"""Order of box coordinates: two corners, corner and size, center and size, or corners y first."""

ORDERS: tuple[Order, ...] = get_args(Order)

Unit = Literal["pixel", "1", "100", "1000", "resized"]
"""Coordinate units: pixels of the original image, image sides scaled to 1, 100 or 1000, or pixels
of the image resized with the published limits of Qwen2.5-VL, whose answers contain such boxes."""

FrameBase = Literal[
    "image", "stored", "resized", "fixed", "factor", "longest", "shortest", "pixels"
]

BOX_DECIMALS = 6
"""Digits of converted coordinates in pixels, without the noise of floating-point operations."""

RESIZE_LIMITS = PixelRange(min_pixels=3136, max_pixels=12845056)
"""Limits of the published Qwen2.5-VL models, which round sides to multiples of 28."""


def to_corners(order: Order, coordinates: Any) -> tuple[Any, Any, Any, Any]:
    """Return the two corners x1, y1, x2, y2 of four coordinates, in the same unit.

    Args:
        coordinates: Four values, or four arrays of the same shape.
    """
    a, b, c, d = coordinates
    if order == "xywh":
        return a, b, a + c, b + d
    if order == "cxcywh":
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    if order == "yxyx":
        return b, a, d, c
    return a, b, c, d


def rescale(xyxy: Box, source_size: tuple[float, float], target_size: tuple[float, float]) -> Box:
    """Scale box corners from an image of one size (height, width) to another."""
    source_height, source_width = source_size
    target_height, target_width = target_size
    scale_x = target_width / source_width
    scale_y = target_height / source_height
    x1, y1, x2, y2 = xyxy
    return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y


def round_to_size(xyxy: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round box corners to integers (halves up) and clamp them to a size (height, width)."""
    height, width = size
    x1, y1, x2, y2 = (math.floor(value + 0.5) for value in xyxy)
    return _clamp(x1, width), _clamp(y1, height), _clamp(x2, width), _clamp(y2, height)


def _clamp(value: int, limit: int) -> int:
    return min(max(value, 0), limit)


def divide_by_size(corners: Floats, height: Floats | float, width: Floats | float) -> Floats:
    """Divide the corners of boxes [N, 4] by the size of their images [N]."""
    sides: Floats = np.stack(np.broadcast_arrays(width, height, width, height), axis=-1)
    return corners / sides


def to_corner_table(order: Order, coordinates: Floats) -> Floats:
    """Convert boxes [..., 4] in an order to two corners in the same units."""
    corners: Floats = np.stack(to_corners(order, np.moveaxis(coordinates, -1, 0)), axis=-1)
    return corners


def apply_exif_orientation(boxes: Floats, orientation: NDArray[np.int_]) -> Floats:
    """Rotate boxes of stored images by the EXIF orientation (Exif 2.32, tag 0x0112).

    Args:
        boxes: Normalized corners in the stored image, [N, 4].
        orientation: EXIF orientation of each image, [N].
    """
    # Orientations 5 to 8 swap the axes. Afterwards, 2, 3, 6 and 7 flip x, and 3, 4, 7 and 8 flip y.
    swaps_axes = orientation >= 5
    x1, y1, x2, y2 = np.where(swaps_axes, boxes.T[[1, 0, 3, 2]], boxes.T)
    flips_x = np.isin(orientation, (2, 3, 6, 7))
    flips_y = np.isin(orientation, (3, 4, 7, 8))
    left = np.where(flips_x, 1 - x2, x1)
    right = np.where(flips_x, 1 - x1, x2)
    top = np.where(flips_y, 1 - y2, y1)
    bottom = np.where(flips_y, 1 - y1, y2)
    return np.stack((left, top, right, bottom), axis=1)


@dataclass(frozen=True, slots=True)
class BoxFrame:
    """Coordinate frame in which boxes may have been annotated.

    Attributes:
        order: Order of the coordinates.
        base: What `width` and `height` are, from which the size of each image in the unit of the
            coordinates follows:

            - image: The image itself, after EXIF rotation.
            - stored: The image before EXIF rotation.
            - resized: The image as Qwen2.5-VL resizes it, see `Unit`.
            - fixed: `width` x `height` for all images.
            - factor: The image scaled by the factor `width`.
            - longest, shortest, pixels: A resized image of the same aspect ratio whose longest
              side, shortest side, or square root of the pixel count is `width`.
        is_capped: Smaller images are not enlarged.
        side_multiple: Sides are rounded to multiples of it like in the image processor of
            Qwen2-VL: down when downscaling, up when upscaling, else to the nearest.
    """

    order: Order = "xyxy"
    base: FrameBase = "image"
    width: float = 1.0
    height: float = 1.0
    is_capped: bool = False
    side_multiple: int = 1

    @property
    def unit(self) -> Unit | None:
        """Unit of coordinates in this frame, or None without a name."""
        return _find_unit(self)

    def compute_size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return height and width of images in the unit of the coordinates.

        Args:
            height: Height of an image, or an array of heights.
        """
        if self.base in ("image", "stored"):
            return height, width
        if self.base == "fixed":
            return self.height, self.width
        if self.base == "resized":
            return _resize(height, width)
        factor = self.width / get_reference_side(self.base, height, width)
        if self.is_capped:
            factor = np.minimum(factor, 1.0)
        if self.side_multiple == 1:
            return height * factor, width * factor
        return self._round_to_multiple(height, factor), self._round_to_multiple(width, factor)

    def _round_to_multiple(self, side: Any, factor: Any) -> Any:
        cells = side * factor / self.side_multiple
        nearest = np.where(factor > 1, np.ceil(cells), np.rint(cells))
        return self.side_multiple * np.maximum(np.where(factor < 1, np.floor(cells), nearest), 1.0)

    def to_pixels(self, coordinates: Iterable[float], image_size: ImageSize) -> Box:
        """Convert four coordinates of this frame to two corners in pixels of the image."""
        x1, y1, x2, y2 = to_corners(self.order, map(float, coordinates))
        if self.base == "image" and self.order == "xyxy":
            return x1, y1, x2, y2
        scale_x = 1.0
        scale_y = 1.0
        if self.base != "image":
            height, width = image_size
            unit_height, unit_width = self.compute_size(height, width)
            scale_x = width / unit_width
            scale_y = height / unit_height
        # Without floating-point noise, a box survives conversion in both directions.
        return (
            round(x1 * scale_x, BOX_DECIMALS),
            round(y1 * scale_y, BOX_DECIMALS),
            round(x2 * scale_x, BOX_DECIMALS),
            round(y2 * scale_y, BOX_DECIMALS),
        )

    def to_fractions(
        self,
        coordinates: Floats,
        height: Floats,
        width: Floats,
        exif_orientation: NDArray[np.int_] | None = None,
    ) -> Floats:
        """Convert boxes [N, 4] of this frame to two corners, as fractions of their images.

        Args:
            height: Height of each image after EXIF rotation, [N].
            exif_orientation: EXIF orientation of each image, [N], for a frame of stored images.

        Raises:
            ValueError: A frame of stored images has no EXIF orientations.
        """
        corners = to_corner_table(self.order, coordinates)
        if self.base != "stored":
            return divide_by_size(corners, *self.compute_size(height, width))
        if exif_orientation is None:
            raise ValueError("boxes of stored images need the EXIF orientation of each image")
        is_rotated = exif_orientation >= 5
        stored_height = np.where(is_rotated, width, height)
        stored_width = np.where(is_rotated, height, width)
        stored = divide_by_size(corners, stored_height, stored_width)
        return apply_exif_orientation(stored, exif_orientation)


def _scale_sides(side: float) -> BoxFrame:
    """Return the frame of image sides that are scaled to a length."""
    return BoxFrame(base="fixed", width=side, height=side)


UNIT_FRAMES: dict[Unit, BoxFrame] = {
    "pixel": BoxFrame(),
    "resized": BoxFrame(base="resized"),
    "1": _scale_sides(1.0),
    "100": _scale_sides(100.0),
    "1000": _scale_sides(1000.0),
}


@lru_cache(maxsize=100)
def _find_unit(frame: BoxFrame) -> Unit | None:
    corners = replace(frame, order="xyxy")
    for unit, unit_frame in UNIT_FRAMES.items():
        if unit_frame == corners:
            return unit
    return None


PIXELS = UNIT_FRAMES["pixel"]
"""Frame of the boxes of samples: two corners in pixels of the original image."""


@cache
def get_frame(order: Order, unit: Unit) -> BoxFrame:
    """Return the frame of coordinates with an order and a unit."""
    return replace(UNIT_FRAMES[unit], order=order)


def get_reference_side(base: FrameBase, height: Any, width: Any) -> Any:
    """Return the image dimension that `BoxFrame.width` replaces: a side, a mean side, or 1."""
    if base == "longest":
        return np.maximum(width, height)
    if base == "shortest":
        return np.minimum(width, height)
    return np.sqrt(width * height) if base == "pixels" else np.ones_like(width)


def _resize(height: Any, width: Any) -> tuple[Any, Any]:
    """Return height and width of images that Qwen2.5-VL resizes."""
    if np.ndim(height) == 0:
        return smart_resize((height, width), RESIZE_LIMITS, 28)
    sizes = zip(height.tolist(), width.tolist(), strict=True)
    resized_N2 = np.array([smart_resize(size, RESIZE_LIMITS, 28) for size in sizes], np.float64)
    return resized_N2[:, 0], resized_N2[:, 1]


def smart_resize(
    original_size: tuple[int, int],
    limits: PixelRange,
    factor: int,
    num_frames: int = 1,
    temporal_size: int = 1,
) -> tuple[int, int]:
    """Scale an image size into a range of pixel counts, rounded to multiples of `factor`.

    Sides are rounded down to meet the maximum and up to meet the minimum. As in the reference
    preprocessor, they are rounded before the pixel count is compared. The pixels of all frames of a
    video are counted.
    """
    height, width = original_size
    rounded = round(height / factor) * factor, round(width / factor) * factor
    num_pixels = math.prod(rounded) * round(num_frames / temporal_size) * temporal_size
    if num_pixels > limits.max_pixels:
        downscale = math.sqrt((num_frames * height * width) / limits.max_pixels)
        return (
            max(factor, math.floor(height / downscale / factor) * factor),
            max(factor, math.floor(width / downscale / factor) * factor),
        )
    if num_pixels < limits.min_pixels:
        upscale = math.sqrt(limits.min_pixels / (num_frames * height * width))
        return (
            math.ceil(height * upscale / factor) * factor,
            math.ceil(width * upscale / factor) * factor,
        )
    return rounded
