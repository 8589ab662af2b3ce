"""Issue types of `finesight data check`, the result of a check, and its text and JSON formats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from finesight.data.boxes import Box
from finesight.data.formats.dataset_format import PlaceholderCountError, UnexpectedPlaceholderError
from finesight.data.image_header import CorruptImageError
from finesight.data.sample import EmptyAnswerError, InvalidTurnsError
from finesight.errors import UserError

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
"""Exit code of `finesight data check` by the highest severity, most severe first.

The exit code is 0 without issues.
"""

LOG_FILES = SKIPPED_SAMPLES_FILE, CHANGES_FILE = "skipped_samples.jsonl", "changes.jsonl"

ISSUE_TYPES: dict[str, tuple[Severity, str]] = {
    "boxes-xywh": ("error", "boxes are xywh (corner and size) but are parsed differently"),
    "boxes-cxcywh": ("error", "boxes are cxcywh (center and size) but are parsed differently"),
    "boxes-xyxy": ("error", "boxes are xyxy (two corners) but are parsed differently"),
    "boxes-pixels": ("error", "boxes are in pixels but are parsed differently"),
    "boxes-thousandths": (
        "error",
        "boxes are in thousandths of the image but are parsed differently",
    ),
    "boxes-normalized": ("error", "boxes are normalized to 0-1 but are parsed differently"),
    "boxes-resized": ("error", "boxes are in pixels of a resized image"),
    "boxes-before-exif-rotation": ("error", "boxes are in coordinates before EXIF rotation"),
    "boxes-mixed": ("error", "one source mixes two box conventions"),
    "invalid-row": ("error", "the row is invalid"),
    "image-missing": ("error", "the image file is missing"),
    "image-truncated": ("error", "the image file is truncated"),
    "image-corrupt": ("error", "the file is corrupt or not an image"),
    "image-too-large": ("error", "the image exceeds the pixel limit or the aspect ratio limit"),
    "video-frame-sizes-differ": ("error", "the frames of a video differ in size"),
    "placeholder-count-mismatch": (
        "error",
        "the text and the sample differ in the number of images",
    ),
    "placeholder-in-text": ("error", "the text contains an image or box placeholder"),
    "special-token-in-text": ("error", "the text contains a special token"),
    "invalid-role-order": ("error", "the role order of the turns is invalid"),
    "image-in-answer": ("error", "an image is in a turn that is not a user turn"),
    "empty-answer": ("error", "the answer is empty"),
    "empty-question": ("error", "a turn before the answer is empty"),
    "box-outside": ("error", "a box is outside its image"),
    "box-inverted": ("error", "the corners of a box are inverted"),
    "box-empty": ("error", "a box has no area"),
    "box-without-image": ("error", "a box refers to an image that the sample does not have"),
    "too-long": ("error", "the sample exceeds the maximum length"),
    "leaked-image": ("error", "a validation image is in the training data"),
    "leaked-image-reencoded": (
        "error",
        "a re-encoded copy of a validation image is in the training data",
    ),
    "box-in-text": ("warning", "the text contains a box"),
    "contradictory-answers": (
        "warning",
        "the same question about the same image has different answers",
    ),
    "box-at-edge": ("note", "a box exceeds its image by a rounding error"),
    "box-tiny": ("note", "a box is smaller than 2 pixels"),
    "box-covers-image": ("note", "a box covers the full image"),
    "duplicate-sample": ("note", "the sample is a duplicate"),
    "dominant-answer": ("note", "most answers are identical"),
}
"""Severity and description of each issue code, most severe first."""


@dataclass(frozen=True, slots=True)
class IssueImage:
    """An image that is shown with an issue.

    Attributes:
        path: Path of the image.
        image_index: Index of the image in the sample (0-based, image parts only).
        boxes: Affected boxes as [x1, y1, x2, y2] in original pixels after EXIF rotation. They may
            be invalid: inverted, outside the image, or not finite.
        labels: Labels of the boxes.
    """

    path: Path
    image_index: int = 0
    boxes: tuple[Box, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckIssue:
    """An issue found by a data check.

    Attributes:
        code: A key of ISSUE_TYPES.
        where: Location of the sample as file:line or file and row, or the file if all of it is
            affected.
        what: Description of the problem.
        remedy: Suggested fix.
        source: Data file.
        sample_id: ID of the sample; empty for an issue of a full file.
        images: Affected images.
        evidence: Additional lines that explain the issue.
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
        record = {"severity": self.severity, **asdict(self)}
        record["images"] = [
            {
                "path": str(issue_image.path),
                "image_index": issue_image.image_index,
                "boxes": [[_json_number(value) for value in box] for box in issue_image.boxes],
                "labels": list(issue_image.labels),
            }
            for issue_image in self.images
        ]
        return record


