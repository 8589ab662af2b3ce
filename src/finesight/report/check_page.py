"""The page of `data check --html`: every fault with its pictures, the boxes concerned drawn."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from finesight.check.findings import EXIT_CODES, FAULTS, Checked, Finding, Shown
from finesight.data.headers import DamagedPicture
from finesight.report.language import say
from finesight.report.page import render
from finesight.report.picture import Picture, picture
from finesight.vision.picture import open_picture

PICTURES = 300
"""Pictures that a page holds; the other findings are told without theirs."""

PICTURES_OF_ONE = 4
"""Pictures shown of one finding."""

SIDE = 360
"""The longest side of a picture on the page, in pixels."""


def check_page(
    checked: Checked, pictures: int = PICTURES, advance: Callable[[int], None] = lambda done: None
) -> str:
    """What a check found as a page of its own, with at most `pictures` pictures.

    They are shared out among the faults in turn, so that a rare one is seen beside a frequent
    one; the page says how many it left out. `advance` is told each finding that was drawn.
    """
    chosen = _in_turn(checked.findings, pictures)
    album = _Album()
    records = []
    for number, finding in enumerate(checked.findings):
        with_pictures = finding.shown[:PICTURES_OF_ONE] if number in chosen else ()
        records.append(_record(finding, [_shown(shown, album) for shown in with_pictures]))
        advance(1)
    without = sum(bool(finding.shown) for finding in checked.findings) - len(chosen)
    return render(
        "check",
        {"findings": records, "pictures": album.pictures},
        title=say("Data check"),
        checked=checked,
        faults=_faults(checked),
        severities={severity: _total(checked, severity) for severity in EXIT_CODES},
        pictures=sum(not isinstance(found, str) for found in album.pictures),
        without=without,
    )


def _in_turn(findings: Sequence[Finding], pictures: int) -> set[int]:
    """Numbers of the findings that show pictures: one of each fault after another."""
    by_fault: dict[str, list[int]] = defaultdict(list)
    for number, finding in enumerate(findings):
        if finding.shown:
            by_fault[finding.code].append(number)
    chosen: set[int] = set()
    left = pictures
    for number in chain.from_iterable(zip_longest(*by_fault.values())):
        if number is None:
            continue
        left -= len(findings[number].shown[:PICTURES_OF_ONE])
        if left < 0:
            break
        chosen.add(number)
    return chosen


def _faults(checked: Checked) -> list[dict[str, Any]]:
    """The faults that were found, the gravest first, with how many the page tells."""
    told = Counter(finding.code for finding in checked.findings)
    return [
        {
            "code": code,
            "severity": severity,
            "says": says,
            "count": count,
            "told": told[code],
            "samples": checked.affected.get(code, 0),
        }
        for code, (severity, says) in FAULTS.items()
        if (count := checked.counts.get(code, 0))
    ]


def _total(checked: Checked, severity: str) -> int:
    return sum(count for code, count in checked.counts.items() if FAULTS[code][0] == severity)


def _record(finding: Finding, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "says": say(FAULTS[finding.code][1]),
        "where": finding.where,
        "sample": finding.sample,
        "what": finding.what,
        "remedy": finding.remedy,
        "evidence": list(finding.evidence),
        "fix": finding.fix,
        "shown": pictures,
        "more": max(0, len(finding.shown) - len(pictures)),
    }


def _shown(shown: Shown, album: _Album) -> dict[str, Any]:
    """A picture's name, its number among the page's pictures, and its boxes that can be drawn."""
    labels = (*shown.labels, *[""] * len(shown.boxes))
    return {
        "name": str(shown.path),
        "picture": album.number(shown.path),
        "boxes": [
            {"xyxy": list(box), "label": label}
            for box, label in zip(shown.boxes, labels, strict=False)
            if all(map(math.isfinite, box))
        ],
    }


class _Album:
    """The pictures of a page, each held once; in place of one that cannot be drawn, why."""

    def __init__(self) -> None:
        self.pictures: list[Picture | str] = []
        self._numbers: dict[Path, int] = {}

    def number(self, path: Path) -> int:
        """The number of the picture at `path`, which is added when it is new."""
        if path not in self._numbers:
            self._numbers[path] = len(self.pictures)
            self.pictures.append(_thumbnail(path))
        return self._numbers[path]


def _thumbnail(path: Path) -> Picture | str:
    try:
        return picture(open_picture(path), SIDE)
    except DamagedPicture as problem:
        return problem.what
