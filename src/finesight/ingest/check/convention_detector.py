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
`box_hypothesis.hoeffding_bound`).

A hypothesis is accepted if all conditions hold:

1. Its boxes match their images with a false-positive probability below 1e-6 over all tested
  hypotheses.
2. Bounds favor it, or its boxes fit better than those of the declared convention (probability below
  3e-4), and on all sides, so that boxes drawn too large or too small are not mistaken for a resized
  image.
3. Half of the boxes overlap by less than 0.85 with the declared boxes.
4. Its boxes fit better than boxes stretched or shrunk by a tenth (named conventions), or best of
  the candidate frames (resized images, see `find_frame`). Frames within 5 % of a named convention
  are that convention.

The declared convention is tested first. If its boxes match their images and are possible, no other
hypothesis is tested. Without images, or with inconclusive images, bounds are sufficient if a fifth
of the samples is impossible. Otherwise no issue is reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.ingest.check.box_hypothesis import (
    MAX_SCORE,
    NUM_CONTROLS,
    Bools,
    BoxClaim,
    BoxClaimTable,
    ImageEvidence,
    ImageOpener,
    find_invalid_boxes,
    find_inverted_boxes,
    hoeffding_bound,
    min_z_score,
    normalize_boxes,
    open_edge_contrast,
)
from finesight.ingest.check.check_issues import CheckIssue
from finesight.samples.boxes import pairwise_iou
from finesight.samples.frames import (
    ORDERS,
    PIXELS,
    UNIT_FRAMES,
    BoxFrame,
    Floats,
    Order,
    Unit,
    divide_by_size,
    get_reference_side,
    to_corner_table,
)

MIN_SCORE_DIFF = 2.0
"""Minimum difference of image scores with which a sample favors one of two hypotheses."""

_FORMAT_NAMES = {
    "xyxy": "two corners (x1, y1, x2, y2)",
    "xywh": "a corner and a size (x, y, width, height)",
    "cxcywh": "a center and a size (x, y, width, height)",
    "yxyx": "two corners with y first (y1, x1, y2, x2)",
}
_UNIT_NAMES: dict[Unit, str] = {
    "pixel": "pixels",
    "resized": "pixels of the image as Qwen2.5-VL resizes it",
    "1": "fractions of the image",
    "100": "percent of the image",
    "1000": "thousandths of the image",
}
_UNIT_CODES: dict[Unit, str] = {
    "pixel": "pixels",
    "resized": "resized",
    "1": "normalized",
    "100": "percent",
    "1000": "thousandths",
}


@dataclass(frozen=True, slots=True)
class ConventionIssue:
    """A data file whose boxes follow another convention than declared.

    Attributes:
        hypothesis: The detected meaning of the coordinates; `description` is its text.
        num_invalid: Number of the `num_samples` that have an impossible box under the declared
            convention.
        options: Command-line options that declare the detected convention.
    """

    code: str
    hypothesis: BoxFrame
    description: str
    num_samples: int
    num_invalid: int
    undecided_fraction: float
    summary: str
    evidence: tuple[str, ...]
    options: str = ""
    manual_fix: str = ""

    def to_check_issue(self, source: str, *, takes_options: bool = True) -> CheckIssue:
        """Convert to an issue of the full data file.

        Args:
            takes_options: Whether the format accepts box options. Files of samples do not: their
                boxes are always two corners in pixels.
        """
        prefix = "give" if takes_options else "import the original data again, with"
        options = f"{prefix} {self.options}" if self.options else ""
        return CheckIssue(
            self.code,
            source,
            f"the boxes are {self.description}: {self.summary}",
            "; ".join(filter(None, [options, self.manual_fix])),
            source=source,
            evidence=self.evidence,
        )


