"""Issue types of the data check, and the issues that it finds."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finesight.errors import UserError
from finesight.ingest.formats.dataset_format import (
    PlaceholderCountError,
    UnexpectedPlaceholderError,
)
from finesight.samples.frames import Box
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import EmptyAnswerError, InvalidTurnsError

Severity = Literal["error", "warning", "note"]
"""Severity of an issue.

- error: The sample cannot be used or invalidates the evaluation.
- warning: Most likely a mistake.
- note: Worth a review.
"""

FixAction = Literal["skipped", "clipped", "reordered", "placeholders removed"]
"""Change that `--fix` makes to a sample.

The sample is skipped, a box is clipped, the corners of a box are sorted, or image placeholders are
removed from the text.
"""

EXIT_CODES: dict[Severity, int] = {"error": 2, "warning": 3, "note": 0}
"""Exit code of the data check by the highest severity, most severe first.

The exit code is 0 without issues.
"""

LOG_FILES = SKIPPED_SAMPLES_FILE, CHANGES_FILE = "skipped_samples.jsonl", "changes.jsonl"

_DESCRIPTIONS: dict[Severity, dict[str, str]] = {
    "error": {
        "boxes-xywh": "boxes are xywh (corner and size) but are parsed differently",
        "boxes-cxcywh": "boxes are cxcywh (center and size) but are parsed differently",
        "boxes-yxyx": "boxes are yxyx (two corners, y first) but are parsed differently",
        "boxes-xyxy": "boxes are xyxy (two corners) but are parsed differently",
        "boxes-pixels": "boxes are in pixels but are parsed differently",
        "boxes-thousandths": "boxes are in thousandths of the image but are parsed differently",
        "boxes-percent": "boxes are in percent of the image but are parsed differently",
        "boxes-normalized": "boxes are normalized to 0-1 but are parsed differently",
        "boxes-resized": "boxes are in pixels of a resized image",
        "boxes-before-exif-rotation": "boxes are in coordinates before EXIF rotation",
        "boxes-mixed": "one source mixes two box conventions",
        "invalid-row": "the row is invalid",
        "image-missing": "the image file is missing",
        "image-truncated": "the image file is truncated",
        "image-corrupt": "the file is corrupt or not an image",
        "image-too-large": "the image exceeds the pixel limit or the aspect ratio limit",
        "video-frame-sizes-differ": "the frames of a video differ in size",
        "placeholder-count-mismatch": "the text and the sample differ in the number of images",
        "placeholder-in-text": "the text contains an image or box placeholder",
        "special-token-in-text": "the text contains a special token",
        "invalid-role-order": "the role order of the turns is invalid",
        "image-in-answer": "an image is in a turn that is not a user turn",
        "empty-answer": "the answer is empty",
        "empty-question": "a turn before the answer is empty",
        "unpaired-reasoning": "the answer does not start with one pair of <think> and </think>",
        "box-outside": "a box is outside its image",
        "box-inverted": "the corners of a box are inverted",
        "box-empty": "a box has no area",
        "box-without-image": "a box refers to an image that the sample does not have",
        "too-long": "the sample exceeds the maximum length",
        "leaked-image": "a validation image is in the training data",
        "leaked-image-reencoded": "a re-encoded copy of a validation image is in the training data",
    },
    "warning": {
        "misplaced-reasoning": "a question starts with <think>, or an answer lacks it",
        "box-in-text": "the text contains a box",
        "coordinates-in-text": "the texts contain boxes or points as numbers",
        "contradictory-answers": "the same question about the same image has different answers",
        "answer-not-json": "the answer is no JSON object, but most answers to its question are",
    },
    "note": {
        "box-at-edge": "a box exceeds its image by a rounding error",
        "box-tiny": "a box is smaller than 2 pixels",
        "box-covers-image": "a box covers the full image",
        "duplicate-sample": "the sample is a duplicate",
        "dominant-answer": "most answers are identical",
        "rare-similar-answer": "a rare answer differs from a frequent one by a letter or two",
    },
}

ISSUE_TYPES: dict[str, tuple[Severity, str]] = {
    code: (severity, description)
    for severity, descriptions in _DESCRIPTIONS.items()
    for code, description in descriptions.items()
}
"""Severity and description of each issue code, most severe first."""


@dataclass(frozen=True, slots=True)
class IssueImage:
    """An image that is shown with an issue.

    Attributes:
        image_index: Index of the image in the sample (0-based, image parts only).
        boxes: Affected boxes as [x1, y1, x2, y2] in original pixels after EXIF rotation. They may
            be invalid: inverted, outside the image, or not finite.
    """

    path: Path
    image_index: int = 0
    boxes: tuple[Box, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckIssue:
    """An issue found by a data check.

    Attributes:
        where: Location of the sample as file:line or file and row, or the file if all of it is
            affected.
        sample_id: ID of the sample; empty for an issue of a full file.
        fix: Change that `--fix` makes; None if the issue cannot be fixed automatically.
    """

    code: str
    where: str
    what: str
    remedy: str
    source: str = ""
    sample_id: str = ""
    images: tuple[IssueImage, ...] = ()
    evidence: tuple[str, ...] = ()
    fix: FixAction | None = None

    @property
    def severity(self) -> Severity:
        return ISSUE_TYPES[self.code][0]

    def as_json(self) -> dict[str, Any]:
        """Convert the issue to JSON data. NaN and infinity become text."""
        record: dict[str, Any] = {"severity": self.severity, **asdict(self)}
        for image in record["images"]:
            image["path"] = str(image["path"])
            image["boxes"] = [
                [value if math.isfinite(value) else str(value) for value in box]
                for box in image["boxes"]
            ]
        return record


@dataclass(frozen=True, slots=True)
class SampleLocation:
    """Location of a sample in a data file.

    Attributes:
        where: Location for messages, as file:line or file and row.
        row_index: 0-based index of the row in the file.
        sample_index: 0-based index of the sample in its row.
    """

    source: str
    where: str
    sample_id: str
    row_index: int
    sample_index: int

    def create_issue(
        self,
        code: str,
        what: str,
        remedy: str,
        images: tuple[IssueImage, ...] = (),
        fix: FixAction | None = None,
        evidence: tuple[str, ...] = (),
    ) -> CheckIssue:
        """Create an issue of the sample at this location; see `CheckIssue` for the arguments."""
        return CheckIssue(
            code, self.where, what, remedy, self.source, self.sample_id, images, evidence, fix
        )


def format_location(source: str, row_location: str) -> str:
    """Format a row location as file:line, or as file and row name."""
    kind, _, row_number = row_location.partition(" ")
    return f"{source}:{row_number}" if kind == "line" else f"{source}, {row_location}"


_CODE_BY_ERROR: tuple[tuple[type[UserError], str], ...] = (
    (EmptyAnswerError, "empty-answer"),
    (InvalidTurnsError, "invalid-role-order"),
    (PlaceholderCountError, "placeholder-count-mismatch"),
    (UnexpectedPlaceholderError, "placeholder-in-text"),
    (CorruptImageError, "image-missing"),
)
"""Issue code by error type; the first match applies, and other errors are `invalid-row`.

In a data check, CorruptImageError is raised only for missing files.
"""


def issue_from_error(error: UserError, location: SampleLocation) -> CheckIssue:
    """Convert the error of a dataset row to an issue at its location."""
    code = next(
        (code for error_type, code in _CODE_BY_ERROR if isinstance(error, error_type)),
        "invalid-row",
    )
    what = f"{error.where}: {error.what}" if error.where else error.what
    remedy = "; ".join(filter(None, [error.expected, str(error.remedy)]))
    return location.create_issue(code, what, remedy)


MAX_LISTED_LOCATIONS = 3
"""Maximum number of sample locations listed per issue code in the table."""
