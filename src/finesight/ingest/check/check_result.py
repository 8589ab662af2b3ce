"""Result of a data check, and its text and JSON formats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finesight.errors import format_count, shorten
from finesight.ingest.check.check_issues import (
    CHANGES_FILE,
    EXIT_CODES,
    ISSUE_TYPES,
    MAX_LISTED_LOCATIONS,
    SKIPPED_SAMPLES_FILE,
    CheckIssue,
    IssueImage,
    Severity,
)
from finesight.report.histogram_counts import HistogramCounts


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
            # `.2g` alone would write 100 as 1e+02.
            percentage_text = f"{percentage:.0f} %" if percentage >= 10 else f"{percentage:.2g} %"
        locations = [
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
