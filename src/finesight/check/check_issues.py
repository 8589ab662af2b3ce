"""Issue types of the data check, its result, and its text and JSON formats."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from finesight.data.boxes import Box
from finesight.data.formats.dataset_format import PlaceholderCountError, UnexpectedPlaceholderError
from finesight.data.image_file import CorruptImageError
from finesight.data.sample import EmptyAnswerError, InvalidTurnsError
from finesight.errors import UserError, format_count, shorten

HistogramCounts = Mapping[str, int]
"""Number of values by bin. Bin k covers values from 2^(k/2) to below 2^((k+1)/2)."""


def count_half_octaves(values: Iterable[int]) -> dict[str, int]:
    """Count positive integers by bins of half an octave (`HistogramCounts`)."""
    counts = Counter(math.floor(2 * math.log2(value) + 1e-9) for value in values if value > 0)
    return {str(bin_index): counts[bin_index] for bin_index in sorted(counts)}


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
        "boxes-xyxy": "boxes are xyxy (two corners) but are parsed differently",
        "boxes-pixels": "boxes are in pixels but are parsed differently",
        "boxes-thousandths": "boxes are in thousandths of the image but are parsed differently",
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
class SamplePreview:
    """A randomly selected sample: its texts, and its images with all boxes."""

    where: str
    sample_id: str
    is_validation: bool
    question: str
    answer: str
    images: tuple[IssueImage, ...]


@dataclass(frozen=True, slots=True)
class DatasetProfile:
    """Statistics of all parsed samples in a split.

    Attributes:
        histograms: Counts by name: `answer_chars` (characters of the answer), `image_side` (longest
            side in pixels), `num_boxes` (samples with boxes), and `num_tokens` with a renderer.
        answers: Most frequent answers with their counts.
        labels: Most frequent labels of boxes with their counts.
    """

    num_samples: int
    num_boxes: int
    histograms: dict[str, HistogramCounts]
    answers: tuple[tuple[str, int], ...]
    num_answers: int
    labels: tuple[tuple[str, int], ...]
    num_labels: int


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of a data check.

    Attributes:
        issues: First issues of each code in full; further issues are only counted.
        skipped_checks: Reason by issue code, for issues that were not searched.
        profiles: Statistics by split, with True for the validation data.
    """

    sources: tuple[SourceStats, ...]
    issue_counts: dict[str, int]
    issues: tuple[CheckIssue, ...]
    num_images: int
    num_unique_images: int
    """Number of images, video frames and video files with different content."""

    affected_samples: dict[str, int] = field(default_factory=dict)
    """Number of affected samples by issue code; 0 for issues of a full data file."""
    num_video_frames: int = 0
    num_video_files: int = 0
    skipped_checks: dict[str, str] = field(default_factory=dict)
    profiles: dict[bool, DatasetProfile] = field(default_factory=dict)
    previews: tuple[SamplePreview, ...] = ()

    @property
    def severity(self) -> Severity | None:
        """Highest severity of all issues, None if there are no issues."""
        severities = [ISSUE_TYPES[code][0] for code in self.issue_counts]
        return min(severities, key=list(EXIT_CODES).index, default=None)

    @property
    def exit_code(self) -> int:
        """Exit code of the data check."""
        return 0 if self.severity is None else EXIT_CODES[self.severity]

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)


@dataclass(frozen=True, slots=True)
class FixResult:
    """Result of a fix of the data.

    Attributes:
        num_skipped: Number of samples and rows that were not written.
    """

    output_files: tuple[tuple[Path, int], ...]
    num_changed: int
    num_skipped: int

    def as_lines(self) -> list[str]:
        """Format the result as lines of text."""
        files = [
            f"{path}: {format_count(samples, 'sample')}" for path, samples in self.output_files
        ]
        folder = self.output_files[0][0].parent
        changed = format_count(self.num_changed, "sample")
        summary = f"{changed} changed, {self.num_skipped} skipped"
        return [*files, f"{summary}: {folder / CHANGES_FILE}, {folder / SKIPPED_SAMPLES_FILE}"]

    def as_json(self) -> dict[str, Any]:
        """Convert the result to JSON data."""
        files = [{"file": str(path), "num_samples": samples} for path, samples in self.output_files]
        return {"files": files, "num_changed": self.num_changed, "num_skipped": self.num_skipped}


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

