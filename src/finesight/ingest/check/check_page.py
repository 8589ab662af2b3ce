"""HTML page of the result of a data check."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import Any

from finesight.ingest.check.check_issues import EXIT_CODES, ISSUE_TYPES, CheckIssue, IssueImage
from finesight.ingest.check.check_result import CheckResult
from finesight.report.charts import build_histograms
from finesight.report.data_pages import HISTOGRAM_TITLES
from finesight.report.html import InlineImage, build_inline_image, render_page
from finesight.report.i18n import translate
from finesight.samples.image_file import CorruptImageError
from finesight.vision.image_processing import load_image

MAX_IMAGES = 300
"""Maximum number of images on the page. Further issues are listed without images."""

MAX_IMAGES_PER_ISSUE = 4

MAX_ISSUE_IMAGE_SIDE = 360

CHECKS: dict[str, list[str]] = {
    "Rows, roles, reasoning and empty texts": [
        "invalid-row",
        "invalid-role-order",
        "image-in-answer",
        "empty-answer",
        "empty-question",
        "unpaired-reasoning",
        "misplaced-reasoning",
    ],
    "Image and video files, completely decoded": [
        "image-missing",
        "image-truncated",
        "image-corrupt",
        "image-too-large",
        "video-frame-sizes-differ",
    ],
    "Placeholders, special tokens and boxes in texts": [
        "placeholder-count-mismatch",
        "placeholder-in-text",
        "special-token-in-text",
        "box-in-text",
        "coordinates-in-text",
    ],
    "Boxes within their images": [
        "box-outside",
        "box-inverted",
        "box-empty",
        "box-without-image",
        "box-at-edge",
        "box-tiny",
        "box-covers-image",
    ],
    "Convention of box coordinates": [
        "boxes-xywh",
        "boxes-cxcywh",
        "boxes-yxyx",
        "boxes-xyxy",
        "boxes-pixels",
        "boxes-thousandths",
        "boxes-percent",
        "boxes-normalized",
        "boxes-resized",
        "boxes-before-exif-rotation",
        "boxes-mixed",
    ],
    "Number of tokens": [
        "too-long",
    ],
    "Validation images in the training data": [
        "leaked-image",
        "leaked-image-reencoded",
    ],
    "Duplicates, contradictions and dominant answers": [
        "contradictory-answers",
        "duplicate-sample",
        "dominant-answer",
        "answer-not-json",
        "rare-similar-answer",
    ],
}
"""Issue codes by check, in the order of the page."""

SPLIT_NAMES = {False: "training", True: "validation"}


def render_check_page(
    check_result: CheckResult,
    max_images: int = MAX_IMAGES,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> str:
    """Render the result of a data check as an HTML page.

    Images are distributed over issue types, so that rare types have images as well.

    Args:
        on_progress: Called with 1 after each issue.
    """
    selected = _select_illustrated_issues(check_result.issues, max_images)
    images: dict[Path, InlineImage | str] = {}
    records = []
    for issue_index, issue in enumerate(check_result.issues):
        shown: Sequence[IssueImage] = ()
        if issue_index in selected:
            shown = issue.images
        severity, description = ISSUE_TYPES[issue.code]
        record = asdict(issue)
        record |= {"severity": severity, "description": translate(description)}
        record |= _build_image_records(shown, images)
        records.append(record)
        on_progress(1)
    previews = []
    for preview in check_result.previews:
        record = asdict(preview)
        record["split"] = translate(SPLIT_NAMES[preview.is_validation])
        record |= _build_image_records(preview.images, images)
        previews.append(record)
    histograms = []
    for split, profile in sorted(check_result.profiles.items()):
        histograms.append((translate(SPLIT_NAMES[split]), profile.histograms))
    charts = build_histograms(HISTOGRAM_TITLES, histograms)
    return render_page(
        "check",
        {
            "issues": records,
            "previews": previews,
            "images": list(images.values()),
            "charts": [chart.data for chart in charts],
        },
        assets=["charts"],
        title=translate("Data check"),
        charts=charts,
        checks=_describe_checks(check_result),
        frequent_values=_list_frequent_values(check_result),
        split_names={split: translate(name) for split, name in SPLIT_NAMES.items()},
        num_boxes=sum(profile.num_boxes for profile in check_result.profiles.values()),
        num_previews=len(previews),
        check_result=check_result,
        files_text=_describe_files(check_result),
        issue_types=_list_issue_types(check_result),
        severities=EXIT_CODES,
        num_images=sum(not isinstance(image, str) for image in images.values()),
        num_without_images=sum(bool(one.images) for one in check_result.issues) - len(selected),
    )


def _describe_files(check_result: CheckResult) -> str:
    """Describe the number of images, video frames and video files."""
    num_images = check_result.num_images
    num_unique = check_result.num_unique_images
    num_frames = check_result.num_video_frames
    if num_frames:
        text = "{:,} images and {:,} video frames ({:,} unique)"
        files_text = translate(text, num_images, num_frames, num_unique)
    else:
        files_text = translate("{:,} images ({:,} unique)", num_images, num_unique)
    if check_result.num_video_files:
        files_text += translate(", {:,} video files", check_result.num_video_files)
    return files_text


def _list_issue_types(check_result: CheckResult) -> list[dict[str, Any]]:
    """Return severity, description and counts of the issue types that were found."""
    listed_counts = Counter(issue.code for issue in check_result.issues)
    issue_types = []
    for code, (severity, description) in ISSUE_TYPES.items():
        if check_result.issue_counts.get(code):
            issue_type = {
                "code": code,
                "severity": severity,
                "description": description,
                "count": check_result.issue_counts[code],
                "num_listed": listed_counts[code],
                "num_samples": check_result.affected_samples.get(code, 0),
            }
            issue_types.append(issue_type)
    return issue_types


def _describe_checks(check_result: CheckResult) -> list[tuple[str, int, str]]:
    """Return the name, the number of issues, and the reason if skipped, of each check."""
    skipped = check_result.skipped_checks
    rows = []
    for name, codes in CHECKS.items():
        num_issues = sum(check_result.issue_counts.get(code, 0) for code in codes)
        reason = ""
        if skipped.keys() >= set(codes):
            reason = translate(skipped[codes[0]])
        rows.append((translate(name), num_issues, reason))
    return rows


def _list_frequent_values(
    check_result: CheckResult,
) -> list[tuple[str, str, list[tuple[str, int, float]]]]:
    """Return the title, a note, and the values with count and percentage, of frequent values."""
    tables = []
    for split, profile in sorted(check_result.profiles.items()):
        kinds = (
            (
                "Most frequent answers, {}",
                profile.answers,
                profile.num_answers,
                profile.num_samples,
            ),
            ("Most frequent labels, {}", profile.labels, profile.num_labels, profile.num_boxes),
        )
        for title, values, num_different, total in kinds:
            # A list of answers that all differ is not informative. Rare classes are.
            has_rare = len(values) == num_different and any(count > 1 for _, count in values)
            min_count = 2
            if has_rare:
                min_count = 1
            rows = []
            for value, count in values:
                if count >= min_count:
                    rows.append((value, count, 100 * count / total))
            note = translate("{:,} different values", num_different)
            if rows:
                tables.append((translate(title, translate(SPLIT_NAMES[split])), note, rows))
    return tables


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


def _build_image_records(
    issue_images: Sequence[IssueImage], images: dict[Path, InlineImage | str]
) -> dict[str, Any]:
    """Return page data of the first images: names, indices and boxes with finite corners.

    Args:
        images: Thumbnails of the page by path, to which the images are added. Each image is
            included once, unreadable ones as an error message.
    """
    records = []
    for issue_image in issue_images[:MAX_IMAGES_PER_ISSUE]:
        path = issue_image.path
        if path not in images:
            try:
                images[path] = build_inline_image(load_image(path), MAX_ISSUE_IMAGE_SIDE)
            except CorruptImageError as error:
                images[path] = error.what
        labels = chain(issue_image.labels, repeat(""))
        boxes = []
        for box, label in zip(issue_image.boxes, labels, strict=False):
            if all(map(math.isfinite, box)):
                boxes.append({"xyxy": list(box), "label": label})
        image_index = list(images).index(path)
        records.append({"name": str(path), "image_index": image_index, "boxes": boxes})
    return {"images": records, "num_more": len(issue_images) - len(records)}