class HypothesisComparison:
    """Comparison of the declared box convention with an alternative hypothesis.

    Args:
        num_tries: Number of tested hypotheses, which increases the false-positive probability.
        evidence: Measured images, with the image scores of both hypotheses; None without images.
    """

    def __init__(
        self,
        claims: BoxClaimTable,
        declared: BoxFrame,
        alternative: BoxFrame,
        num_tries: int,
        evidence: tuple[ImageEvidence, Floats, Floats] | None,
    ) -> None:
        self.claims, self.alternative, self.total = claims, alternative, claims.num_samples
        boxes = [normalize_boxes(hypothesis, claims) for hypothesis in (declared, alternative)]
        declared_invalid, alternative_invalid = (find_invalid_boxes(one, claims) for one in boxes)
        self.num_invalid = claims.count_samples(declared_invalid)
        self.num_alternative_invalid = claims.count_samples(alternative_invalid)
        self.undecided_fraction = 1 - self.num_invalid / self.total
        assert declared.unit is not None, "an import accepts only units that have a name"
        declared_form = _FORMAT_NAMES[declared.order]
        self.declared_name = f"{declared_form} in {_UNIT_NAMES[declared.unit]}"
        self.p_value_text, self.votes = "", ""
        self.image_lines: list[str] = []
        if evidence is not None:
            is_same = pairwise_iou(*boxes) > 0.95
            self._add_image_evidence(*evidence, is_same, declared_invalid, num_tries)

    def _add_image_evidence(
        self,
        evidence: ImageEvidence,
        declared_scores: Floats,
        alternative_scores: Floats,
        is_same: NDArray[np.bool_],
        declared_invalid: NDArray[np.bool_],
        num_tries: int,
    ) -> None:
        """Let the images of samples that are possible both ways vote for a hypothesis."""
        rows = evidence.claim_rows
        sample_index = self.claims.sample_index
        is_undecided = ~np.isin(sample_index[rows], sample_index[declared_invalid])
        difference = np.where(is_same[rows], 0.0, alternative_scores - declared_scores)
        is_used = is_undecided & np.isfinite(difference)
        samples, positions = np.unique(sample_index[rows[is_used]], return_inverse=True)
        counts = np.maximum(np.bincount(positions, minlength=len(samples)), 1)
        means = np.bincount(positions, difference[is_used], len(samples)) / counts
        num_for_alternative = int((means >= MIN_SCORE_DIFF).sum())
        num_for_declared = int((means <= -MIN_SCORE_DIFF).sum())
        num_tested = len(np.unique(sample_index[rows[is_undecided]]))

        p_value = hoeffding_bound(evidence.z_score(alternative_scores), num_tries)
        self.p_value_text = f"below {max(p_value, 1e-12):.0e}" if p_value < 1 else "not excluded"
        num_images = len(np.unique(evidence.image_of_claim))
        if num_images:
            positive = [
                float((scores[np.isfinite(scores)] > 0).mean()) if np.isfinite(scores).any() else 0
                for scores in (declared_scores, alternative_scores)
            ]
            self.image_lines.append(
                f"measured on {num_images} images, the sides of the detected boxes are on edges"
                f" better than in other images for {100 * positive[1]:.0f} % (false-positive"
                f" probability: {self.p_value_text}), and as declared for {100 * positive[0]:.0f} %"
                " of the possible boxes; chance level is 50 %"
            )
        if num_tested:
            self.undecided_fraction *= 1 - (num_for_alternative + num_for_declared) / num_tested
            self.votes = (
                f"of {num_tested} tested samples that are possible both ways,"
                f" {num_for_alternative} fit their image better as detected,"
                f" {num_for_declared} as declared"
            )
            self.image_lines.append(self.votes)

    def build_issue(self) -> ConventionIssue:
        """Build the issue of a data file whose boxes follow the alternative hypothesis."""
        code, description, options, manual_fix = self._describe_alternative()
        invalid_share = _format_share(self.num_invalid, self.total)
        summary = self.votes
        if self.num_invalid >= 0.1 * self.total or not self.votes:
            summary = f"{invalid_share} have a box that is impossible as declared"
        undecided = f"{100 * self.undecided_fraction:.0f} % of the samples are undecided"
        evidence = (
            f"{invalid_share} have a box that is impossible as {self.declared_name} (inverted,"
            " outside the image, or below one pixel); as detected,"
            f" {self.num_alternative_invalid} do",
            *self.image_lines,
            undecided,
        )
        counts = self.total, self.num_invalid, self.undecided_fraction
        summary += f"; {undecided}"
        return ConventionIssue(
            code, self.alternative, description, *counts, summary, evidence, options, manual_fix
        )

    def build_mixed_issue(self) -> ConventionIssue:
        """Build the issue of a data file that mixes both conventions."""
        _, description, *_ = self._describe_alternative()
        shares = [
            _format_share(count, self.total)
            for count in (self.num_invalid, self.num_alternative_invalid)
        ]
        counts = f"{shares[0]} cannot be {self.declared_name}, {shares[1]} cannot be {description}"
        probability = f"(false-positive probability: {self.p_value_text})"
        num_decided = self.num_invalid + self.num_alternative_invalid
        return ConventionIssue(
            "boxes-mixed",
            self.alternative,
            f"partly {self.declared_name}, partly {description}",
            self.total,
            self.num_invalid,
            max(0.0, 1 - num_decided / self.total),
            counts,
            (counts, f"image evidence: the former fit as {description} {probability}"),
            manual_fix="separate the rows by origin, and import them as two files",
        )

    def _describe_alternative(self) -> tuple[str, str, str, str]:
        """Return issue code, description, command-line options and manual steps."""
        declared, frame = self.claims.frame, self.alternative
        box_format = frame.order
        form = _FORMAT_NAMES[box_format]
        option = "" if box_format == declared.order else f"--box-format {box_format}"
        if frame.base == "stored":
            return (
                "boxes-before-exif-rotation",
                f"{form} in coordinates of the stored image, before EXIF rotation",
                "",
                "rotate the boxes like their image; or keep them and remove the rotation (EXIF tag"
                " Orientation) from the images",
            )
        units = frame.unit
        if units is None:
            return (
                "boxes-resized",
                f"{form} in pixels of a resized image, {_describe_frame(frame, self.claims)}",
                option,
                "scale the boxes to the referenced image: x by its width divided by the resized"
                " width, y by its height divided by the resized height; or reference the resized"
                " images",
            )
        description = f"{form} in {_UNIT_NAMES[units]}"
        if units == declared.unit:
            return f"boxes-{box_format}", description, option, ""
        options = f"{option} --box-units {units}".strip()
        return f"boxes-{_UNIT_CODES[units]}", description, options, ""


