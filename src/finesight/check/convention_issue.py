"""A suspected wrong box convention in one data file, with evidence and a suggested fix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.check.box_hypothesis import (
    Bools,
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    pairwise_iou,
)
from finesight.check.check_issues import CheckIssue
from finesight.check.image_evidence import ImageEvidence, hoeffding_bound

Floats = NDArray[np.float64]

MIN_SCORE_DIFF = 2.0
"""Minimum difference of image scores with which a sample favors one of two hypotheses."""

_FORMAT_NAMES = {
    "xyxy": "two corners (x1, y1, x2, y2)",
    "xywh": "a corner and a size (x, y, width, height)",
    "cxcywh": "a center and a size (x, y, width, height)",
}


@dataclass(frozen=True, slots=True)
class ConventionIssue:
    """A data file whose boxes follow another convention than declared.

    Attributes:
        code: A key of ISSUE_TYPES.
        hypothesis: The detected meaning of the coordinates; `description` is its text.
        num_invalid: Number of the `num_samples` that have an impossible box under the declared
            convention.
        undecided_fraction: Fraction of samples that fit both hypotheses.
        summary: The strongest evidence.
        evidence: All evidence, one line each.
        options: Command-line options that fix the issue.
        manual_fix: Manual steps that fix the issue.
    """

    code: str
    hypothesis: BoxHypothesis
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
            source: Data file.
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


@dataclass(frozen=True)
class HypothesisComparison:
    """Comparison of the declared box convention with an alternative hypothesis.

    Attributes:
        declared_invalid: Mask of boxes that are impossible under the declared convention.
        alternative_invalid: Mask of boxes that are impossible under the alternative.
        num_tries: Number of tested hypotheses.
        num_images: Number of measured images; this and the following fields are 0 without images.
        z: z score of the alternative.
        difference_z: z score of the alternative minus the declared convention.
        positive_fractions: Fractions of boxes with a positive image score, declared and
            alternative.
        num_for_alternative: Number of tested samples whose images favor the alternative.
        num_for_declared: Number of tested samples whose images favor the declared convention.
        num_tested: Number of measured samples that are possible under the declared convention.
    """

    claims: BoxClaimTable
    declared: BoxHypothesis
    alternative: BoxHypothesis
    declared_invalid: Bools
    alternative_invalid: Bools
    num_tries: int
    num_images: int = 0
    z: float = 0.0
    difference_z: float = 0.0
    positive_fractions: tuple[float, float] = (0.0, 0.0)
    num_for_alternative: int = 0
    num_for_declared: int = 0
    num_tested: int = 0

    def with_evidence(
        self, evidence: ImageEvidence, declared_scores: Floats, alternative_scores: Floats
    ) -> HypothesisComparison:
        """Return a copy that includes the image scores of both hypotheses."""
        rows = evidence.claim_rows
        is_undecided = ~np.isin(
            self.claims.sample_index[rows], self.claims.sample_index[self.declared_invalid]
        )
        is_same = (
            pairwise_iou(
                self.declared.normalize_boxes(self.claims),
                self.alternative.normalize_boxes(self.claims),
            )[rows]
            > 0.95
        )
        difference = np.where(is_same, 0.0, alternative_scores - declared_scores)
        is_used = is_undecided & np.isfinite(difference)
        samples, sample_positions = np.unique(
            self.claims.sample_index[rows[is_used]], return_inverse=True
        )
        counts = np.maximum(np.bincount(sample_positions, minlength=len(samples)), 1)
        means = np.bincount(sample_positions, difference[is_used], len(samples)) / counts
        return replace(
            self,
            num_images=len(np.unique(evidence.image_of_claim)),
            z=evidence.z_score(alternative_scores),
            difference_z=evidence.z_score(alternative_scores - declared_scores),
            positive_fractions=(
                _positive_fraction(declared_scores),
                _positive_fraction(alternative_scores),
            ),
            num_for_alternative=int((means >= MIN_SCORE_DIFF).sum()),
            num_for_declared=int((means <= -MIN_SCORE_DIFF).sum()),
            num_tested=len(np.unique(self.claims.sample_index[rows[is_undecided]])),
        )

    @property
    def num_invalid(self) -> int:
        return self.claims.count_samples(self.declared_invalid)

    @property
    def undecided_fraction(self) -> float:
        """Fraction of samples that neither bounds nor images assign to a hypothesis."""
        share = 1 - self.num_invalid / self.claims.num_samples
        if self.num_tested:
            share *= 1 - (self.num_for_alternative + self.num_for_declared) / self.num_tested
        return share


def _positive_fraction(scores: Floats) -> float:
    is_valid = np.isfinite(scores)
    return float((scores[is_valid] > 0).mean()) if is_valid.any() else 0.0


def build_convention_issue(comparison: HypothesisComparison) -> ConventionIssue:
    """Build the issue of a data file whose boxes follow the alternative hypothesis."""
    code, description, options, manual_fix = _describe_alternative(comparison)
    return ConventionIssue(
        code,
        comparison.alternative,
        description,
        comparison.claims.num_samples,
        comparison.num_invalid,
        comparison.undecided_fraction,
        f"{_format_summary(comparison)}; {_format_undecided(comparison)}",
        tuple(_format_evidence(comparison)),
        options,
        manual_fix,
    )


def build_mixed_issue(comparison: HypothesisComparison) -> ConventionIssue:
    """Build the issue of a data file that mixes two box conventions."""
    total, num_alternative = (
        comparison.claims.num_samples,
        comparison.claims.count_samples(comparison.alternative_invalid),
    )
    _, description, *_ = _describe_alternative(comparison)
    declared_name = _describe_declared(comparison)
    evidence = (
        (
            f"{_format_share(comparison.num_invalid, total)} cannot be {declared_name},"
            f" {_format_share(num_alternative, total)} cannot be {description}"
        ),
        (
            f"image evidence: the former fit as {description} (false-positive probability:"
            f" {_format_p_value(comparison)})"
        ),
    )
    return ConventionIssue(
        "boxes-mixed",
        comparison.alternative,
        f"partly {declared_name}, partly {description}",
        total,
        comparison.num_invalid,
        max(0.0, 1 - (comparison.num_invalid + num_alternative) / total),
        evidence[0],
        evidence,
        manual_fix="separate the rows by origin, and import them as two files",
    )


def _format_evidence(comparison: HypothesisComparison) -> list[str]:
    num_alternative = comparison.claims.count_samples(comparison.alternative_invalid)
    lines = [
        f"{_format_share(comparison.num_invalid, comparison.claims.num_samples)} have a box that"
        " is impossible as"
        f" {_describe_declared(comparison)} (inverted, outside the image, or below one pixel);"
        f" as detected, {num_alternative} do"
    ]
    if comparison.num_images:
        declared_share, alternative_share = (
            f"{100 * share:.0f} %" for share in comparison.positive_fractions
        )
        lines.append(
            f"measured on {comparison.num_images} images, the sides of the detected boxes are on"
            " edges"
            f" better than in other images for {alternative_share} (false-positive probability:"
            f" {_format_p_value(comparison)}),"
            f" and as declared for {declared_share} of the possible boxes; chance level is 50 %"
        )
    if comparison.num_tested:
        lines.append(_format_votes(comparison))
    return [*lines, _format_undecided(comparison)]


def _format_summary(comparison: HypothesisComparison) -> str:
    total = comparison.claims.num_samples
    if comparison.num_invalid >= 0.1 * total or not comparison.num_tested:
        return (
            f"{_format_share(comparison.num_invalid, total)} have a box that is impossible as"
            " declared"
        )
    return _format_votes(comparison)


def _format_votes(comparison: HypothesisComparison) -> str:
    return (
        f"of {comparison.num_tested} tested samples that are possible both ways,"
        f" {comparison.num_for_alternative} fit their"
        f" image better as detected, {comparison.num_for_declared} as declared"
    )


def _format_undecided(comparison: HypothesisComparison) -> str:
    return f"{100 * comparison.undecided_fraction:.0f} % of the samples are undecided"


def _format_p_value(comparison: HypothesisComparison) -> str:
    p_value = hoeffding_bound(comparison.z, comparison.num_tries)
    return f"below {max(p_value, 1e-12):.0e}" if p_value < 1 else "not excluded"


def _format_share(count: int, total: int) -> str:
    return f"{count} of {total} samples ({100 * count / total:.0f} %)"


def _describe_declared(comparison: HypothesisComparison) -> str:
    form = comparison.claims.convention
    units = {"pixel": "pixels", "1": "fractions of the image", "1000": "thousandths"}
    return f"{_FORMAT_NAMES[form.format]} in {units[form.units]}"


def _describe_alternative(comparison: HypothesisComparison) -> tuple[str, str, str, str]:
    """Return issue code, description, command-line options and manual steps for the alternative."""
    alternative, convention = comparison.alternative, comparison.claims.convention
    format_name = _FORMAT_NAMES[alternative.box_format]
    option = (
        f"--box-format {alternative.box_format}"
        if alternative.box_format != convention.format
        else ""
    )
    base = alternative.frame.base
    if base == "stored":
        return (
            "boxes-before-exif-rotation",
            f"{format_name} in coordinates of the stored image, before EXIF rotation",
            "",
            "rotate the boxes like their image; or keep them and remove the rotation (EXIF tag"
            " Orientation) from the images",
        )
    side = alternative.frame.frame_width
    if base == "fixed" and side in (1, 1000) and side == alternative.frame.frame_height:
        code = "boxes-thousandths" if side == 1000 else "boxes-normalized"
        name = "thousandths of the image" if side == 1000 else "fractions of the image"
        if convention.units == f"{side:g}":
            return f"boxes-{alternative.box_format}", f"{format_name} in {name}", option, ""
        return code, f"{format_name} in {name}", f"{option} --box-units {side:g}".strip(), ""
    if base == "image":
        if convention.units == "pixel":
            return f"boxes-{alternative.box_format}", f"{format_name} in pixels", option, ""
        return "boxes-pixels", f"{format_name} in pixels", f"{option} --box-units pixel".strip(), ""
    copy_description = _describe_copy(alternative.frame, comparison.claims)
    return (
        "boxes-resized",
        f"{format_name} in pixels of a resized image, {copy_description}",
        option,
        "scale the boxes to the referenced image: x by its width divided by the resized"
        " width, y by its height divided by the resized height; or reference the resized images",
    )


def _describe_copy(frame: BoxFrame, claims: BoxClaimTable) -> str:
    size = f"about {frame.frame_width:.3g}"
    if frame.base == "fixed":
        text = f"about {frame.frame_width:.0f} x {frame.frame_height:.0f}"
        width, height = claims.width[0], claims.height[0]
        if (claims.width == width).all() and (claims.height == height).all():
            text += (
                f" ({frame.frame_width / width:.2f} x {frame.frame_height / height:.2f} of the"
                " size)"
            )
        return text
    if frame.base == "factor":
        return f"{size} times the size"
    description = {
        "longest": f"the longest side {size}",
        "shortest": f"the shortest side {size}",
        "pixels": f"about {frame.frame_width**2:.2g} pixels in all",
    }[frame.base]
    if frame.side_multiple > 1:
        description += f", sides in multiples of {frame.side_multiple}"
    return description + (", smaller images not enlarged" if frame.is_capped else "")
