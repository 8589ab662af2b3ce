"""Detect the true box convention of a data file from all its boxes and images.

Two kinds of evidence are compared for each alternative hypothesis.

Bounds. A box is impossible under a hypothesis if its corners are inverted, outside the image, or
below one pixel. Bounds favor an alternative if at least 5 % of the samples (and 10) have an
impossible box under the declared convention, while the alternative leaves at most 5 %, and at most
a quarter of those.

Images. The contrast across the sides of each box is measured on a downscaled image (see
`edge_contrast`) and, for comparison, on three other images of the file. Boxes around image content
score above 0. Boxes of a wrong hypothesis score 0 on average, independent of the layout. The sum
over the file, one vote per image, has a bound that holds for any number and size of votes (see
`image_evidence.hoeffding_bound`).

A hypothesis is accepted if all conditions hold:

1. Its boxes match their images with a false-positive probability below 1e-6 over all tested
  hypotheses.
2. Bounds favor it, or its boxes fit better than those of the declared convention (probability below
  3e-4), and on all sides, so that boxes drawn too large or too small are not mistaken for a resized
  image.
3. Half of the boxes overlap by less than 0.85 with the declared boxes.
4. Its boxes fit better than boxes stretched or shrunk by a tenth (named conventions), or best of
  about 1,500 candidate frames (resized images). Frames within 5 % of a named convention are that
  convention.

The declared convention is tested first. If its boxes match their images and are possible, no other
hypothesis is tested. Without images, or with inconclusive images, bounds are sufficient if a fifth
of the samples is impossible. Otherwise no issue is reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.check.box_hypothesis import (
    Bools,
    BoxClaim,
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    FrameBase,
    find_invalid_boxes,
    find_inverted_boxes,
    get_reference_side,
    hypothesis_from_convention,
    pairwise_iou,
    to_corners,
)
from finesight.check.convention_issue import (
    ConventionIssue,
    HypothesisComparison,
    build_convention_issue,
    build_mixed_issue,
)
from finesight.check.image_evidence import (
    MAX_SCORE,
    ImageEvidence,
    ImageOpener,
    min_z_score,
    open_edge_contrast,
)
from finesight.data.boxes import BoxConvention, BoxFormat, BoxUnits

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


MIN_SAMPLES = 20
"""Minimum number of samples for which a convention is tested."""

MAX_INVALID_FRACTION = 0.05
"""Maximum fraction of samples with impossible boxes that is attributed to annotation errors."""

MIN_INVALID_FRACTION = 0.2
"""Minimum fraction of samples with impossible boxes to report an issue without image evidence."""

STRETCH_FACTOR = 0.1
"""Fraction by which boxes are stretched and shrunk in a control test.