def _format_share(count: int, total: int) -> str:
    return f"{count} of {total} samples ({100 * count / total:.0f} %)"


def _describe_frame(frame: BoxFrame, claims: BoxClaimTable) -> str:
    """Describe the size of the resized images."""
    width, height = frame.width, frame.height
    if frame.base == "fixed":
        text = f"about {width:.0f} x {height:.0f}"
        image_width, image_height = claims.width[0], claims.height[0]
        if (claims.width == image_width).all() and (claims.height == image_height).all():
            text += f" ({width / image_width:.2f} x {height / image_height:.2f} of the size)"
        return text
    if frame.base == "factor":
        return f"about {width:.3g} times the size"
    description = {
        "longest": f"the longest side about {width:.3g}",
        "shortest": f"the shortest side about {width:.3g}",
        "pixels": f"about {width**2:.2g} pixels in all",
    }[frame.base]
    if frame.side_multiple > 1:
        description += f", sides in multiples of {frame.side_multiple}"
    return description + (", smaller images not enlarged" if frame.is_capped else "")


NUM_SIZES = 33

COARSE_STEP = 1.03
"""Ratio between consecutive candidate sizes.

The smallest candidate just contains all boxes. In frames of more than 2.6 times its size, all boxes
would be in one corner.
"""

FINE_STEPS = tuple(1.005**step for step in range(-3, 4))
"""Factors of the sizes that are tested around the best candidate of each resize rule."""

MAX_ROUNDS = 3
"""Maximum number of searches for the width, and then for the height, of a fixed size."""

NUM_COARSE_IMAGES = 60
"""Number of images on which the sizes in steps of 3 % are compared."""

