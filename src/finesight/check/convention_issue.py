"""A suspected wrong box convention in one data file, with evidence and a suggested fix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finesight.check.box_hypothesis import (
    BoxClaimTable,
    BoxFrame,
    BoxHypothesis,
    find_invalid_boxes,
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
_UNIT_NAMES = {
    "pixel": "pixels",
    "1": "fractions of the image",
    "1000": "thousandths of the image",
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
        declared: BoxHypothesis,
        alternative: BoxHypothesis,
        num_tries: int,
        evidence: tuple[ImageEvidence, Floats, Floats] | None,
    ) -> None:
        self.claims, self.alternative, self.total = claims, alternative, claims.num_samples
        boxes = [hypothesis.normalize_boxes(claims) for hypothesis in (declared, alternative)]
        declared_invalid, alternative_invalid = (find_invalid_boxes(one, claims) for one in boxes)
        self.num_invalid = claims.count_samples(declared_invalid)
        self.num_alternative_invalid = claims.count_samples(alternative_invalid)
        self.undecided_fraction = 1 - self.num_invalid / self.total
        convention = claims.convention
        self.declared_name = (
            f"{_FORMAT_NAMES[convention.format]} in {_UNIT_NAMES[convention.units]}"
        )
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
        return ConventionIssue(
            code,
            self.alternative,
            description,
            self.total,
            self.num_invalid,
            self.undecided_fraction,
            f"{summary}; {undecided}",
            evidence,
            options,
            manual_fix,
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
        convention, frame = self.claims.convention, self.alternative.frame
        box_format = self.alternative.box_format
        form = _FORMAT_NAMES[box_format]
        option = "" if box_format == convention.format else f"--box-format {box_format}"
        if frame.base == "stored":
            return (
                "boxes-before-exif-rotation",
                f"{form} in coordinates of the stored image, before EXIF rotation",
                "",
                "rotate the boxes like their image; or keep them and remove the rotation (EXIF tag"
                " Orientation) from the images",
            )
        units = frame.units
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
        if units == convention.units:
            return f"boxes-{box_format}", description, option, ""
        codes = {"pixel": "boxes-pixels", "1": "boxes-normalized", "1000": "boxes-thousandths"}
        return codes[units], description, f"{option} --box-units {units}".strip(), ""


def _format_share(count: int, total: int) -> str:
    return f"{count} of {total} samples ({100 * count / total:.0f} %)"


def _describe_frame(frame: BoxFrame, claims: BoxClaimTable) -> str:
    """Describe the size of the resized images."""
    width, height = frame.frame_width, frame.frame_height
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
