"""Test whether boxes match their own image better than other images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.box_hypothesis import Bools, BoxClaimTable
from finesight.check.conventions.edge_contrast import EdgeContrast, load_small_gray
from finesight.data.image_header import CorruptImageError

Floats = NDArray[np.float64]

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