OUTLIER_FRACTION = 0.01
"""Fraction of boxes that may be outside of a candidate frame."""

RESIZE_RULES = (
    BoxFrame(base="factor"),
    BoxFrame(base="longest"),
    BoxFrame(base="shortest"),
    BoxFrame(base="pixels"),
    BoxFrame(base="longest", is_capped=True),
    BoxFrame(base="pixels", is_capped=True),
    BoxFrame(base="pixels", side_multiple=28),
    BoxFrame(base="pixels", is_capped=True, side_multiple=28),
)
"""Rules of one number that preserve the aspect ratio, exactly or except for rounding."""

MIN_Z_GAIN = 3.0
"""Minimum z score to prefer a more complex resize rule over a simpler one."""


@dataclass(frozen=True)
class FrameScorer:
    """Image scores of boxes under candidate frames.

    Attributes:
        corners: Two corners of each box [N, 4] in the unknown unit.
    """

    claims: BoxClaimTable
    corners: Floats
    evidence: ImageEvidence
    num_controls: int

    def find_best(self, groups: Sequence[Sequence[BoxFrame]]) -> dict[BoxFrame, Floats]:
        """Return the best frame of each group with its scores [n] of the measured boxes.

        Many frames take little more time than one, because the images are prepared in each call.
        """
        frames = list(itertools.chain.from_iterable(groups))
        rows = self.evidence.claim_rows
        height, width = self.claims.height[rows], self.claims.width[rows]
        sizes = [frame.compute_size(height, width) for frame in frames]
        boxes = np.stack([divide_by_size(self.corners[rows], *size) for size in sizes], axis=1)
        sums = self.evidence.score_boxes(boxes, self.num_controls).sum(axis=2)
        scores = dict(zip(frames, sums.T, strict=True))
        best = [max(group, key=lambda frame: _mean_score(scores[frame])) for group in groups]
        return {frame: scores[frame] for frame in best}


def find_frame(
    claims: BoxClaimTable, evidence: ImageEvidence, order: Order
) -> tuple[BoxFrame, int]:
    """Find the coordinate frame in which boxes in an order fit their images best.

    Returns it with the number of frames from which it was chosen, which increases the
    false-positive probability.

    The best size of each resize rule is found in steps of 3 %, then in finer steps. The simplest of
    the rules that fit equally well is returned. A fixed size is the last of them, as it has two
    numbers.
    """
    corners = to_corner_table(order, claims.coordinates)
    coarse = FrameScorer(claims, corners, evidence.take(NUM_COARSE_IMAGES), num_controls=1)
    seeds: list[BoxFrame] = []
    if np.ptp(claims.width) > 0 or np.ptp(claims.height) > 0:
        # The rules are equivalent to a fixed size if all images have the same size.
        seeds.extend(coarse.find_best(_list_rule_frames(claims, order, corners)))
    seeds.append(_find_fixed_frame(coarse, order))

    fine = FrameScorer(claims, corners, evidence, NUM_CONTROLS)
    groups = [_list_similar_frames(seed) for seed in seeds]
    scores = fine.find_best(groups)
    best, *others = scores
    for other in others:
        if evidence.z_score(scores[other] - scores[best]) > MIN_Z_GAIN:
            best = other
    # Any pair of sides could have been found, although few pairs are scored.
    num_coarse = NUM_SIZES * len(others) + NUM_SIZES**2
    return best, num_coarse + sum(len(group) for group in groups)


def _list_rule_frames(claims: BoxClaimTable, order: Order, corners: Floats) -> list[list[BoxFrame]]:
    """Return the candidate frames of each resize rule with the aspect ratio of each image."""
    extent = np.maximum(corners[:, 2] / claims.width, corners[:, 3] / claims.height)
    groups = []
    for rule in RESIZE_RULES:
        if rule.is_capped and _max_extent(extent) > 1.01:
            continue
        sizes = _list_sizes(extent * get_reference_side(rule.base, claims.height, claims.width))
        groups.append([replace(rule, order=order, width=size, height=size) for size in sizes])
    return groups


