"""HTML pages of data sets: samples as model input, and the issues of a data check."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import Any

from finesight.check.check_issues import (
    EXIT_CODES,
    ISSUE_TYPES,
    CheckIssue,
    IssueImage,
    count_half_octaves,
)
from finesight.check.check_result import CheckResult
from finesight.data.image_file import CorruptImageError
from finesight.data.sample import BoxPart, LocatedSample
from finesight.encode.renderer import IM_START, NativeRenderer
from finesight.encode.tokenization import (
    EncodedSample,
    TokenizedSample,
    TokenRow,
    VisualSpan,
    iter_token_rows,
)
from finesight.report.charts import Chart, build_histograms
from finesight.report.html import InlineImage, build_inline_image, render_page
from finesight.report.i18n import translate
from finesight.samples.frames import rescale
from finesight.vision.image_processing import load_image, unpatchify

MAX_IMAGE_SIDE = 1024
"""Maximum width and height of an image on the page, in pixels.

Larger images are shrunk for display, after the preprocessing of the model.
"""


def render_sample_page(
    renderer: NativeRenderer,
    samples: Sequence[LocatedSample],
    source: str,
    on_progress: Callable[[int], None] = lambda done: None,
    on_corrupt: Callable[[str, CorruptImageError], None] | None = None,
) -> str:
    """Render samples as an HTML page that shows the model input.

    Everything is decoded from the model input: images from patches, and boxes from token texts in
    the format of the model family.

    Args:
        source: Description of the file or split that contains the samples.
        on_progress: Called with 1 after each sample.
        on_corrupt: Called for each sample that is left out because of its images, with its ID. By
            default, the first one raises its error.
    """
    records = []
    for located_sample in samples:
        try:
            records.append(_build_sample_record(renderer, located_sample))
        except CorruptImageError as error:
            if on_corrupt is None:
                raise
            on_corrupt(located_sample.sample.id, error)
        on_progress(1)
    count_labels = {
        "num_tokens": translate("total tokens"),
        "num_supervised_tokens": translate("total supervised tokens"),
        "num_patches": translate("total patches"),
    }
    totals = {}
    for key, label in count_labels.items():
        totals[label] = sum(record[key] for record in records)
    charts = []
    if len(records) > 1:
        charts = _build_sample_charts(records)
    image_rule = renderer.image_rule.model_dump()
    return render_page(
        "sample",
        {"samples": records, "charts": [chart.data for chart in charts]},
        assets=["charts"],
        title=translate("Model input"),
        charts=charts,
        source=source,
        family=renderer.family.name,
        image_rule=", ".join(f"{key} {value}" for key, value in image_rule.items()),
        num_samples=len(records),
        totals=totals,
    )


def _build_sample_charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Build histograms of the samples on the page."""
    values: defaultdict[str, list[int]] = defaultdict(list)
    for record in records:
        values["num_tokens"].append(record["num_tokens"])
        values["num_supervised_tokens"].append(record["num_supervised_tokens"])
        values["num_boxes"].append(record["num_sample_boxes"])
        for image in record["images"]:
            values["image_side"].append(max(image["original_size"]))
    counts = {name: count_half_octaves(numbers) for name, numbers in values.items()}
    return build_histograms(HISTOGRAM_TITLES, [(translate("samples"), counts)])


def _build_sample_record(renderer: NativeRenderer, located_sample: LocatedSample) -> dict[str, Any]:
    sample = located_sample.sample
    encoded = renderer.encode(located_sample)
    tokenized = encoded.tokenized
    turns = list(_iter_turns(renderer, tokenized))
    sample_boxes = [part for part in sample.iter_parts() if isinstance(part, BoxPart)]
    if turns and sample.label is False:
        turns[-1]["role"] = "rejected"
    images = [span for span in tokenized.spans if span.kind == "image"]
    raw_texts = []
    turn_records = []
    for turn in turns:
        raw_texts.append(turn["raw"])
        turn_records.append({"role": turn["role"], "rows": turn["rows"]})
    boxes = []
    for span, box in _parse_boxes(renderer, raw_texts, images, sample_boxes):
        boxes.append(
            {
                "xyxy": box.xyxy,
                "label": box.label,
                "image_index": tokenized.spans.index(span),
                "original_box": rescale(box.xyxy, span.resized_size, span.original_size),
            }
        )
    return {
        "id": tokenized.id,
        "num_tokens": tokenized.num_tokens,
        "num_supervised_tokens": tokenized.num_supervised_tokens,
        "num_patches": tokenized.num_patches,
        "images": list(_iter_visuals(renderer, encoded)),
        "num_sample_boxes": len(sample_boxes),
        "boxes": boxes,
        "turns": turn_records,
    }


