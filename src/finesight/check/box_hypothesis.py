"""Hypotheses about the meaning of box coordinates: their format and their coordinate frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finesight.data.boxes import MAX_OVERHANG_PX, BoxConvention, BoxFormat, BoxUnits

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

EDGE_TOLERANCE = 0.003
"""Fraction of the image side by which a valid box may exceed the image.

One pixel is allowed in addition for rounding.
"""


DEFAULT_CONVENTION = BoxConvention()


@dataclass(frozen=True, slots=True)
class BoxClaim:
    """A box as stored in a data file, whose declared convention may be wrong.

    Attributes:
        image_size: Height and width of the image in pixels after EXIF rotation.
        orientation: EXIF orientation of the image, 1 to 8; 1 means no rotation.
    """

    location: str
    sample_id: str
    image_path: Path
    image_size: tuple[int, int]
    orientation: int
    coordinates: tuple[float, float, float, float]
    convention: BoxConvention = DEFAULT_CONVENTION


class BoxClaimTable:
    """Columns of N box claims as arrays.

    `coordinates` has the shape [N, 4]; the other columns have one value per box.
    """

    def __init__(self, claims: Sequence[BoxClaim]) -> None:
        self.convention = claims[0].convention
        self.coordinates = np.array([claim.coordinates for claim in claims], np.float64)
        self.height, self.width = np.array([claim.image_size for claim in claims], np.float64).T
        self.exif_orientation = np.array([claim.orientation for claim in claims])
        self.image_paths = list(dict.fromkeys(claim.image_path for claim in claims))
        index_by_path = {path: index for index, path in enumerate(self.image_paths)}
        self.image_index = np.array([index_by_path[claim.image_path] for claim in claims])
        keys = [(claim.location, claim.sample_id) for claim in claims]
        index_by_key = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        self.sample_index = np.array([index_by_key[key] for key in keys])
        self.num_samples = len(index_by_key)

    def __len__(self) -> int:
        return len(self.coordinates)

    def count_samples(self, rows: Bools) -> int:
        """Count the samples that contain at least one of the selected boxes."""
        return len(np.unique(self.sample_index[rows]))


FrameBase = Literal["image", "stored", "fixed", "factor", "longest", "shortest", "pixels"]


@dataclass(frozen=True, slots=True)
class BoxFrame:
    """Coordinate frame in which boxes may have been annotated.

    The frame is defined by its width and height per image, derived from `base`:

    - image: The image itself, after EXIF rotation.
    - stored: The image before EXIF rotation.
    - fixed: `frame_width` x `frame_height` for all images.
    - factor: The image scaled by the factor `frame_width`.
    - longest, shortest, pixels: A resized image of the same aspect ratio whose longest side,
      shortest side, or square root of the pixel count is `frame_width`.

    With `is_capped`, smaller images are not enlarged. Sides are rounded to multiples of
    `side_multiple` like in the image processor of Qwen2-VL: down when downscaling, up when
    upscaling, else to the nearest.
    """

    base: FrameBase = "image"
    frame_width: float = 1.0
    frame_height: float = 1.0
    is_capped: bool = False
    side_multiple: int = 1

    @property
    def units(self) -> BoxUnits | None:
        """Units of coordinates in this frame, or None for a resized image."""
        if self.base == "image":
            return "pixel"
        is_square = self.base == "fixed" and self.frame_width == self.frame_height
        named_units: dict[float, BoxUnits] = {1.0: "1", 1000.0: "1000"}
        return named_units.get(self.frame_width) if is_square else None

    def compute_size(self, width: Floats, height: Floats) -> tuple[Floats, Floats]:
        """Compute width and height of the frame for images of the given sizes."""
        if self.base == "fixed":
            return np.full_like(width, self.frame_width), np.full_like(height, self.frame_height)
        factor = self.frame_width / get_reference_side(self.base, width, height)
        if self.is_capped:
            factor = np.minimum(factor, 1.0)
        if self.side_multiple == 1:
            return width * factor, height * factor
        return self._round_to_multiple(width, factor), self._round_to_multiple(height, factor)

    def _round_to_multiple(self, side: Floats, factor: Floats) -> Floats:
        cells = side * factor / self.side_multiple
        nearest = np.where(factor > 1, np.ceil(cells), np.rint(cells))
        return self.side_multiple * np.maximum(np.where(factor < 1, np.floor(cells), nearest), 1.0)


def get_reference_side(base: FrameBase, width: Floats, height: Floats) -> Floats:
    """Return the image dimension that `frame_width` replaces: a side, a mean side, or 1."""
    if base == "longest":
        return np.maximum(width, height)
    if base == "shortest":
        return np.minimum(width, height)
    return np.sqrt(width * height) if base == "pixels" else np.ones_like(width)


@dataclass(frozen=True, slots=True)
class BoxHypothesis:
    """A possible meaning of box coordinates: a box format and a coordinate frame."""

    box_format: BoxFormat
    frame: BoxFrame = BoxFrame()

    def normalize_boxes(self, claims: BoxClaimTable) -> Floats:
        """Interpret box coordinates under this hypothesis.

        Returns:
            Two corners per box [N, 4], as fractions of the image after EXIF rotation.
        """
        corners = to_corners(self.box_format, claims.coordinates)
        if self.frame.base != "stored":
            return divide_by_size(corners, *self.frame.compute_size(claims.width, claims.height))
        orientation, sides = claims.exif_orientation, (claims.width, claims.height)
        stored_width, stored_height = np.where(orientation >= 5, sides[::-1], sides)
        return apply_exif_orientation(
            divide_by_size(corners, stored_width, stored_height), orientation
        )


def divide_by_size(corners: Floats, width: Floats, height: Floats) -> Floats:
    """Divide the corners of boxes [N, 4] by the size of their images [N]."""
    return corners / np.stack((width, height, width, height), axis=1)


def hypothesis_from_convention(convention: BoxConvention) -> BoxHypothesis:
    """Return the hypothesis that corresponds to a declared box convention."""
    if convention.units == "pixel":
        return BoxHypothesis(convention.format)
    side = float(convention.units)
    return BoxHypothesis(convention.format, BoxFrame("fixed", side, side))


def to_corners(box_format: BoxFormat, coordinates: Floats) -> Floats:
    """Convert boxes [..., 4] of a format to two corners in the same units."""
    first, last = coordinates[..., :2], coordinates[..., 2:]
    if box_format == "xywh":
        return np.concatenate((first, first + last), axis=-1)
    if box_format == "cxcywh":
        return np.concatenate((first - last / 2, first + last / 2), axis=-1)
    return coordinates


def apply_exif_orientation(boxes: Floats, orientation: NDArray[np.int_]) -> Floats:
    """Rotate boxes of stored images by the EXIF orientation (Exif 2.32, tag 0x0112).

    Args:
        boxes: Normalized corners in the stored image, [N, 4].
        orientation: EXIF orientation of each image, [N].
    """
    x1, y1, x2, y2 = boxes.T
    # Orientations 5 to 8 swap the axes. Afterwards, 2, 3, 6 and 7 flip x, and 3, 4, 7 and 8 flip y.
    swap = orientation >= 5
    x1, y1, x2, y2 = (
        np.where(swap, swapped, other)
        for swapped, other in ((y1, x1), (x1, y1), (y2, x2), (x2, y2))
    )
    right, below = np.isin(orientation, (2, 3, 6, 7)), np.isin(orientation, (3, 4, 7, 8))
    x1, x2 = np.where(right, 1 - x2, x1), np.where(right, 1 - x1, x2)
    y1, y2 = np.where(below, 1 - y2, y1), np.where(below, 1 - y1, y2)
    return np.stack((x1, y1, x2, y2), axis=1)


def find_inverted_boxes(boxes: Floats) -> Bools:
    """Return a mask of boxes [..., 4] with inverted corners or non-finite coordinates."""
    in_order = (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])
    return ~(in_order & np.isfinite(boxes).all(axis=-1))


def find_invalid_boxes(boxes: Floats, claims: BoxClaimTable) -> Bools:
    """Return a mask of normalized boxes [N, 4] that are impossible in their image.

    These are boxes that are inverted, outside the image, or smaller than one pixel in both
    dimensions.
    """
    sides = np.stack((claims.width, claims.height, claims.width, claims.height), axis=1)
    tolerance = MAX_OVERHANG_PX / sides + EDGE_TOLERANCE
    is_outside = ((boxes < -tolerance) | (boxes > 1 + tolerance)).any(axis=1)
    pixels = boxes * sides
    is_tiny = (pixels[:, 2] - pixels[:, 0] < 1) & (pixels[:, 3] - pixels[:, 1] < 1)
    found: Bools = find_inverted_boxes(boxes) | is_outside | is_tiny
    return found


def pairwise_iou(boxes: Floats, other_boxes: Floats) -> Floats:
    """Compute the intersection over union [N] of corresponding boxes in two arrays [N, 4]."""
    top_left = np.maximum(boxes[:, :2], other_boxes[:, :2])
    bottom_right = np.minimum(boxes[:, 2:], other_boxes[:, 2:])
    intersection = np.clip(bottom_right - top_left, 0, None).prod(axis=1)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (boxes, other_boxes)]
    ious: Floats = intersection / np.maximum(areas[0] + areas[1] - intersection, 1e-12)
    return ious