def _find_fixed_frame(scorer: FrameScorer, order: Order) -> BoxFrame:
    """Find the size of all images, of which the width and the height take turns.

    All pairs of sides would be many frames. The left and right sides of boxes fit edges even if the
    height is not known yet.
    """
    widths = _list_sizes(scorer.corners[:, 2])
    heights = _list_sizes(scorer.corners[:, 3])
    best = BoxFrame(order, "fixed", widths[0], heights[0])
    for _ in range(MAX_ROUNDS):
        previous = best
        (best,) = scorer.find_best([[replace(best, width=width) for width in widths]])
        (best,) = scorer.find_best([[replace(best, height=height) for height in heights]])
        if best == previous:
            break
    return best


def _list_similar_frames(frame: BoxFrame) -> list[BoxFrame]:
    steps = [(step, step) for step in FINE_STEPS]
    if frame.base == "fixed":
        steps = list(itertools.product(FINE_STEPS, FINE_STEPS))
    return [replace(frame, width=frame.width * x, height=frame.height * y) for x, y in steps]


def _list_sizes(extents: Floats) -> list[float]:
    """Return candidate sizes of frames that contain the ends of nearly all boxes."""
    return [0.99 * _max_extent(extents) * COARSE_STEP**step for step in range(NUM_SIZES)]


def _max_extent(extents: Floats) -> float:
    return max(float(np.quantile(extents, 1 - OUTLIER_FRACTION)), 1e-3)


def _mean_score(scores: Floats) -> float:
    """Return the mean score of boxes, or minus infinity if too many are outside of their image."""
    is_inside = np.isfinite(scores)
    if is_inside.mean() <= 1 - 3 * OUTLIER_FRACTION:
        return -math.inf
    return float(np.clip(scores[is_inside], -MAX_SCORE, MAX_SCORE).mean())


MIN_SAMPLES = 20

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
"""Mean relative difference in size below which two coordinate frames are considered the same."""

MIN_SIDE_SHIFT = 0.01
"""Minimum shift of a compared box side, as a fraction of the image."""

MIN_Z = 4.0
"""Minimum z score to prefer one hypothesis over another; its false-positive bound is 3e-4."""

BOX_UNITS: tuple[Unit, ...] = ("pixel", "1000", "1", "100")


def find_convention_issues(
    claims: Sequence[BoxClaim], open_image: ImageOpener | None = open_edge_contrast
) -> list[ConventionIssue]:
    """Detect boxes of a data file whose convention differs from the declared one.

    Args:
        open_image: Function that opens an image for measurements; at most 300 images are opened.
            None uses only the bounds of the boxes.
    """
    issues: list[ConventionIssue] = []
    usable = [claim for claim in claims if np.isfinite(claim.coordinates).all()]
    for declared in dict.fromkeys(claim.frame for claim in usable):
        group = [claim for claim in usable if claim.frame == declared]
        # Images with EXIF rotation are tested first and separately, because other images carry no
        # information about it.
        rotated = [claim for claim in group if claim.orientation != 1]
        if declared.base == "image" and has_enough_samples(rotated):
            detector = ConventionDetector(BoxClaimTable(rotated), open_image)
            stored = BoxFrame(declared.order, "stored")
            if issue := detector.detect([stored], search_frames=False):
                issues.append(issue)
                group = [claim for claim in group if claim.orientation == 1]
        if has_enough_samples(group):
            detector = ConventionDetector(BoxClaimTable(group), open_image)
            search_frames = declared.base == "image"
            if issue := detector.detect(detector.list_alternatives(), search_frames=search_frames):
                issues.append(issue)
    return issues


def has_enough_samples(claims: Sequence[BoxClaim]) -> bool:
    """Return whether the boxes are from `MIN_SAMPLES` samples, the minimum of a test."""
    return len({(claim.location, claim.sample_id) for claim in claims}) >= MIN_SAMPLES