def _iter_turns(renderer: NativeRenderer, tokenized: TokenizedSample) -> Iterator[dict[str, Any]]:
    """Yield the role, the token rows and the raw text of each turn.

    The raw text has no image placeholders. The role of a rejected answer is `rejected`.
    """
    start_id = renderer.tokenizer.token_to_id(IM_START)
    rejected_starts = tokenized.response_starts[1:]
    turn: list[TokenRow] = []
    for row in (*iter_token_rows(tokenized, renderer.tokenizer), None):
        if turn and (row is None or row.id == start_id or row.start in rejected_starts):
            text_ids = []
            token_records = []
            for token in turn:
                token_records.append(_build_token_record(renderer, tokenized, token))
                if token.span is None:
                    text_ids.append(token.id)
            raw_text = renderer.tokenizer.decode(text_ids, skip_special_tokens=False)
            role = raw_text.removeprefix(IM_START).partition("\n")[0]
            if turn[0].start in rejected_starts:
                role = "rejected"
            yield {"role": role, "raw": raw_text, "rows": token_records}
            turn = []
        if row is not None:
            turn.append(row)


def _build_token_record(
    renderer: NativeRenderer, tokenized: TokenizedSample, row: TokenRow
) -> dict[str, Any]:
    decode = renderer.tokenizer.decode
    kind = "text"
    if not decode([row.id], skip_special_tokens=True):
        kind = "special"
    elif "\ufffd" in decode([row.id], skip_special_tokens=False):
        kind = "bytes"
    token_record = {
        "start": row.start,
        "id": row.id,
        "text": row.text,
        "kind": kind,
        "first_position": row.first_position,
    }
    if row.is_supervised:
        token_record["is_supervised"] = True
    if row.span is not None:
        visual_index = tokenized.spans.index(row.span)
        token_record |= {
            "kind": "image",
            "image_index": visual_index,
            "end": row.stop - 1,
            "last_position": row.last_position,
        }
    return token_record


def _iter_visuals(renderer: NativeRenderer, encoded: EncodedSample) -> Iterator[dict[str, Any]]:
    """Yield the page data of every image and video, reconstructed from patches."""
    patch_offset = 0
    for span in encoded.tokenized.spans:
        t, h, w = span.grid_thw
        stop = patch_offset + t * h * w
        frames = unpatchify(
            encoded.patches_ND[patch_offset:stop], span.grid_thw, renderer.patch_config
        )
        patch_offset = stop
        inline_frames = []
        for frame in frames[: span.num_frames]:
            inline_frames.append(build_inline_image(frame, MAX_IMAGE_SIDE))
        yield {
            "kind": span.kind,
            "name": span.files[0].name,
            "frames": inline_frames,
            "original_size": span.original_size,
            "resized_size": span.resized_size,
            "grid_thw": span.grid_thw,
            "num_tokens": span.stop - span.start,
        }


def _parse_boxes(
    renderer: NativeRenderer,
    texts: Sequence[str],
    images: Sequence[VisualSpan],
    sample_boxes: Sequence[BoxPart],
) -> list[tuple[VisualSpan, BoxPart]]:
    """Parse boxes from the texts of all turns, in pixels of the resized images.

    The text does not identify images. If the number of boxes equals that of the sample, they are
    assigned to the images of the sample's boxes, otherwise to the first image.
    """
    if not images:
        return []
    boxes_by_image: list[list[BoxPart]] = []
    for image in images:
        boxes: list[BoxPart] = []
        for text in texts:
            boxes += renderer.family.read_boxes(text, image.resized_size, image.resized_size)
        boxes_by_image.append(boxes)
    num_boxes = len(boxes_by_image[0])
    image_indices = [0] * num_boxes
    if len(sample_boxes) == num_boxes:
        image_indices = [part.image for part in sample_boxes]
    located_boxes = []
    for box_index, image_index in enumerate(image_indices):
        located_boxes.append((images[image_index], boxes_by_image[image_index][box_index]))
    return located_boxes


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

HISTOGRAM_TITLES = {
    "answer_chars": ("Characters per answer", "share of samples"),
    "num_tokens": ("Tokens per sample", "share of samples"),
    "num_supervised_tokens": ("Supervised tokens per sample", "share of samples"),
    "image_side": ("Longest side of images", "pixels, share of images"),
    "num_boxes": ("Boxes per sample", "share of samples with boxes"),
}
"""Title and caption of each histogram."""

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
