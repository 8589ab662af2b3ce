"""Format the result of a data check as text or as JSON data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from finesight.check.check_issues import (
    ISSUE_TYPES,
    CheckIssue,
    CheckResult,
    SourceStats,
    exit_code,
)
from finesight.check.dataset_fixer import FixResult

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
