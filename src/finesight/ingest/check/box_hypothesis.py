"""Hypotheses about the format and frame of box coordinates, and their tests on the images.

Boxes of a correct hypothesis match their own image better than other images. Three cues are
measured per side on a small grayscale image: the brightness difference between a strip just inside
and a strip just outside, the difference of their gradient magnitudes, and the strength of an edge
along the side. Objects and text lines start and end at the sides of their boxes, so all three cues
are larger there than at random positions. No model is involved.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finesight.samples.boxes import MAX_OVERHANG_PX
from finesight.samples.frames import PIXELS, BoxFrame, Floats
from finesight.samples.image_file import CorruptImageError, check_scans, open_image_header
from finesight.vision.image_processing import load_image

Bools = NDArray[np.bool_]

EDGE_TOLERANCE = 0.003
"""Fraction of the image side by which a valid box may exceed the image.

One pixel is allowed in addition for rounding.
"""


@dataclass(frozen=True, slots=True)
class BoxClaim:
    """A box as stored in a data file, whose declared frame may be wrong.

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
    frame: BoxFrame = PIXELS


class BoxClaimTable:
    """Columns of N box claims as arrays.

    `coordinates` has the shape [N, 4]; the other columns have one value per box.
    """

    def __init__(self, claims: Sequence[BoxClaim]) -> None:
        self.frame = claims[0].frame
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


def normalize_boxes(frame: BoxFrame, claims: BoxClaimTable) -> Floats:
    """Interpret box coordinates in a frame.

    Returns:
        Two corners per box [N, 4], as fractions of the image after EXIF rotation.
    """
    return frame.to_fractions(
        claims.coordinates, claims.height, claims.width, claims.exif_orientation
    )


def find_inverted_boxes(boxes: Floats) -> Bools:
    """Return a mask of boxes [..., 4] with inverted corners or non-finite coordinates."""
    in_order = (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])
    return ~(in_order & np.isfinite(boxes).all(axis=-1))


def find_invalid_boxes(boxes: Floats, claims: BoxClaimTable) -> Bools:
    """Return a mask of normalized boxes [N, 4] that are impossible in their image.

    These are boxes that are inverted, outside the image, or smaller than one pixel in both
    dimensions, and points (with equal corners) outside the image or in its first pixel.
    """
    sides = np.stack((claims.width, claims.height, claims.width, claims.height), axis=1)
    tolerance = MAX_OVERHANG_PX / sides + EDGE_TOLERANCE
    is_outside = ((boxes < -tolerance) | (boxes > 1 + tolerance)).any(axis=1)
    pixels = boxes * sides
    starts, ends = claims.coordinates[:, :2], claims.coordinates[:, 2:]
    is_point = (starts == ends).all(axis=1) & (claims.frame.order in ("xyxy", "yxyx"))
    is_tiny = (pixels[:, 2:] - pixels[:, :2] * ~is_point[:, None] < 1).all(axis=1)
    is_inverted = np.where(is_point, boxes[:, 0] != boxes[:, 2], find_inverted_boxes(boxes))
    found: Bools = is_inverted | is_outside | is_tiny
    return found


MAX_SIDE = 448
"""Length of the longer side in pixels to which images are downscaled.

Words of 12 pixels in an image of 1000 pixels remain visible.
"""

CUE_WEIGHTS = np.array([5.0, 3.3, 1.7])
"""Weights of the cues: brightness difference, gradient difference and edge strength.

They are about the inverse of the standard deviations over photographs and documents.
"""

STRIP_DIVISOR = 4
"""Ratio of the shorter box side to the strip width (at least 2 pixels)."""

GRID_CELLS = 16
"""Number of grid cells per image side for comparing the brightness of images."""

_MAX_GRADIENT = 60
"""Maximum of the gradient magnitude, at which larger differences between pixels are capped."""
Ints = NDArray[np.int64]
Sums = NDArray[np.int32]


def load_small_gray(path: Path) -> NDArray[np.uint8]:
    """Load an upright grayscale image with a longer side of at most `MAX_SIDE`.

    Raises:
        CorruptImageError: The file cannot be decoded.
    """
    with open_image_header(path) as image:
        check_scans(path, image)
        if image.format in ("JPEG", "MPO") and min(image.size) > MAX_SIDE:
            # The JPEG decoder can downscale by powers of two, which is fast for large images.
            image.draft("L", (MAX_SIDE, MAX_SIDE))
            try:
                return _downscale(ImageOps.exif_transpose(image).convert("L"))
            except OSError:
                pass  # reported by the image check
    return _downscale(load_image(path).convert("L"))