_MAX_LINE_LENGTH = 200
"""Maximum number of characters of an issue description; longer ones are truncated."""


def format_summary(result: CheckResult, max_issues: int) -> list[str]:
    """Format the result of a data check as lines of text.

    The lines list the data files, a table of issue codes, and up to `max_issues` examples per code.
    """
    lines = [_format_source(source) for source in result.sources]
    files = [format_count(result.num_images, "image")] if result.num_images else []
    if result.num_video_files:
        files.append(format_count(result.num_video_files, "video file"))
    if result.num_video_frames or not files:
        kind = "video frame" if result.num_video_frames else "image"
        files.append(format_count(result.num_video_frames, kind))
    lines.append(f"{' and '.join(files)}, {result.num_unique_images} unique")
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
        "exit_code": result.exit_code,
        "num_samples": result.num_samples,
        "num_images": result.num_images,
        "num_video_frames": result.num_video_frames,
        "num_video_files": result.num_video_files,
        "num_unique_images": result.num_unique_images,
        "issues": {
            code: {
                "severity": ISSUE_TYPES[code][0],
                "count": count,
                "num_samples": result.affected_samples.get(code, 0),
            }
            for code, count in result.issue_counts.items()
        },
        "skipped_checks": result.skipped_checks,
        "sources": [asdict(source) for source in result.sources],
        "fix_result": None if fix_result is None else fix_result.as_json(),
    }


def _format_source(source: SourceStats) -> str:
    split_note = ", validation" if source.is_validation else ""
    samples = format_count(source.num_samples, "sample")
    if source.num_unreadable_rows:
        samples += f" and {format_count(source.num_unreadable_rows, 'invalid row')}"
    return (
        f"{source.path}: {format_count(source.num_rows, 'row')}, {samples},"
        f" read as {source.format} ({source.detected_by}){split_note}"
    )


def _format_table(result: CheckResult, issues_by_code: dict[str, list[CheckIssue]]) -> list[str]:
    rows = [("issue", "", "count", "samples", "first")]
    total_samples = result.num_samples + sum(
        source.num_unreadable_rows for source in result.sources
    )
    for code, count in result.issue_counts.items():
        num_affected = result.affected_samples.get(code, 0)
        percentage_text = ""
        if num_affected:
            percentage = 100 * num_affected / total_samples
            # Two significant digits.
            percentage_text = f"{percentage:.0f} %" if percentage >= 10 else f"{percentage:.2g} %"
        locations = [
            # Without the path of the data file.
            issue.where.removeprefix(issue.source).lstrip(":, ").removeprefix("row ")
            or "full source"
            for issue in issues_by_code[code][:MAX_LISTED_LOCATIONS]
        ]
        rows.append((code, ISSUE_TYPES[code][0], str(count), percentage_text, ", ".join(locations)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]


def _format_issues(
    code: str, issues: Sequence[CheckIssue], count: int, max_issues: int
) -> list[str]:
    severity, title = ISSUE_TYPES[code]
    lines = [f"{severity}: {title} ({code}, {count})"]
    remedy = ""
    for issue in issues[:max_issues]:
        # Issues of a full data file are rare and contain the evidence, so they are not truncated.
        what, sample_note = issue.what, ""
        if issue.sample_id:
            what = shorten(" ".join(what.split()), _MAX_LINE_LENGTH)
            sample_note = f" (sample {issue.sample_id})"
        lines.append(f"  {issue.where}{sample_note}: {what}")
        lines += [f"    {line}" for line in issue.evidence if line not in issue.what]
        if issue.remedy != remedy:
            remedy = issue.remedy
            lines.append(f"    remedy: {remedy}")
    if count > max_issues:
        lines.append(f"  and {count - max_issues} more")
    return lines
