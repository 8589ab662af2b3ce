"""Test whether boxes match their own image better than other images.

Three cues are measured per side on a small grayscale image: the brightness difference between a
strip just inside and a strip just outside, the difference of their gradient magnitudes, and the
strength of an edge along the side. Objects and text lines start and end at the sides of their
boxes, so all three cues are larger there than at random positions. No model is involved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finesight.check.box_hypothesis import Bools, BoxClaimTable
from finesight.data.image_header import CorruptImageError, open_image_header
from finesight.vision.image_decoding import load_image

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

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Sums = NDArray[np.int32]


def load_small_gray(path: Path) -> NDArray[np.uint8]:
    """Load an upright grayscale image with a longer side of at most `MAX_SIDE`.

    Raises:
        CorruptImageError: The file cannot be decoded.
    """
    with open_image_header(path) as image:
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
        # An edge may be one pixel off its side: use the maximum of three neighbors.
        self._max_grad_x = _max_with_neighbors(grad_x.T).astype(np.uint8)
        self._max_grad_y = _max_with_neighbors(grad_y).astype(np.uint8)

    def score_boxes(self, boxes: Floats) -> Floats:
        """Score how well the sides of boxes match edges in the image.

        Args:
            boxes: Normalized corners [N, 4].

        Returns:
            Scores [N, 2] of the left and upper sides and of the right and lower sides. Sides on the
                image border are excluded; the score is 0 if both are excluded.
        """
        x1, y1, x2, y2 = self._to_pixel_corners(boxes)
        strip_width = np.maximum(2, np.minimum(x2 - x1, y2 - y1) // STRIP_DIVISOR)
        left, top = np.maximum(x1 - strip_width, 0), np.maximum(y1 - strip_width, 0)
        right = np.minimum(x2 + strip_width, self._width)
        bottom = np.minimum(y2 + strip_width, self._height)
        strip_xs = (x1 + strip_width).clip(max=x2), (x2 - strip_width).clip(min=x1)
        strip_ys = (y1 + strip_width).clip(max=y2), (y2 - strip_width).clip(min=y1)
        cumsum_x, cumsum_y = _row_cumsum(self._max_grad_x), _row_cumsum(self._max_grad_y)
        box_sides = (
            (
                (x1, y1, strip_xs[0], y2),
                (left, y1, x1, y2),
                self._vertical_edge(cumsum_x, x1, y1, y2),
            ),
            (
                (x1, y1, x2, strip_ys[0]),
                (x1, top, x2, y1),
                self._horizontal_edge(cumsum_y, y1, x1, x2),
            ),
            (
                (strip_xs[1], y1, x2, y2),
                (x2, y1, right, y2),
                self._vertical_edge(cumsum_x, x2, y1, y2),
            ),
            (
                (x1, strip_ys[1], x2, y2),
                (x1, y2, x2, bottom),
                self._horizontal_edge(cumsum_y, y2, x1, x2),
            ),
        )
        gray_integral, gradient_integral = (
            _integral_image(self._gray),
            _integral_image(self._gradient),
        )
        visible = np.stack((x1 > 0, y1 > 0, x2 < self._width, y2 < self._height))
        scores = np.empty((4, len(boxes)))
        for side_index, (inside, outside, edge) in enumerate(box_sides):
            cues = self._contrast_cues(gray_integral, gradient_integral, inside, outside)
            scores[side_index] = np.stack((*cues, edge), axis=1) @ CUE_WEIGHTS
        pairs = np.where(visible, scores, 0.0).reshape(2, 2, -1).sum(axis=1)
        means: Floats = pairs / np.maximum(visible.reshape(2, 2, -1).sum(axis=1), 1)
        return means.T

    def mean_brightness(self) -> Floats:
        """Return the mean brightness (0 to 255) of grid cells, flattened to [GRID_CELLS ** 2]."""
        cell_xs = np.linspace(0, self._width, GRID_CELLS + 1).astype(np.int64)
        cell_ys = np.linspace(0, self._height, GRID_CELLS + 1).astype(np.int64)
        y1, x1 = (grid.ravel() for grid in np.meshgrid(cell_ys[:-1], cell_xs[:-1], indexing="ij"))
        y2, x2 = (grid.ravel() for grid in np.meshgrid(cell_ys[1:], cell_xs[1:], indexing="ij"))
        box = x1, y1, x2, y2
        means: Floats = self._box_sum(_integral_image(self._gray), box) / _strip_area(box)
        return means

    def _to_pixel_corners(self, boxes: Floats) -> tuple[Ints, Ints, Ints, Ints]:
        """Convert normalized boxes to pixel corners of the small image.

        The result is at least two pixels wide and high.
        """
        scale = np.array([self._width, self._height, self._width, self._height])
        x1, y1, x2, y2 = np.rint(boxes * scale).astype(np.int64).T
        x1, y1 = x1.clip(0, max(self._width - 2, 0)), y1.clip(0, max(self._height - 2, 0))
        x2 = np.minimum(np.maximum(x2, x1 + 2), self._width)
        y2 = np.minimum(np.maximum(y2, y1 + 2), self._height)
        return x1, y1, x2, y2

    def _contrast_cues(
        self,
        gray_integral: Sums,
        gradient_integral: Sums,
        inside: tuple[Ints, ...],
        outside: tuple[Ints, ...],
    ) -> tuple[Floats, Floats]:
        """Return two cues of a box side from the strips inside and outside.

        These are the brightness difference and the logarithmic ratio of gradient magnitudes.
        """
        area_in, area_out = _strip_area(inside), _strip_area(outside)
        step = (
            self._box_sum(gray_integral, inside) / area_in
            - self._box_sum(gray_integral, outside) / area_out
        )
        floor = 0.1 * self._gradient_mean
        busy_in = self._box_sum(gradient_integral, inside) / area_in + floor
        busy_out = self._box_sum(gradient_integral, outside) / area_out + floor
        return np.abs(step) / self._gray_std, np.log(busy_in / busy_out)

    def _box_sum(self, integral: Sums, box: tuple[Ints, ...]) -> Ints:
        x1, y1, x2, y2 = box
        stride = self._width + 1
        top_offset, bottom_offset = y1 * stride, y2 * stride
        lower = integral[bottom_offset + x2] - integral[bottom_offset + x1]
        sums: Ints = lower - integral[top_offset + x2] + integral[top_offset + x1]
        return sums

    def _vertical_edge(self, cumsum_x: Sums, x: Ints, y1: Ints, y2: Ints) -> Floats:
        """Return the log edge strength along a vertical side, relative to the image mean."""
        offset = x.clip(max=self._width - 1) * (self._height + 1)
        mean = (cumsum_x[offset + y2] - cumsum_x[offset + y1]) / np.maximum(y2 - y1, 1)
        edge: Floats = np.log(mean / self._grad_x_mean + 0.3)
        return edge

    def _horizontal_edge(self, cumsum_y: Sums, y: Ints, x1: Ints, x2: Ints) -> Floats:
        """Return the log edge strength along a horizontal side, relative to the image mean."""
        offset = y.clip(max=self._height - 1) * (self._width + 1)
        mean = (cumsum_y[offset + x2] - cumsum_y[offset + x1]) / np.maximum(x2 - x1, 1)
        edge: Floats = np.log(mean / self._grad_y_mean + 0.3)
        return edge


def _integral_image(values: NDArray[np.uint8]) -> Sums:
    """Compute the flattened integral image, with a leading row and column of zeros."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1), np.int32)
    np.cumsum(values, axis=0, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    return table.ravel()


def _row_cumsum(values: NDArray[np.uint8]) -> Sums:
    """Compute the cumulative sums along each row with a leading 0, flattened."""
    table = np.zeros((values.shape[0], values.shape[1] + 1), np.int32)
    np.cumsum(values, axis=1, dtype=np.int32, out=table[:, 1:])
    return table.ravel()


def _max_with_neighbors(values: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the maximum of each value and its neighbors in the rows above and below."""
    result = values.copy()
    np.maximum(result[1:], values[:-1], out=result[1:])
    np.maximum(result[:-1], values[1:], out=result[:-1])
    return result


def _strip_area(box: tuple[Ints, ...]) -> Ints:
    x1, y1, x2, y2 = box
    return np.maximum((x2 - x1) * (y2 - y1), 1)


ImageOpener = Callable[[Path], EdgeContrast]
"""Function that opens an image for measurements. It raises CorruptImageError for an invalid image.
"""

MAX_IMAGES = 300
"""Maximum number of measured images, evenly distributed over the data file."""

MAX_BOXES = 1200
"""Approximate maximum number of measured boxes; at least 4 per image are measured."""

NUM_CONTROLS = 3
"""Number of control images in which each box is also measured."""

MIN_IMAGES = 20
"""Minimum number of dissimilar images for image evidence."""

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
        image_of_claim: Index of the image of each measured box.
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
            claim_rows = np.flatnonzero(claims.image_index == image_index)
            groups.append(
                claim_rows[
                    np.linspace(
                        0, len(claim_rows) - 1, min(len(claim_rows), boxes_per_image)
                    ).astype(int)
                ]
            )
        self.claim_rows = np.concatenate(groups) if groups else np.zeros(0, int)
        self.image_of_claim = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self._vote_groups = self._assign_vote_groups(claims)
        self.is_sufficient = len(set(self._vote_groups)) >= MIN_IMAGES

    def take(self, num_images: int) -> ImageEvidence:
        """Return the evidence of a random subset of the images."""
        subset = copy.copy(self)
        subset._images = self._images[:num_images]
        is_included = self.image_of_claim < num_images
        subset.claim_rows, subset.image_of_claim = (
            self.claim_rows[is_included],
            self.image_of_claim[is_included],
        )
        subset._vote_groups = self._vote_groups[:num_images]
        return subset

    def _assign_vote_groups(self, claims: BoxClaimTable) -> NDArray[np.int_]:
        """Assign a group number to each image, which has one vote per group.

        Images with similar brightness and a similar first box, such as video frames or scans of the
        same form, share a group.
        """
        first_rows = np.searchsorted(self.image_of_claim, np.arange(len(self._images)))
        boxes = claims.coordinates[self.claim_rows[first_rows]]
        scale = np.abs(claims.coordinates).max(initial=1e-9)
        brightness_maps = np.stack(
            [contrast.mean_brightness() for contrast in self._images] or [np.zeros(1)]
        )
        groups = np.arange(len(self._images))
        for image_index in range(1, len(groups)):
            is_similar = (
                np.abs(brightness_maps[:image_index] - brightness_maps[image_index]).mean(axis=1)
                < MAX_BRIGHTNESS_DIFF
            )
            has_close_box = (
                np.abs(boxes[:image_index] - boxes[image_index]).max(axis=1) < scale * MAX_BOX_DIFF
            )
            if (is_similar & has_close_box).any():
                groups[image_index] = groups[np.argmax(is_similar & has_close_box)]
        return groups

    def score_boxes(self, boxes: Floats, num_controls: int = NUM_CONTROLS) -> Floats:
        """Score how much better boxes fit their own image than control images.

        The scores of the same boxes in control images are subtracted. Effects of position, size and
        layout are then 0 on average.

        Args:
            boxes: Normalized corners [n, R, 4] of the n measured boxes under R hypotheses.
            num_controls: Number of control images.

        Returns:
            Scores [n, R, 2] of the left and upper sides and of the right and lower sides. NaN if a
                box is not inside its image.
        """
        with np.errstate(invalid="ignore"):
            is_inside = (boxes > -0.01) & (boxes < 1.01)
            is_valid: Bools = np.all(is_inside, axis=2)
            is_valid &= np.all(boxes[..., 2:] > boxes[..., :2], axis=2)
        safe_boxes = np.where(is_valid[..., None], boxes, np.array([0.0, 0.0, 1.0, 1.0]))
        own_scores, control_scores = np.zeros((2, *boxes.shape[:2], 2))
        num_images = len(self._images)
        starts = np.searchsorted(self.image_of_claim, np.arange(num_images + 1))
        members = [np.arange(starts[k], starts[k + 1]) for k in range(num_images)]
        for image_index, contrast in enumerate(self._images):
            row_groups = [
                members[(image_index + step) % num_images] for step in range(num_controls + 1)
            ]
            rows = np.concatenate(row_groups)
            measured_scores = contrast.score_boxes(safe_boxes[rows].reshape(-1, 4)).reshape(
                len(rows), -1, 2
            )
            num_own = len(row_groups[0])
            own_scores[row_groups[0]] = measured_scores[:num_own]
            control_scores[rows[num_own:]] += measured_scores[num_own:]
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