def _downscale(image: Image.Image) -> NDArray[np.uint8]:
    longest = max(image.size)
    if longest > MAX_SIDE:
        width, height = (max(1, round(side * MAX_SIDE / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image)


class EdgeContrast:
    """Contrast measurements of one grayscale image.

    Integral images, with which a box takes a few look-ups, are computed per call of `score_boxes`:
    they take four times the memory of the image.
    """

    def __init__(self, gray_HW: NDArray[np.uint8]) -> None:
        gray = gray_HW.astype(np.int32)
        self._height, self._width = gray.shape
        grad_x, grad_y = np.zeros_like(gray), np.zeros_like(gray)
        grad_x[:, 1:] = np.abs(np.diff(gray, axis=1))
        grad_y[1:] = np.abs(np.diff(gray, axis=0))
        gradient = np.minimum(grad_x + grad_y, _MAX_GRADIENT)
        self._gray_std = float(gray.std()) + 1.0
        self._gradient_mean = float(gradient.mean()) + 0.5
        self._grad_x_mean = float(grad_x.mean()) + 0.3
        self._grad_y_mean = float(grad_y.mean()) + 0.3
        self._gray, self._gradient = gray_HW, gradient.astype(np.uint8)
        # The gradient in x is transposed to [W, H]: a side of a box is a range of one row in both.
        self._edges_x = _max_with_neighbors(grad_x.T).astype(np.uint8)
        self._edges_y = _max_with_neighbors(grad_y).astype(np.uint8)

    def score_boxes(self, boxes: Floats) -> Floats:
        """Score how well the sides of boxes match edges in the image.

        Args:
            boxes: Normalized corners [N, 4].

        Returns:
            Scores [N, 2] of the left and upper sides and of the right and lower sides. Sides on the
                image border are excluded; the score is 0 if both are excluded.
        """
        # Boxes get at least 2 x 2 pixels, so that no strip inside of them is empty.
        width, height = self._width, self._height
        x1, y1, x2, y2 = np.rint(boxes * [width, height, width, height]).astype(np.int64).T
        x1, y1 = x1.clip(0, max(width - 2, 0)), y1.clip(0, max(height - 2, 0))
        x2 = np.minimum(np.maximum(x2, x1 + 2), width)
        y2 = np.minimum(np.maximum(y2, y1 + 2), height)
        strip = np.maximum(2, np.minimum(x2 - x1, y2 - y1) // STRIP_DIVISOR)
        # Left, upper, right and lower side: the strips inside and outside of an object differ.
        sides: tuple[tuple[PixelBox, PixelBox], ...] = (
            ((x1, y1, (x1 + strip).clip(max=x2), y2), (np.maximum(x1 - strip, 0), y1, x1, y2)),
            ((x1, y1, x2, (y1 + strip).clip(max=y2)), (x1, np.maximum(y1 - strip, 0), x2, y1)),
            (((x2 - strip).clip(min=x1), y1, x2, y2), (x2, y1, np.minimum(x2 + strip, width), y2)),
            ((x1, (y2 - strip).clip(min=y1), x2, y2), (x1, y2, x2, np.minimum(y2 + strip, height))),
        )
        sums_x, sums_y = _cumsum_rows(self._edges_x), _cumsum_rows(self._edges_y)
        edges = (
            _measure_edges(sums_x, x1, y1, y2, self._grad_x_mean),
            _measure_edges(sums_y, y1, x1, x2, self._grad_y_mean),
            _measure_edges(sums_x, x2, y1, y2, self._grad_x_mean),
            _measure_edges(sums_y, y2, x1, x2, self._grad_y_mean),
        )
        gray_sums, gradient_sums = _integral_image(self._gray), _integral_image(self._gradient)
        floor = 0.1 * self._gradient_mean
        visible = np.stack((x1 > 0, y1 > 0, x2 < width, y2 < height))
        scores = np.empty((4, len(boxes)))
        for side_index, (inside, outside) in enumerate(sides):
            step = _box_means(gray_sums, inside) - _box_means(gray_sums, outside)
            busy_inside = _box_means(gradient_sums, inside) + floor
            busy_outside = _box_means(gradient_sums, outside) + floor
            cues = np.abs(step) / self._gray_std, np.log(busy_inside / busy_outside)
            scores[side_index] = np.stack((*cues, edges[side_index]), axis=1) @ CUE_WEIGHTS
        pairs = np.where(visible, scores, 0.0).reshape(2, 2, -1).sum(axis=1)
        means: Floats = pairs / np.maximum(visible.reshape(2, 2, -1).sum(axis=1), 1)
        return means.T

    def mean_brightness(self) -> Floats:
        """Return the mean brightness (0 to 255) of grid cells, flattened to [GRID_CELLS ** 2]."""
        xs = np.linspace(0, self._width, GRID_CELLS + 1).astype(np.int64)
        ys = np.linspace(0, self._height, GRID_CELLS + 1).astype(np.int64)
        y1, x1 = np.meshgrid(ys[:-1], xs[:-1], indexing="ij")
        y2, x2 = np.meshgrid(ys[1:], xs[1:], indexing="ij")
        return _box_means(_integral_image(self._gray), (x1, y1, x2, y2)).ravel()


PixelBox = tuple[Ints, Ints, Ints, Ints]


def _max_with_neighbors(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the maximum of each value and its neighbors in the rows above and below.

    An edge may be one pixel off its side.
    """
    padded = np.pad(values, ((1, 1), (0, 0)))
    return np.maximum(np.maximum(padded[:-2], values), padded[2:])


def _cumsum_rows(values: NDArray[np.uint8]) -> Sums:
    """Compute the cumulative sums along each row, with a leading 0."""
    return np.pad(values, ((0, 0), (1, 0))).cumsum(axis=1, dtype=np.int32)


def _measure_edges(sums: Sums, line: Ints, start: Ints, stop: Ints, mean_gradient: float) -> Floats:
    """Return the log edge strength along parts of lines, relative to the image mean."""
    line = line.clip(max=len(sums) - 1)
    strength = (sums[line, stop] - sums[line, start]) / np.maximum(stop - start, 1)
    edges: Floats = np.log(strength / mean_gradient + 0.3)
    return edges


def _integral_image(values: NDArray[np.uint8]) -> Sums:
    """Compute the integral image, with a leading row and column of zeros."""
    rows = np.pad(values, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int32)
    return rows.cumsum(axis=1, dtype=np.int32, out=rows)


def _box_means(integral: Sums, box: PixelBox) -> Floats:
    x1, y1, x2, y2 = box
    sums = integral[y2, x2] - integral[y2, x1] - integral[y1, x2] + integral[y1, x1]
    means: Floats = sums / np.maximum((x2 - x1) * (y2 - y1), 1)
    return means


ImageOpener = Callable[[Path], EdgeContrast]
"""Function that opens an image for measurements. It raises CorruptImageError for an invalid image.
"""

MAX_IMAGES = 300
"""Maximum number of measured images, evenly distributed over the data file."""

MAX_BOXES = 1200
"""Approximate maximum number of measured boxes; at least 4 per image are measured."""

NUM_CONTROLS = 3

MIN_IMAGES = 20

MAX_BRIGHTNESS_DIFF = 2.0
"""Mean brightness difference (of 255) below which two images are considered similar."""

MAX_BOX_DIFF = 0.03
"""Relative coordinate difference below which two boxes are considered similar."""

MAX_FALSE_POSITIVE_RATE = 1e-6
"""Maximum probability that boxes of a wrong hypothesis are accepted."""

MAX_SCORE = 10.0
"""Cap of the score of a single box, about twice the standard deviation of scores."""


def open_edge_contrast(path: Path) -> EdgeContrast:
    """Decode and downscale an image, and prepare its contrast measurements."""
    return EdgeContrast(load_small_gray(path))


class ImageEvidence:
    """Measured images of a data file, which score the boxes of a hypothesis.

    Attributes:
        claim_rows: Indices of the measured boxes in the table of box claims.
        is_sufficient: Whether there are at least `MIN_IMAGES` dissimilar images.
    """

    def __init__(self, claims: BoxClaimTable, open_image: ImageOpener, seed: int = 0) -> None:
        image_indices = np.unique(
            np.linspace(0, len(claims.image_paths) - 1, MAX_IMAGES).round().astype(int)
        )
        # Neighbors in a file are often similar (video frames) and unsuitable as controls.
        np.random.default_rng(seed).shuffle(image_indices)
        self._images: list[EdgeContrast] = []
        groups = []
        boxes_per_image = max(4, MAX_BOXES // len(image_indices))
        for image_index in image_indices:
            try:
                self._images.append(open_image(claims.image_paths[image_index]))
            except CorruptImageError:
                continue  # reported as a separate issue
            rows = np.flatnonzero(claims.image_index == image_index)
            count = min(len(rows), boxes_per_image)
            groups.append(rows[np.linspace(0, len(rows) - 1, count).astype(int)])
        self.claim_rows = np.concatenate(groups) if groups else np.zeros(0, int)
        self.image_of_claim = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self._vote_groups = self._assign_vote_groups(claims)
        self.is_sufficient = len(set(self._vote_groups)) >= MIN_IMAGES

    def take(self, num_images: int) -> ImageEvidence:
        """Return the measurements of a random subset of the images."""
        subset = copy.copy(self)
        subset._images = self._images[:num_images]
        is_included = self.image_of_claim < num_images
        subset.claim_rows = self.claim_rows[is_included]
        subset.image_of_claim = self.image_of_claim[is_included]
        subset._vote_groups = self._vote_groups[:num_images]
        return subset

    def _assign_vote_groups(self, claims: BoxClaimTable) -> NDArray[np.int_]:
        """Assign each image to a group. Each group counts as one vote.

        Images with similar brightness and a similar first box, such as video frames or scans of the
        same form, share a group.
        """
        first_rows = np.searchsorted(self.image_of_claim, np.arange(len(self._images)))
        boxes = claims.coordinates[self.claim_rows[first_rows]]
        scale = np.abs(claims.coordinates).max(initial=1e-9)
        images = [image.mean_brightness() for image in self._images] or [np.zeros(1)]
        brightness = np.stack(images)
        groups = np.arange(len(self._images))
        for n in range(1, len(groups)):
            brightness_diff = np.abs(brightness[:n] - brightness[n]).mean(axis=1)
            box_diff = np.abs(boxes[:n] - boxes[n]).max(axis=1)
            is_similar = (brightness_diff < MAX_BRIGHTNESS_DIFF) & (box_diff < scale * MAX_BOX_DIFF)
            if is_similar.any():
                groups[n] = groups[np.argmax(is_similar)]
        return groups

    def score_boxes(self, boxes: Floats, num_controls: int = NUM_CONTROLS) -> Floats:
        """Score how much better boxes fit their own image than control images.

        The scores of the same boxes in control images are subtracted. Effects of position, size and
        layout are then 0 on average.

        Args:
            boxes: Normalized corners [n, R, 4] of the n measured boxes under R hypotheses.

        Returns:
            Scores [n, R, 2] of the left and upper sides and of the right and lower sides. NaN if a
                box is not inside its image.
        """
        with np.errstate(invalid="ignore"):
            is_valid: Bools = np.all((boxes > -0.01) & (boxes < 1.01), axis=2)
            is_valid &= np.all(boxes[..., 2:] > boxes[..., :2], axis=2)
        safe_boxes = np.where(is_valid[..., None], boxes, np.array([0.0, 0.0, 1.0, 1.0]))
        own_scores, control_scores = np.zeros((2, *boxes.shape[:2], 2))
        num_images = len(self._images)
        starts = np.searchsorted(self.image_of_claim, np.arange(num_images + 1))
        members = [np.arange(*pair) for pair in itertools.pairwise(starts)]
        for image_index, image in enumerate(self._images):
            own_rows, *other_rows = (
                members[(image_index + step) % num_images] for step in range(num_controls + 1)
            )
            rows = np.concatenate([own_rows, *other_rows])
            scores = image.score_boxes(safe_boxes[rows].reshape(-1, 4)).reshape(len(rows), -1, 2)
            own_scores[own_rows] = scores[: len(own_rows)]
            control_scores[rows[len(own_rows) :]] += scores[len(own_rows) :]
        return np.where(is_valid[..., None], own_scores - control_scores / num_controls, np.nan)

    def z_score(self, values: Floats, mask: Bools | None = None) -> float:
        """Return the z score by which the values of the measured boxes are above 0.

        Boxes in one image, or in similar images, are not independent: their sum is divided by the
        square root of their number. See `hoeffding_bound`.

        Args:
            values: Scores or differences of scores, [n].
            mask: Boxes to include, [n]; None includes all.
        """
        is_used = np.isfinite(values) if mask is None else np.isfinite(values) & mask
        votes = self._vote_groups[self.image_of_claim[is_used]]
        weights = 1 / np.sqrt(np.bincount(votes, minlength=len(self._images)).clip(1))
        weighted = np.clip(values[is_used], -MAX_SCORE, MAX_SCORE) * weights[votes]
        sums = np.bincount(votes, weighted, len(self._images))
        return float(sums.sum() / math.sqrt(max(float((sums**2).sum()), 1e-12)))


def hoeffding_bound(z: float, num_tries: int = 1) -> float:
    """Bound the probability that the z score of a wrong hypothesis reaches z by chance.

    The z score is a sum of symmetric values in units of the square root of their sum of squares.
    The bound exp(-z^2 / 2) by Hoeffding (1963) holds for any number and size of values. It is
    multiplied by the number of tested hypotheses.
    """
    return min(1.0, num_tries * math.exp(-z * z / 2)) if z > 0 else 1.0


def min_z_score(num_tries: int = 1) -> float:
    """Return the z score at which `hoeffding_bound` equals `MAX_FALSE_POSITIVE_RATE`."""
    return math.sqrt(2 * math.log(num_tries / MAX_FALSE_POSITIVE_RATE))
