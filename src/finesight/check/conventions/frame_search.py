"""Search for the size of the resized images in which boxes were annotated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.box_hypothesis import (
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    FrameBase,
    get_reference_side,
    to_corners,
)
from finesight.check.conventions.image_evidence import MAX_SCORE, ImageEvidence
from finesight.data.boxes import BoxFormat

Floats = NDArray[np.float64]

COARSE_STEP = 1.03
"""Ratio between consecutive candidate sizes in the coarse search."""

FINE_STEP = 1.005
"""Ratio between consecutive candidate sizes in the fine search around the best ones."""

MAX_SCALE = 2.6
"""Ratio between the largest and the smallest candidate size.

The smallest candidate just contains all boxes. In larger frames, all boxes would be in one corner.
"""

NUM_COARSE_IMAGES = 150
"""Number of images that are measured in the coarse search."""

OUTLIER_FRACTION = 0.01
"""Fraction of boxes that may be outside of a candidate frame."""

FrameKind = tuple[FrameBase, bool, int]
"""Resize rule: `base`, `is_capped` and `side_multiple` of a `BoxFrame`."""

FRAME_KINDS: tuple[FrameKind, ...] = (
    ("factor", False, 1),
    ("longest", False, 1),
    ("shortest", False, 1),
    ("pixels", False, 1),
    ("longest", True, 1),
    ("pixels", True, 1),
    ("pixels", False, 28),
    ("pixels", True, 28),
)
"""Resize rules that preserve the aspect ratio, exactly or except for rounding."""

MIN_Z_GAIN = 3.0
"""Minimum z score to prefer a more complex resize rule over a simpler one."""


@dataclass(frozen=True)
class FrameSearchResult:
    """Hypothesis with the best-fitting coordinate frame.

    Attributes:
        num_tries: Number of tested frames, which increases the probability of a false positive.
    """

    hypothesis: BoxHypothesis
    num_tries: int


def find_frame(
    claims: BoxClaimTable, evidence: ImageEvidence, box_format: BoxFormat
) -> FrameSearchResult:
    """Find the coordinate frame in which boxes of a given format fit their images best.

    The search tests sizes in steps of 3 %, then in finer steps around the best sizes of each resize
    rule. The rules differ only if the images differ in size. Of rules that fit equally well, the
    simplest is returned.
    """
    coarse_search = _FrameScorer(claims, evidence.take(NUM_COARSE_IMAGES), box_format)
    coarse_frames = coarse_search.fixed_frames() + coarse_search.scaled_frames()
    coarse_means = _mean_scores(coarse_search.score_frames(coarse_frames, controls=1))
    seeds = [frame for group in _select_best(coarse_frames, coarse_means) for frame in group]
    fine_frames = [frame for seed in seeds for frame in _refine_frame(seed)]
    scores = _FrameScorer(claims, evidence, box_format).score_frames(fine_frames)
    best_of_kind = [_best_frame(kind, scores) for kind in _group_by_kind(fine_frames)]
    best = best_of_kind[0]
    for index in best_of_kind[1:]:
        if evidence.z_score(scores[:, index] - scores[:, best]) > MIN_Z_GAIN:
            best = index
    return FrameSearchResult(
        BoxHypothesis(box_format, fine_frames[best]), len(coarse_frames) + len(fine_frames)
    )


class _FrameScorer:
    def __init__(
        self, claims: BoxClaimTable, evidence: ImageEvidence, box_format: BoxFormat
    ) -> None:
        rows = evidence.claim_rows
        self._evidence = evidence
        self._corners = to_corners(box_format, claims.coordinates[rows])
        self._width, self._height = claims.width[rows], claims.height[rows]
        all_corners = to_corners(box_format, claims.coordinates)
        self._x, self._y = all_corners[:, 2], all_corners[:, 3]
        self._claims = claims
        sizes = np.stack((claims.width, claims.height), axis=1)
        self._is_single_size = len(np.unique(sizes, axis=0)) == 1

    def fixed_frames(self) -> list[BoxFrame]:
        """Return candidate frames with the same size for all images."""
        widths, heights = (_candidate_sizes(_max_extent(extents)) for extents in (self._x, self._y))
        return [BoxFrame("fixed", x, y) for x, y in itertools.product(widths, heights)]

    def scaled_frames(self) -> list[BoxFrame]:
        """Return candidate frames with the aspect ratio of each image.

        There are none if all images have the same size, because fixed frames are then equivalent.
        """
        if self._is_single_size:
            return []
        claims, frames = self._claims, []
        extent = np.maximum(self._x / claims.width, self._y / claims.height)
        for base, capped, grid in FRAME_KINDS:
            if capped and _max_extent(extent) > 1.01:
                continue
            min_side = extent * get_reference_side(base, claims.width, claims.height)
            frames += [
                BoxFrame(base, size, size, capped, grid)
                for size in _candidate_sizes(_max_extent(min_side))
            ]
        return frames

    def score_frames(self, frames: Sequence[BoxFrame], controls: int = 3) -> Floats:
        """Return the image scores [n, R] of n boxes in R candidate frames.

        The scores are summed over all sides of a box.
        """
        boxes = np.empty((len(self._corners), len(frames), 4))
        for frame_index, frame in enumerate(frames):
            frame_width, frame_height = frame.compute_size(self._width, self._height)
            boxes[:, frame_index] = self._corners / np.stack(
                (frame_width, frame_height, frame_width, frame_height), axis=1
            )
        scores: Floats = self._evidence.score_boxes(boxes, controls).sum(axis=2)
        return scores


def _mean_scores(scores: Floats) -> Floats:
    clipped = np.clip(scores, -MAX_SCORE, MAX_SCORE)
    is_valid = np.isfinite(clipped)
    means = np.where(is_valid, clipped, 0).sum(axis=0) / np.maximum(is_valid.sum(axis=0), 1)
    return np.where(is_valid.mean(axis=0) > 1 - 3 * OUTLIER_FRACTION, means, -np.inf)


def _max_extent(values: Floats) -> float:
    return max(float(np.quantile(values, 1 - OUTLIER_FRACTION)), 1e-3)


def _candidate_sizes(min_size: float) -> list[float]:
    steps = math.ceil(math.log(MAX_SCALE) / math.log(COARSE_STEP))
    return [0.99 * min_size * COARSE_STEP**step for step in range(steps)]


def _group_by_kind(frames: Sequence[BoxFrame]) -> list[list[int]]:
    """Return the indices of the frames of each resize rule, the simplest rule first."""
    order: list[FrameKind] = [FRAME_KINDS[0], FRAME_KINDS[1], ("fixed", False, 1), *FRAME_KINDS[2:]]
    groups = [
        [n for n, f in enumerate(frames) if (f.base, f.is_capped, f.side_multiple) == kind]
        for kind in order
    ]
    return [group for group in groups if group]


def _select_best(frames: Sequence[BoxFrame], values: Floats) -> list[list[BoxFrame]]:
    """Return the frames with the best scores for each resize rule."""
    num_best = 3
    groups = [
        sorted(group, key=lambda n: -values[n])[:num_best] for group in _group_by_kind(frames)
    ]
    return [[frames[n] for n in group] for group in groups]


def _refine_frame(frame: BoxFrame) -> list[BoxFrame]:
    steps = [FINE_STEP**step for step in range(-3, 4)]
    if frame.base != "fixed":
        return [
            replace(frame, frame_width=frame.frame_width * s, frame_height=frame.frame_height * s)
            for s in steps
        ]
    pairs = itertools.product(steps, steps)
    return [
        replace(frame, frame_width=frame.frame_width * x, frame_height=frame.frame_height * y)
        for x, y in pairs
    ]


def _best_frame(group: Sequence[int], scores: Floats) -> int:
    means = _mean_scores(scores[:, list(group)])
    return group[int(np.argmax(means))]
