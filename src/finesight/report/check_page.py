"""HTML page of `finesight data check --html`: every issue with images and affected boxes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from finesight.check.check_issues import (
    EXIT_CODES,
    ISSUE_TYPES,
    CheckIssue,
    CheckResult,
    IssueImage,
)
from finesight.data.image_header import CorruptImageError
from finesight.report.html import render_page
from finesight.report.i18n import translate
from finesight.report.inline_image import InlineImage, build_inline_image
from finesight.vision.image_decoding import load_image

MAX_IMAGES = 300
"""Maximum number of images on the page. Further issues are listed without images."""

MAX_IMAGES_PER_ISSUE = 4
"""Maximum number of images per issue."""

MAX_IMAGE_SIDE = 360
"""Maximum width and height of an image on the page, in pixels."""


def render_check_page(
    check_result: CheckResult,
    max_images: int = MAX_IMAGES,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> str:
    """Render the result of a data check as an HTML page.

    Images are distributed over issue types, so that rare types have images as well.

    Args:
        check_result: Result of the data check.
        max_images: Maximum number of images on the page.
        on_progress: Called with 1 after each issue.
    """
    selected = _select_illustrated_issues(check_result.issues, max_images)
    page_images = _PageImages()
    records = []
    for issue_index, issue in enumerate(check_result.issues):
        selected_images = issue.images[:MAX_IMAGES_PER_ISSUE] if issue_index in selected else ()
        records.append(
            _build_issue_record(
                issue,
                [_build_image_record(issue_image, page_images) for issue_image in selected_images],
            )
        )
        on_progress(1)
    num_without_images = sum(bool(issue.images) for issue in check_result.issues) - len(selected)
    return render_page(
        "check",
        {"issues": records, "images": page_images.images},
        title=translate("Data check"),
        check_result=check_result,
        issue_types=_summarize_issue_types(check_result),
        severities={
            severity: _count_by_severity(check_result, severity) for severity in EXIT_CODES
        },
        num_images=sum(not isinstance(image, str) for image in page_images.images),
        num_without_images=num_without_images,
    )


def _select_illustrated_issues(issues: Sequence[CheckIssue], max_images: int) -> set[int]:
    """Return the indices of issues that get images, alternating between issue types."""
    by_code: dict[str, list[int]] = defaultdict(list)
    for issue_index, issue in enumerate(issues):
        if issue.images:
            by_code[issue.code].append(issue_index)
    selected: set[int] = set()
    remaining = max_images
    for issue_index in chain.from_iterable(zip_longest(*by_code.values())):
        if issue_index is None:
            continue
        remaining -= len(issues[issue_index].images[:MAX_IMAGES_PER_ISSUE])
        if remaining < 0:
            break
        selected.add(issue_index)
    return selected


def _summarize_issue_types(check_result: CheckResult) -> list[dict[str, Any]]:
    """Return the issue types that occur, with their counts, most severe first."""
    listed_counts = Counter(issue.code for issue in check_result.issues)
    return [
        {
            "code": code,
            "severity": severity,
            "description": description,
            "count": count,
            "num_listed": listed_counts[code],
            "num_samples": check_result.affected_samples.get(code, 0),
        }
        for code, (severity, description) in ISSUE_TYPES.items()
        if (count := check_result.issue_counts.get(code, 0))
    ]


def _count_by_severity(check_result: CheckResult, severity: str) -> int:
    return sum(
        count
        for code, count in check_result.issue_counts.items()
        if ISSUE_TYPES[code][0] == severity
    )


def _build_issue_record(issue: CheckIssue, image_records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "code": issue.code,
        "severity": issue.severity,
        "description": translate(ISSUE_TYPES[issue.code][1]),
        "location": issue.where,
        "sample_id": issue.sample_id,
        "message": issue.what,
        "remedy": issue.remedy,
        "evidence": list(issue.evidence),
        "fix": issue.fix,
        "images": image_records,
        "num_more": max(0, len(issue.images) - len(image_records)),
    }


def _build_image_record(issue_image: IssueImage, page_images: _PageImages) -> dict[str, Any]:
    """Return the page data of an image: its name, index and boxes with finite corners."""
    labels = (*issue_image.labels, *[""] * len(issue_image.boxes))
    return {
        "name": str(issue_image.path),
        "image_index": page_images.get_index(issue_image.path),
        "boxes": [
            {"xyxy": list(box), "label": label}
            for box, label in zip(issue_image.boxes, labels, strict=False)
            if all(map(math.isfinite, box))
        ],
    }


class _PageImages:
    """Thumbnails of a page. Each image is included once, unreadable ones as an error message."""

    def __init__(self) -> None:
        self.images: list[InlineImage | str] = []
        self._index_by_path: dict[Path, int] = {}

    def get_index(self, path: Path) -> int:
        """Return the index of an image on the page. A new image is added."""
        if path not in self._index_by_path:
            self._index_by_path[path] = len(self.images)
            self.images.append(_make_thumbnail(path))
        return self._index_by_path[path]


def _make_thumbnail(path: Path) -> InlineImage | str:
    try:
        return build_inline_image(load_image(path), MAX_IMAGE_SIDE)
    except CorruptImageError as error:
        return error.what