class ConventionDetector:
    """Test the declared box convention of one data file against alternative hypotheses."""

    def __init__(self, claims: BoxClaimTable, open_image: ImageOpener | None) -> None:
        self.claims = claims
        self.declared = claims.frame
        evidence = ImageEvidence(claims, open_image) if open_image is not None else None
        self._evidence = evidence if evidence is not None and evidence.is_sufficient else None
        self._scores: dict[BoxFrame, Floats] = {}
        self._max_invalid_samples = MAX_INVALID_FRACTION * claims.num_samples
        """Maximum number of samples with impossible boxes due to annotation errors."""

    def list_alternatives(self) -> list[BoxFrame]:
        """Return all other combinations of box format and units, the most likely mistakes first.

        Pixels of the resized image are omitted if few images are enlarged or reduced.
        """
        declared = self.declared
        frames = [replace(declared, order="xyxy"), *(UNIT_FRAMES[unit] for unit in BOX_UNITS)]
        resized = UNIT_FRAMES["resized"]
        if not self._is_same(resized, PIXELS):
            frames.append(resized)
        orders = sorted(ORDERS, key=lambda order: order != declared.order)
        alternatives = []
        for frame in dict.fromkeys(frames):
            alternatives += [replace(frame, order=order) for order in orders]
        alternatives.remove(declared)
        return alternatives

    def detect(
        self, alternatives: Sequence[BoxFrame], *, search_frames: bool
    ) -> ConventionIssue | None:
        """Return an issue for the best alternative hypothesis that is accepted, or None.

        Args:
            search_frames: Also search for boxes that were annotated in resized images.
        """
        num_tries = len(alternatives)
        is_possible = self._count_invalid(self.declared) <= self._max_invalid_samples
        if is_possible and self._is_supported(self.declared):
            return None
        feasible = [
            one for one in alternatives if self._count_invalid(one) <= self._max_invalid_samples
        ]
        self._ensure_scores([self.declared, *feasible])
        supported = None
        for alternative in sorted(feasible, key=lambda one: -self._mean_score(one)):
            if self._is_supported(alternative, num_tries) and self._is_preferred(alternative):
                supported = alternative
                break
        # A resized copy is similar to thousandths or percent if its sides are about 1000 or 100.
        if search_frames and (supported is None or supported.unit not in ("pixel", "1")):
            if supported is not None and self._exceeds_thousandths(supported):
                supported = None
            if issue := self._detect_resized_frames(feasible, supported):
                return issue
        if supported is not None:
            return self._compare(supported, num_tries).build_issue()
        for alternative in feasible:
            if self._is_certain_by_bounds(alternative) and self._is_preferred(alternative):
                return self._compare(alternative, num_tries).build_issue()
        return self._find_mixed_issue(alternatives)

    def _detect_resized_frames(
        self, feasible: Sequence[BoxFrame], supported: BoxFrame | None
    ) -> ConventionIssue | None:
        """Search for the best-fitting resized image size, and return an issue or None.

        A size close to a known hypothesis is attributed to that hypothesis.

        Args:
            supported: Known hypothesis that fits the images, and remains unless a size fits better.
        """
        if self._evidence is None:
            return None
        # Corners that are inverted in one frame are inverted in any, so the search needs no format
        # with many of them. The declared format needs no alternative unless it has many.
        box_formats = [
            box_format
            for box_format in (self.declared.order, *ORDERS)
            if self.claims.count_samples(
                find_inverted_boxes(to_corner_table(box_format, self.claims.coordinates))
            )
            <= self._max_invalid_samples
        ]
        if self.declared.order in box_formats:
            box_formats = [self.declared.order]
        searches = [find_frame(self.claims, self._evidence, one) for one in box_formats]
        best, num_tries = max(searches, key=lambda one: self._mean_score(one[0]), default=(None, 0))
        if best is None or self._z_score(best) < min_z_score(num_tries):
            return None
        found = next((o for o in (self.declared, *feasible) if self._is_same(o, best)), best)
        if supported is not None and self._z_score(best, supported) <= MIN_Z_GAIN:
            found = supported
        if found == self.declared or not self._is_preferred(found):
            return None
        return self._compare(found, num_tries).build_issue()

    def _is_same(self, hypothesis: BoxFrame, candidate: BoxFrame) -> bool:
        """Return whether a searched frame equals a known hypothesis within annotation accuracy.

        Coordinates in thousandths do not exceed 1000. If some do, the frame is a resized image of
        about that size.
        """
        if hypothesis.order != candidate.order or self._exceeds_thousandths(hypothesis):
            return False
        sizes = (
            one.compute_size(self.claims.height, self.claims.width)
            for one in (hypothesis, candidate)
        )
        return all(
            float(np.abs(np.log(one / other)).mean()) < MAX_FRAME_DIFF
            for one, other in zip(*sizes, strict=True)
        )

    def _find_invalid(self, hypothesis: BoxFrame) -> Bools:
        return find_invalid_boxes(normalize_boxes(hypothesis, self.claims), self.claims)

    def _count_invalid(self, hypothesis: BoxFrame) -> int:
        return self.claims.count_samples(self._find_invalid(hypothesis))

    def _is_favored_by_bounds(self, alternative: BoxFrame) -> bool:
        """Return whether many boxes are impossible as declared but possible as the alternative."""
        num_declared = self._count_invalid(self.declared)
        is_often_invalid = num_declared >= max(10.0, self._max_invalid_samples)
        return is_often_invalid and 4 * self._count_invalid(alternative) <= num_declared

    def _exceeds_thousandths(self, hypothesis: BoxFrame) -> bool:
        """Return whether a hypothesis in thousandths has more than a few boxes beyond 1000."""
        corners = to_corner_table(hypothesis.order, self.claims.coordinates)
        is_above: Bools = np.any(corners > 1001, axis=1)
        num_above = self.claims.count_samples(is_above)
        return hypothesis.unit == "1000" and num_above > 0.005 * self.claims.num_samples

    def _is_certain_by_bounds(self, alternative: BoxFrame) -> bool:
        """Return whether impossible boxes suffice as evidence for an alternative without images.

        Many declared boxes must be impossible. For thousandths, some boxes must also be close to
        the far end of the shorter image side; boxes in a resized image of the same aspect ratio are
        not.
        """
        claims = self.claims
        num_declared = self._count_invalid(self.declared)
        is_often_invalid = num_declared >= MIN_INVALID_FRACTION * claims.num_samples
        if not is_often_invalid or not self._is_favored_by_bounds(alternative):
            return False
        if alternative.order == "yxyx" or alternative.unit == "100":
            # The bounds are those of images that lost their rotation, or of a small copy, too.
            return False
        boxes = normalize_boxes(alternative, claims)
        far_ends = np.where(claims.width >= claims.height, boxes[:, 3], boxes[:, 2])
        return alternative.unit != "1000" or float(far_ends.max()) > 0.9

    def _ensure_scores(self, hypotheses: Sequence[BoxFrame]) -> None:
        """Compute the image scores of the hypotheses that have none, in one batch.

        The scores [n, 2] of the tested boxes are those of the left and upper sides, and of the
        right and lower sides.
        """
        new = [hypothesis for hypothesis in hypotheses if hypothesis not in self._scores]
        if self._evidence is not None and new:
            rows = self._evidence.claim_rows
            boxes = [normalize_boxes(hypothesis, self.claims)[rows] for hypothesis in new]
            scores = self._evidence.score_boxes(np.stack(boxes, axis=1))
            self._scores.update((hypothesis, scores[:, n]) for n, hypothesis in enumerate(new))

    def _get_scores(self, hypothesis: BoxFrame) -> Floats:
        self._ensure_scores([hypothesis])
        summed: Floats = self._scores[hypothesis].sum(axis=1)
        return summed

    def _z_score(self, hypothesis: BoxFrame, other: BoxFrame | None = None) -> float:
        """Return the z score of a hypothesis, or that by which it fits better than another."""
        if self._evidence is None:
            return 0.0
        baseline = 0.0 if other is None else self._get_scores(other)
        return self._evidence.z_score(self._get_scores(hypothesis) - baseline)

    def _mean_score(self, hypothesis: BoxFrame) -> float:
        """Return the mean image score of a hypothesis, 0 if there are no images."""
        if self._evidence is None:
            return 0.0
        scores = self._get_scores(hypothesis)
        clipped = np.clip(scores[np.isfinite(scores)], -MAX_SCORE, MAX_SCORE)
        return float(clipped.mean()) if len(clipped) else -MAX_SCORE

    def _is_supported(self, hypothesis: BoxFrame, num_tries: int = 1) -> bool:
        """Return whether boxes match their images, and better than stretched or shrunk boxes."""
        if self._evidence is None or self._z_score(hypothesis) < min_z_score(num_tries):
            return False
        normalized = normalize_boxes(hypothesis, self.claims)[self._evidence.claim_rows]
        less, more = 1 - STRETCH_FACTOR, 1 + STRETCH_FACTOR
        factors = np.array([(less, 1), (1, less), (more, 1), (1, more)])
        stretched = self._evidence.score_boxes(normalized[:, None] * np.tile(factors, 2))
        differences = self._get_scores(hypothesis)[:, None] - stretched.sum(axis=2)
        return all(
            self._evidence.z_score(difference) >= MIN_Z / 2
            for difference in differences.T
            if np.isfinite(difference).sum() >= MIN_SAMPLES
        )

    def _is_preferred(self, alternative: BoxFrame) -> bool:
        """Return whether an alternative is better than the declared convention, and different.

        It is better by bounds, or by images on all sides that it shifts: a frame that only
        compensates for boxes drawn too large or too small improves two sides and worsens the other
        two. It is different if the median overlap of the boxes is below `MAX_SAME_IOU`.
        """
        declared, claims = self.declared, self.claims
        boxes, declared_boxes = (normalize_boxes(one, claims) for one in (alternative, declared))
        if float(np.median(pairwise_iou(declared_boxes, boxes))) >= MAX_SAME_IOU:
            return False
        if self._is_favored_by_bounds(alternative):
            return self._z_score(declared, alternative) < MIN_Z
        if self._evidence is None or self._z_score(alternative, declared) < MIN_Z:
            return False
        gains = self._scores[alternative] - self._scores[declared]
        shifts = np.abs(boxes - declared_boxes)[self._evidence.claim_rows]
        is_shifted = shifts.reshape(-1, 2, 2).max(axis=2) > MIN_SIDE_SHIFT
        return all(
            self._evidence.z_score(gain, rows) >= MIN_Z / 2
            for gain, rows in zip(gains.T, is_shifted.T, strict=True)
            if np.isfinite(gain[rows]).sum() >= MIN_SAMPLES
        )

    def _compare(self, alternative: BoxFrame, num_tries: int) -> HypothesisComparison:
        evidence = None
        if self._evidence is not None:
            scores = self._get_scores(self.declared), self._get_scores(alternative)
            evidence = self._evidence, *scores
        return HypothesisComparison(self.claims, self.declared, alternative, num_tries, evidence)

    def _find_mixed_issue(self, alternatives: Sequence[BoxFrame]) -> ConventionIssue | None:
        """Detect a data file in which some boxes follow one convention and the rest another."""
        count_samples, evidence = self.claims.count_samples, self._evidence
        min_samples = max(MIN_SAMPLES, 2 * self._max_invalid_samples)
        declared_invalid = self._find_invalid(self.declared)
        if evidence is None or count_samples(declared_invalid) < min_samples:
            return None
        rows, num_tries = evidence.claim_rows, len(alternatives)
        for alternative in alternatives:
            invalid = self._find_invalid(alternative)
            num_both = count_samples(declared_invalid & invalid)
            if count_samples(invalid) < min_samples or num_both > self._max_invalid_samples:
                continue
            z = evidence.z_score(self._get_scores(alternative), declared_invalid[rows])
            declared_z = evidence.z_score(self._get_scores(self.declared), invalid[rows])
            if z >= min_z_score(num_tries) and declared_z >= MIN_Z:
                return self._compare(alternative, num_tries).build_mixed_issue()
        return None