@dataclass(frozen=True, slots=True)
class SampleLocation:
    """Location of a sample in a data file.

    Attributes:
        source: Data file.
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


@dataclass(frozen=True, slots=True)
class SourceStats:
    """Statistics of a checked data file.

    Attributes:
        detected_by: Reason for the detected format, shown to the user.
        num_unreadable_rows: Number of rows that cannot be parsed as samples.
    """

    path: str
    is_validation: bool
    format: str
    detected_by: str
    num_rows: int
    num_samples: int
    num_unreadable_rows: int = 0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of a data check.

    Attributes:
        sources: Statistics of each data file.
        issue_counts: Number of issues by code.
        issues: First issues of each code in full; further issues are only counted.
    """

    sources: tuple[SourceStats, ...]
    issue_counts: dict[str, int]
    issues: tuple[CheckIssue, ...]
    num_images: int
    num_unique_images: int
    affected_samples: dict[str, int] = field(default_factory=dict)
    """Number of affected samples by issue code; 0 for issues of a full data file."""

    @property
    def severity(self) -> Severity | None:
        """Highest severity of all issues, None if there are no issues."""
        return max_severity([ISSUE_TYPES[code][0] for code in self.issue_counts])

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)


@dataclass(frozen=True, slots=True)
class FixResult:
    """Result of `finesight data check --fix`.

    Attributes:
        output_files: Path and number of samples of each written file.
        num_changed: Number of samples that were changed.
        num_skipped: Number of samples and rows that were not written.
    """

    output_files: tuple[tuple[Path, int], ...]
    num_changed: int
    num_skipped: int

    def as_lines(self) -> list[str]:
        """Format the result as lines of text."""
        files = [f"{path}: {samples} samples" for path, samples in self.output_files]
        folder = self.output_files[0][0].parent
        summary = f"{self.num_changed} samples changed, {self.num_skipped} skipped"
        return [*files, f"{summary}: {folder / CHANGES_FILE}, {folder / SKIPPED_SAMPLES_FILE}"]

    def as_json(self) -> dict[str, Any]:
        """Convert the result to JSON data."""
        files = [{"file": str(path), "num_samples": samples} for path, samples in self.output_files]
        return {"files": files, "num_changed": self.num_changed, "num_skipped": self.num_skipped}


def format_location(source: str, row_location: str) -> str:
    """Format a row location as file:line, or as file and row name."""
    kind, _, row_number = row_location.partition(" ")
    return f"{source}:{row_number}" if kind == "line" else f"{source}, {row_location}"


def exit_code(severity: Severity | None) -> int:
    """Return the exit code of `finesight data check` for the highest severity of its issues."""
    return 0 if severity is None else EXIT_CODES[severity]


def max_severity(severities: Sequence[Severity]) -> Severity | None:
    """Return the highest of several severities, or None for an empty sequence."""
    return min(severities, key=list(EXIT_CODES).index, default=None)


def _json_number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)


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
    remedy = "; ".join(filter(None, [error.expected, error.remedy]))
    return location.create_issue(code, what, remedy)


MAX_LISTED_LOCATIONS = 3
"""Maximum number of sample locations listed per issue code in the table."""

_MAX_LINE_LENGTH = 200
"""Maximum number of characters of an issue description; longer ones are truncated."""