A hypothesis must fit its images better than the changed boxes.
"""

MAX_SAME_IOU = 0.85
"""Median overlap of the boxes of two hypotheses from which they are considered the same."""

MAX_FRAME_DIFF = 0.05
"""Relative difference in size below which two coordinate frames are considered the same."""

MIN_SIDE_SHIFT = 0.01
"""Minimum shift of a compared box side, as a fraction of the image."""

MIN_Z = 4.0
"""Minimum z score to prefer one hypothesis over another; its false-positive bound is 3e-4."""

BOX_UNITS: tuple[BoxUnits, ...] = ("pixel", "1000", "1")

BOX_FORMATS: tuple[BoxFormat, ...] = ("xyxy", "xywh", "cxcywh")


def find_convention_issues(
    claims: Sequence[BoxClaim], open_image: ImageOpener | None = open_edge_contrast
) -> list[ConventionIssue]:
    """Detect boxes of a data file whose convention differs from the declared one.

    Args:
        claims: Boxes as stored in the file.
        open_image: Function that opens an image for measurements; at most 300 images are opened.
            None uses only the bounds of the boxes.
    """
    issues: list[ConventionIssue] = []
    usable = [claim for claim in claims if np.isfinite(claim.coordinates).all()]
    for convention in dict.fromkeys(claim.convention for claim in usable):
        issues += _detect_convention(
            [claim for claim in usable if claim.convention == convention], open_image
        )
    return issues


def _detect_convention(
    claims: Sequence[BoxClaim], open_image: ImageOpener | None
) -> list[ConventionIssue]:
    """Detect a wrong convention among boxes with the same declared convention.

    Images with EXIF rotation are tested first and separately, because other images carry no
    information about it.
    """
    rotated = [claim for claim in claims if claim.orientation != 1]
    if _has_enough_samples(rotated):
        detector = ConventionDetector(BoxClaimTable(rotated), open_image)
        stored_hypothesis = BoxHypothesis(detector.declared.box_format, BoxFrame("stored"))
        if detector.claims.convention.units == "pixel":
            issue = detector.detect([stored_hypothesis], search_frames=False)
            if issue is not None:
                upright = [claim for claim in claims if claim.orientation == 1]
                return [issue, *_detect_convention(upright, open_image)]
    if not _has_enough_samples(claims):
        return []
    detector = ConventionDetector(BoxClaimTable(claims), open_image)
    issue = detector.detect(
        list(_iter_alternatives(detector.claims.convention)),
        search_frames=detector.claims.convention.units == "pixel",
    )
    return [] if issue is None else [issue]


def _has_enough_samples(claims: Sequence[BoxClaim]) -> bool:
    return len({(claim.location, claim.sample_id) for claim in claims}) >= MIN_SAMPLES


def _iter_alternatives(convention: BoxConvention) -> Iterator[BoxHypothesis]:
    """Yield all other combinations of box format and units, the most likely mistakes first."""
    box_formats = (
        convention.format,
        *(box_format for box_format in BOX_FORMATS if box_format != convention.format),
    )
    units = (convention.units, *(unit for unit in BOX_UNITS if unit != convention.units))
    for unit in units:
        for box_format in box_formats:
            alternative = BoxConvention(box_format, unit)
            if alternative != convention:
                yield hypothesis_from_convention(alternative)


class ConventionDetector:
    """Test the declared box convention of one data file against alternative hypotheses."""

    def __init__(self, claims: BoxClaimTable, open_image: ImageOpener | None) -> None:
        self.claims = claims
        self.declared = hypothesis_from_convention(claims.convention)
        evidence = ImageEvidence(claims, open_image) if open_image is not None else None
        self._evidence = evidence if evidence is not None and evidence.is_sufficient else None
        self._scores: dict[BoxHypothesis, Floats] = {}

    def detect(
        self, alternatives: Sequence[BoxHypothesis], *, search_frames: bool
    ) -> ConventionIssue | None:
        """Return an issue for the best alternative hypothesis that is accepted, or None.

        Args:
            alternatives: Hypotheses to test.
            search_frames: Also search for boxes that were annotated in resized images.
        """
        if self._count_invalid(self.declared) <= self._max_invalid_samples and self._is_supported(
            self.declared
        ):
            return None
        feasible = [
            alternative
            for alternative in alternatives
            if self._count_invalid(alternative) <= self._max_invalid_samples
        ]
        self._ensure_scores([self.declared, *feasible])
        for alternative in sorted(feasible, key=lambda alternative: -self._mean_score(alternative)):
            if self._is_supported(alternative, len(alternatives)) and self._is_preferred(
                alternative
            ):
                if not search_frames or not self._exceeds_thousandths(alternative):
                    return self._build_issue(alternative, len(alternatives))
                break
        if search_frames and self._evidence is not None:
            issue = self._detect_resized_frames(feasible)
            if issue is not None:
                return issue
        for alternative in feasible:
            if self._is_certain_by_bounds(alternative) and self._is_preferred(alternative):
                return self._build_issue(alternative, len(alternatives))
        return self._find_mixed_issue(alternatives)

    def _detect_resized_frames(self, feasible: Sequence[BoxHypothesis]) -> ConventionIssue | None:
        """Search for the best-fitting resized image size, and return an issue or None.

        A size close to a known hypothesis is attributed to that hypothesis.
        """
        assert self._evidence is not None, "a search without images"
        searches = [
            find_frame(self.claims, self._evidence, box_format)
            for box_format in self._list_feasible_formats()
        ]
        best = max(searches, key=lambda result: self._mean_score(result.hypothesis), default=None)
        if best is None or self._z_score(best.hypothesis) < min_z_score(best.num_tries):
            return None
        for hypothesis in (self.declared, *feasible):
            if hypothesis.box_format == best.hypothesis.box_format and self._is_same_frame(
                hypothesis, best.hypothesis
            ):
                is_better = hypothesis != self.declared and self._is_preferred(hypothesis)
                return self._build_issue(hypothesis, best.num_tries) if is_better else None
        return (
            self._build_issue(best.hypothesis, best.num_tries)
            if self._is_preferred(best.hypothesis)
            else None
        )

    def _is_same_frame(self, hypothesis: BoxHypothesis, candidate: BoxHypothesis) -> bool:
        """Return whether a candidate frame equals a known hypothesis within annotation accuracy.

        Coordinates in thousandths do not exceed 1000. If some do, the frame is a resized image of
        about that size.
        """
        if self._exceeds_thousandths(hypothesis):
            return False
        width, height = self.claims.width, self.claims.height
        pairs = zip(
            hypothesis.frame.compute_size(width, height),
            candidate.frame.compute_size(width, height),
            strict=True,
        )
        return all(
            abs(float(np.median(np.log(one / other)))) < MAX_FRAME_DIFF for one, other in pairs
        )

    def _list_feasible_formats(self) -> list[BoxFormat]:
        """Return the box formats that can be valid in some coordinate frame.

        This is only the declared format if few of its boxes are inverted.
        """

        def count_inverted(box_format: BoxFormat) -> int:
            inverted = find_inverted_boxes(to_corners(box_format, self.claims.coordinates))
            return self.claims.count_samples(inverted)

        if count_inverted(self.declared.box_format) <= self._max_invalid_samples:
            return [self.declared.box_format]
        return [
            box_format
            for box_format in BOX_FORMATS
            if count_inverted(box_format) <= self._max_invalid_samples
        ]

    # Evidence from the bounds of boxes

    @property
    def _max_invalid_samples(self) -> float:
        """Maximum number of samples with impossible boxes due to annotation errors."""
        return MAX_INVALID_FRACTION * self.claims.num_samples

    def _find_invalid(self, hypothesis: BoxHypothesis) -> Bools:
        return find_invalid_boxes(hypothesis.normalize_boxes(self.claims), self.claims)

    def _count_invalid(self, hypothesis: BoxHypothesis) -> int:
        return self.claims.count_samples(self._find_invalid(hypothesis))

    def _is_favored_by_bounds(self, alternative: BoxHypothesis) -> bool:
        """Return whether many boxes are impossible as declared but possible as the alternative."""
        num_declared, num_alternative = (
            self._count_invalid(self.declared),
            self._count_invalid(alternative),
        )
        return (
            num_declared >= max(10.0, self._max_invalid_samples)
            and 4 * num_alternative <= num_declared
        )

    def _exceeds_thousandths(self, hypothesis: BoxHypothesis) -> bool:
        """Return whether a hypothesis in thousandths has more than a few boxes beyond 1000."""
        frame = hypothesis.frame
        if frame.base != "fixed" or frame.frame_width != 1000:
            return False
        above: Bools = np.any(
            to_corners(hypothesis.box_format, self.claims.coordinates) > 1001, axis=1
        )
        return self.claims.count_samples(above) > 0.005 * self.claims.num_samples

    def _is_certain_by_bounds(self, alternative: BoxHypothesis) -> bool:
        """Return whether impossible boxes suffice as evidence for an alternative without images.

        Many declared boxes must be impossible. For thousandths, some boxes must also be close to
        the far end of the shorter image side; boxes in a resized image of the same aspect ratio are
        not.
        """
        if (
            not self._is_favored_by_bounds(alternative)
            or self._count_invalid(self.declared) < MIN_INVALID_FRACTION * self.claims.num_samples
        ):
            return False
        if alternative.frame.base != "fixed" or alternative.frame.frame_width == 1:
            return True
        normalized = alternative.normalize_boxes(self.claims)
        wide = self.claims.width >= self.claims.height
        return bool(max(np.where(wide, normalized[:, 3], normalized[:, 2])) > 0.9)

    # Evidence from images

    def _get_side_scores(self, hypothesis: BoxHypothesis) -> Floats:
        """Return the image scores [n, 2] of the tested boxes under a hypothesis.

        The columns are the left and upper sides, and the right and lower sides.
        """
        self._ensure_scores([hypothesis])
        return self._scores[hypothesis]

    def _ensure_scores(self, hypotheses: Sequence[BoxHypothesis]) -> None:
        """Compute the image scores of the hypotheses that have none, in one batch."""
        new = [hypothesis for hypothesis in hypotheses if hypothesis not in self._scores]
        if self._evidence is not None and new:
            rows = self._evidence.claim_rows
            boxes = np.stack(
                [hypothesis.normalize_boxes(self.claims)[rows] for hypothesis in new], axis=1
            )
            scores = self._evidence.score_boxes(boxes)
            self._scores.update((hypothesis, scores[:, n]) for n, hypothesis in enumerate(new))

    def _get_scores(self, hypothesis: BoxHypothesis) -> Floats:
        summed: Floats = self._get_side_scores(hypothesis).sum(axis=1)
        return summed

    def _z_score(self, hypothesis: BoxHypothesis) -> float:
        return (
            0.0 if self._evidence is None else self._evidence.z_score(self._get_scores(hypothesis))
        )

    def _mean_score(self, hypothesis: BoxHypothesis) -> float:
        """Return the mean image score of a hypothesis, 0 if there are no images."""
        if self._evidence is None:
            return 0.0
        scores = self._get_scores(hypothesis)
        is_valid = np.isfinite(scores)
        return (
            float(np.clip(scores[is_valid], -MAX_SCORE, MAX_SCORE).mean())
            if is_valid.any()
            else -MAX_SCORE
        )

    def _compare(self, hypothesis: BoxHypothesis, other: BoxHypothesis) -> float:
        """Return the z score by which one hypothesis fits the images better than another."""
        if self._evidence is None:
            return 0.0
        return self._evidence.z_score(self._get_scores(hypothesis) - self._get_scores(other))

    def _is_better(self, hypothesis: BoxHypothesis, other: BoxHypothesis) -> bool:
        return self._compare(hypothesis, other) >= MIN_Z

    def _is_refuted(self, alternative: BoxHypothesis) -> bool:
        return self._is_better(self.declared, alternative)

    def _is_supported(self, hypothesis: BoxHypothesis, num_tries: int = 1) -> bool:
        """Return whether boxes match their images, and better than stretched or shrunk boxes."""
        if self._evidence is None or self._z_score(hypothesis) < min_z_score(num_tries):
            return False
        normalized = hypothesis.normalize_boxes(self.claims)[self._evidence.claim_rows]
        less, more = 1 - STRETCH_FACTOR, 1 + STRETCH_FACTOR
        factors = np.array([(less, 1), (1, less), (more, 1), (1, more)])
        stretched = self._evidence.score_boxes(normalized[:, None] * np.tile(factors, 2))
        differences = self._get_scores(hypothesis)[:, None] - stretched.sum(axis=2)
        return all(
            self._evidence.z_score(differences[:, factor_index]) >= MIN_Z / 2
            for factor_index in range(len(factors))
            if np.isfinite(differences[:, factor_index]).sum() >= MIN_SAMPLES
        )

    def _is_preferred(self, alternative: BoxHypothesis) -> bool:
        """Return whether an alternative is better than the declared convention, and different.

        It is better by bounds, or by images on all sides. It is different if the median overlap of
        the boxes is below `MAX_SAME_IOU`.
        """
        ious = pairwise_iou(
            self.declared.normalize_boxes(self.claims), alternative.normalize_boxes(self.claims)
        )
        if float(np.median(ious)) >= MAX_SAME_IOU:
            return False
        if self._is_favored_by_bounds(alternative):
            return not self._is_refuted(alternative)
        return self._is_better(alternative, self.declared) and self._improves_all_sides(alternative)

    def _improves_all_sides(self, alternative: BoxHypothesis) -> bool:
        """Return whether an alternative fits the images better on all sides that it shifts.

        A frame that only compensates for boxes drawn too large or too small improves two sides and
        worsens the other two.
        """
        assert self._evidence is not None, "a comparison without images"
        gains = self._get_side_scores(alternative) - self._get_side_scores(self.declared)
        rows = self._evidence.claim_rows
        shifts = np.abs(
            alternative.normalize_boxes(self.claims) - self.declared.normalize_boxes(self.claims)
        )[rows]
        is_shifted = shifts.reshape(-1, 2, 2).max(axis=2) > MIN_SIDE_SHIFT
        return all(
            self._evidence.z_score(gain, rows) >= MIN_Z / 2
            for gain, rows in zip(gains.T, is_shifted.T, strict=True)
            if np.isfinite(gain[rows]).sum() >= MIN_SAMPLES
        )

    # Construction of issues

    def _build_issue(self, alternative: BoxHypothesis, num_tries: int) -> ConventionIssue:
        return build_convention_issue(self._compare_hypotheses(alternative, num_tries))

    def _compare_hypotheses(
        self, alternative: BoxHypothesis, num_tries: int
    ) -> HypothesisComparison:
        declared_invalid, alternative_invalid = (
            self._find_invalid(self.declared),
            self._find_invalid(alternative),
        )
        comparison = HypothesisComparison(
            self.claims,
            self.declared,
            alternative,
            declared_invalid,
            alternative_invalid,
            num_tries,
        )
        if self._evidence is None:
            return comparison
        return comparison.with_evidence(
            self._evidence, self._get_scores(self.declared), self._get_scores(alternative)
        )

    def _find_mixed_issue(self, alternatives: Sequence[BoxHypothesis]) -> ConventionIssue | None:
        """Detect a data file in which some boxes follow one convention and the rest another."""
        min_samples = max(MIN_SAMPLES, 2 * MAX_INVALID_FRACTION * self.claims.num_samples)
        declared_invalid = self._find_invalid(self.declared)
        if self._evidence is None or self.claims.count_samples(declared_invalid) < min_samples:
            return None
        for alternative in alternatives:
            alternative_invalid = self._find_invalid(alternative)
            num_both_invalid = self.claims.count_samples(declared_invalid & alternative_invalid)
            if (
                self.claims.count_samples(alternative_invalid) < min_samples
                or num_both_invalid > MAX_INVALID_FRACTION * self.claims.num_samples
            ):
                continue
            rows = self._evidence.claim_rows
            alternative_z = self._evidence.z_score(
                self._get_scores(alternative), declared_invalid[rows]
            )
            declared_z = self._evidence.z_score(
                self._get_scores(self.declared), alternative_invalid[rows]
            )
            if alternative_z >= min_z_score(len(alternatives)) and declared_z >= MIN_Z:
                return build_mixed_issue(self._compare_hypotheses(alternative, len(alternatives)))
        return None
