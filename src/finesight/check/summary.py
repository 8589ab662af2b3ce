"""What a check found, as lines for people and as JSON data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from finesight.check.findings import FAULTS, Checked, Finding, Source, exit_code
from finesight.check.mending import Mended

PLACES = 3
"""Places that the table names for each fault."""

_LONGEST = 200
"""Characters of a finding's words that a line holds."""


def as_lines(checked: Checked, shown: int) -> list[str]:
    """The sources, a table of the faults, and the first `shown` findings of each."""
    lines = [_source(source) for source in checked.sources]
    lines.append(f"{checked.pictures} pictures, {checked.contents} of different content")
    if not checked.counts:
        return [*lines, "no faults found"]
    by_fault: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in checked.findings:
        by_fault[finding.code].append(finding)
    lines += ["", *_table(checked, by_fault)]
    for code, findings in by_fault.items():
        lines += ["", *_told(code, findings, checked.counts[code], shown)]
    return lines


def as_record(checked: Checked, mended: Mended | None) -> dict[str, Any]:
    """The summary as JSON data, without the findings themselves."""
    return {
        "severity": checked.severity,
        "exit_code": exit_code(checked.severity),
        "samples": checked.samples,
        "pictures": checked.pictures,
        "contents": checked.contents,
        "faults": {
            code: {
                "severity": FAULTS[code][0],
                "findings": count,
                "samples": _samples(checked, code),
            }
            for code, count in checked.counts.items()
        },
        "sources": [
            {
                "path": source.path,
                "held_out": source.held_out,
                "format": source.format,
                "known_by": source.known_by,
                "rows": source.rows,
                "samples": source.samples,
                "unread": source.unread,
            }
            for source in checked.sources
        ],
        "mended": None if mended is None else mended.as_json(),
    }


def _source(source: Source) -> str:
    side = ", held out" if source.held_out else ""
    read = f"read as {source.format} ({source.known_by})"
    unread = f" and {source.unread} rows that are none" if source.unread else ""
    return f"{source.path}: {source.rows} rows, {source.samples} samples{unread}, {read}{side}"


def _samples(checked: Checked, code: str) -> int:
    return checked.affected.get(code, 0)


def _table(checked: Checked, by_fault: dict[str, list[Finding]]) -> list[str]:
    rows = [("fault", "", "found", "samples", "first")]
    whole = checked.samples + sum(source.unread for source in checked.sources)
    for code, count in checked.counts.items():
        affected = _samples(checked, code)
        share = _percent(affected / whole) if affected else ""
        places = [_short(finding) for finding in by_fault[code][:PLACES]]
        rows.append((code, FAULTS[code][0], str(count), share, ", ".join(places)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]:>{widths[2]}}  "
        f"{row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    ]


def _percent(share: float) -> str:
    """Two digits, or three for all."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _short(finding: Finding) -> str:
    """The place within its source."""
    place = finding.where.removeprefix(finding.source).lstrip(":, ")
    return place.removeprefix("row ") or "the whole source"


def _told(code: str, findings: Sequence[Finding], count: int, shown: int) -> list[str]:
    severity, title = FAULTS[code]
    lines = [f"{severity}: {title} ({code}, {count})"]
    remedy = ""
    for finding in findings[:shown]:
        # A whole source's finding is rare, and its words say why: they are not cut.
        said = f" (sample {finding.sample}): {_cut(finding.what)}" if finding.sample else ""
        lines.append(f"  {finding.where}{said or f': {finding.what}'}")
        lines += [f"    {line}" for line in finding.evidence if line not in finding.what]
        if finding.remedy != remedy:
            remedy = finding.remedy
            lines.append(f"    remedy: {remedy}")
    if count > shown:
        lines.append(f"  and {count - shown} more")
    return lines


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