def format_summary(result: CheckResult, max_issues: int) -> list[str]:
    """Format the result of a data check as lines of text.

    The lines list the data files, a table of issue codes, and up to `max_issues` examples per code.
    """
    lines = [_format_source(source) for source in result.sources]
    lines.append(f"{result.num_images} images, {result.num_unique_images} unique")
    if not result.issue_counts:
        return [*lines, "no issues found"]
    issues_by_code: defaultdict[str, list[CheckIssue]] = defaultdict(list)
    for issue in result.issues:
        issues_by_code[issue.code].append(issue)
    lines += ["", *_format_table(result, issues_by_code)]
    for code, issues in issues_by_code.items():
        lines += ["", *_format_issues(code, issues, result.issue_counts[code], max_issues)]
    return lines


def summary_to_dict(result: CheckResult, fix_result: FixResult | None) -> dict[str, Any]:
    """Convert the counts of a check result to JSON data, without the individual issues."""
    return {
        "severity": result.severity,
        "exit_code": exit_code(result.severity),
        "num_samples": result.num_samples,
        "num_images": result.num_images,
        "num_unique_images": result.num_unique_images,
        "issues": {
            code: {
                "severity": ISSUE_TYPES[code][0],
                "count": count,
                "num_samples": _count_samples(result, code),
            }
            for code, count in result.issue_counts.items()
        },
        "sources": [
            {
                "path": source.path,
                "is_validation": source.is_validation,
                "format": source.format,
                "detected_by": source.detected_by,
                "num_rows": source.num_rows,
                "num_samples": source.num_samples,
                "num_unreadable_rows": source.num_unreadable_rows,
            }
            for source in result.sources
        ],
        "fix_result": None if fix_result is None else fix_result.as_json(),
    }


def _format_source(source: SourceStats) -> str:
    split_note = ", validation" if source.is_validation else ""
    format_note = f"read as {source.format} ({source.detected_by})"
    unreadable_note = (
        f" and {source.num_unreadable_rows} invalid rows" if source.num_unreadable_rows else ""
    )
    return (
        f"{source.path}: {source.num_rows} rows, {source.num_samples} samples{unreadable_note},"
        f" {format_note}{split_note}"
    )


def _count_samples(result: CheckResult, code: str) -> int:
    return result.affected_samples.get(code, 0)


def _format_table(result: CheckResult, issues_by_code: dict[str, list[CheckIssue]]) -> list[str]:
    rows = [("issue", "", "count", "samples", "first")]
    total_samples = result.num_samples + sum(
        source.num_unreadable_rows for source in result.sources
    )
    for code, count in result.issue_counts.items():
        num_affected = _count_samples(result, code)
        percentage = _format_percent(num_affected / total_samples) if num_affected else ""
        locations = [
            _short_location(issue) for issue in issues_by_code[code][:MAX_LISTED_LOCATIONS]
        ]
        rows.append((code, ISSUE_TYPES[code][0], str(count), percentage, ", ".join(locations)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]


def _format_percent(fraction: float) -> str:
    """Format a fraction as a percentage with two significant digits."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.1 else f"{100 * fraction:.2g} %"


def _short_location(issue: CheckIssue) -> str:
    """Return the location of an issue without the path of its data file."""
    location = issue.where.removeprefix(issue.source).lstrip(":, ")
    return location.removeprefix("row ") or "full source"


def _format_issues(
    code: str, issues: Sequence[CheckIssue], count: int, max_issues: int
) -> list[str]:
    severity, title = ISSUE_TYPES[code]
    lines = [f"{severity}: {title} ({code}, {count})"]
    remedy = ""
    for issue in issues[:max_issues]:
        # Issues of a full data file are rare and contain the evidence, so they are not truncated.
        sample_note = (
            f" (sample {issue.sample_id}): {_truncate_line(issue.what)}" if issue.sample_id else ""
        )
        lines.append(f"  {issue.where}{sample_note or f': {issue.what}'}")
        lines += [f"    {line}" for line in issue.evidence if line not in issue.what]
        if issue.remedy != remedy:
            remedy = issue.remedy
            lines.append(f"    remedy: {remedy}")
    if count > max_issues:
        lines.append(f"  and {count - max_issues} more")
    return lines


def _truncate_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_LINE_LENGTH else f"{line[: _MAX_LINE_LENGTH - 3]}..."
