"""Validation samples with their answers before and after training, as page data.

Page data contain thumbnails, boxes, and formulas as MathML.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from finesight.data.image_header import MAX_IMAGE_PIXELS, CorruptImageError, read_image_size
from finesight.evaluate.bootstrap import (
    BOUNDED,
    UNBOUNDED,
    FloatArray,
    ScoreEstimator,
    estimate_mean,
)
from finesight.evaluate.metric_difference import MetricDifference, compare_estimators
from finesight.report.html import FormulaConverter, build_inline_image
from finesight.report.i18n import translate
from finesight.report.metrics import format_metric_name
from finesight.report.run_reader import JsonObject, is_finite, read_json_lines
from finesight.vision.image_decoding import load_image

T = TypeVar("T")

ExampleKind = Literal["better", "worse", "wrong", "right"]
EXAMPLE_KINDS: tuple[ExampleKind, ...] = ("worse", "better", "wrong", "right")
"""Classes of examples by score, in the order in which examples are selected.

- `worse`: the score decreased.
- `better`: the score increased.
- `wrong`: the score did not change and is below the maximum.
- `right`: the score did not change and is the maximum.
"""

PER_SAMPLE_METRICS = {
    "accuracy_at_0.5": "hit",
    "accuracy_at_0.75": "hit_at_0.75",
    "f1_at_0.5": "f1",
    "mean_iou": "iou",
    "parse_rate": "parsed",
}
"""Names of per-sample scores by metric, if they differ from the name of the metric."""

FALLBACK_METRICS = ("similarity", "exact", "hit", "iou", "f1", "anls", "cider_d", "rouge_l")
"""Per-sample scores to compare if the primary metric has none, in order of preference."""

MAX_SCORES = {"cider_d": 10.0}
"""Maximum per-sample score of metrics whose maximum is not 1."""

MIN_SCORE_CHANGE = 1e-6
"""Minimum change of a score. Smaller differences are rounding errors."""


@dataclass(frozen=True)
class Example:
    """Validation sample with its predictions before and after training.

    Attributes:
        before: Prediction before training. None if missing.
        after: Prediction after training. None if missing.
        kind: Class by score, see `EXAMPLE_KINDS`.
        change: Increase of the compared score. 0 if unknown.
    """

    before: JsonObject | None
    after: JsonObject | None
    kind: ExampleKind
    change: float

    @property
    def latest(self) -> JsonObject:
        """Prediction after training, or before training if there is no other.

        Both contain the same question.
        """
        line = self.before if self.after is None else self.after
        assert line is not None, "example without a prediction"
        return line


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a report, with the total number of validation samples by class.

    Attributes:
        displayed: Examples on the page, by class, largest change first.
        counts: Number of examples by class, including those that are not displayed.
        metric: Name of the compared per-sample score. Empty if there is none.
        is_paired: True if there are predictions before and after training.
    """

    displayed: list[Example]
    counts: dict[ExampleKind, int]
    metric: str
    is_paired: bool

    @property
    def total(self) -> int:
        """Number of examples, including those that are not displayed."""
        return sum(self.counts.values())

    def count_hidden(self) -> dict[ExampleKind, int]:
        """Return the number of examples by class that are not displayed."""
        displayed_counts = Counter(example.kind for example in self.displayed)
        return {
            kind: count - displayed_counts[kind]
            for kind, count in self.counts.items()
            if count > displayed_counts[kind]
        }


def read_examples(
    before: Path | None, after: Path | None, primary_metric: str | None, max_examples: int
) -> ExampleSet:
    """Read examples from the predictions before and after training.

    Args:
        before: Prediction file before training. None if missing.
        after: Prediction file after training. None if missing.
        primary_metric: Primary metric of the run, by which examples are classified.
    """
    line_pairs = list(pair_predictions(before, after))
    metric = select_sample_metric(
        primary_metric, [line for pair in line_pairs for line in pair if line is not None]
    )
    groups: dict[ExampleKind, list[Example]] = {kind: [] for kind in EXAMPLE_KINDS}
    for pair in line_pairs:
        example = _classify_example(*pair, metric)
        groups[example.kind].append(example)
    for group in groups.values():
        group.sort(key=lambda example: -abs(example.change))
    quotas = [max_examples // len(EXAMPLE_KINDS)] * len(EXAMPLE_KINDS)
    return ExampleSet(
        displayed=select_by_quota(list(groups.values()), quotas, max_examples),
        counts={kind: len(group) for kind, group in groups.items()},
        metric=metric,
        is_paired=before is not None and after is not None,
    )


def pair_predictions(
    before: Path | None, after: Path | None
) -> Iterator[tuple[JsonObject | None, JsonObject | None]]:
    """Yield pairs of predictions for the same sample from two prediction files.

    The missing prediction of a pair is None. Samples with duplicate IDs are paired in order.
    """
    unmatched: defaultdict[str, list[JsonObject]] = defaultdict(list)
    for line in read_json_lines(before) if before else ():
        unmatched[str(line.get("id"))].append(line)
    for line in read_json_lines(after) if after else ():
        candidates = unmatched.get(str(line.get("id")))
        yield (candidates.pop(0) if candidates else None), line
    for remaining in unmatched.values():
        yield from ((line, None) for line in remaining)


def select_sample_metric(primary_metric: str | None, lines: Sequence[JsonObject]) -> str:
    """Return the per-sample score that best represents the primary metric.

    Returns an empty string if the predictions have no suitable score.
    """
    available = {name for line in lines for name in read_scores(line)}
    candidates = [PER_SAMPLE_METRICS.get(primary_metric, primary_metric)] if primary_metric else []
    return next((name for name in (*candidates, *FALLBACK_METRICS) if name in available), "")


def read_scores(line: JsonObject) -> dict[str, float]:
    """Return the per-sample scores of a prediction that are finite numbers."""
    scores = line.get("scores")
    return {
        str(name): float(value)
        for name, value in (scores.items() if isinstance(scores, dict) else ())
        if is_finite(value)
    }


def _classify_example(before: JsonObject | None, after: JsonObject | None, metric: str) -> Example:
    before_score, after_score = (
        read_scores(line).get(metric) if line else None for line in (before, after)
    )
    change = 0.0
    if before_score is not None and after_score is not None:
        change = after_score - before_score
    last_score = after_score if after_score is not None else before_score
    max_score = MAX_SCORES.get(metric, 1.0)
    kind: ExampleKind = "wrong"
    if abs(change) > MIN_SCORE_CHANGE:
        kind = "better" if change > 0 else "worse"
    elif last_score is not None and last_score >= max_score - MIN_SCORE_CHANGE:
        kind = "right"
    return Example(before, after, kind, change)


def select_by_quota(
    groups: Sequence[Sequence[T]], quotas: Sequence[int], max_items: int
) -> list[T]:
    """Select at most `max_items` items, the first ones of each group up to its quota.

    Groups with more items use the rest of the quotas of smaller ones.
    """
    counts = [min(len(group), quota) for group, quota in zip(groups, quotas, strict=True)]
    for index, group in enumerate(groups):
        counts[index] += min(len(group) - counts[index], max_items - sum(counts))
    return [item for group, count in zip(groups, counts, strict=True) for item in group[:count]]


def read_image_paths(line: JsonObject) -> list[str]:
    """Return the image paths of a prediction's sample."""
    value = line.get("image")
    paths: list[Any] = value if isinstance(value, list) else [value]
    return [path for path in paths if isinstance(path, str)]


MAX_MEAN_ERROR = 1e-6
"""Maximum difference of a metric from the mean of its per-sample scores.

With a larger difference, the metric is not a mean.
"""


def estimate_differences(
    before: Path,
    after: Path,
    before_metrics: Mapping[str, float],
    after_metrics: Mapping[str, float],
) -> dict[str, MetricDifference]:
    """Estimate the differences of all metrics that are means over samples.

    Returns:
        Difference with confidence interval by metric name. Other metrics are omitted.
    """
    line_pairs = [pair for pair in pair_predictions(before, after) if None not in pair]
    old_means: dict[str, ScoreEstimator] = {}
    new_means: dict[str, ScoreEstimator] = {}
    if not line_pairs:
        return {}
    for name in before_metrics.keys() & after_metrics.keys():
        before_scores, after_scores = (
            _read_score_column(name, lines) for lines in zip(*line_pairs, strict=True)
        )
        if before_scores is None or after_scores is None:
            continue
        if (
            abs(before_scores.mean() - before_metrics[name]) < MAX_MEAN_ERROR
            and abs(after_scores.mean() - after_metrics[name]) < MAX_MEAN_ERROR
        ):
            all_scores = np.concatenate([before_scores, after_scores])
            bounds = BOUNDED if ((all_scores >= 0) & (all_scores <= 1)).all() else UNBOUNDED
            old_means[name] = estimate_mean(before_scores, bounds)
            new_means[name] = estimate_mean(after_scores, bounds)
    return {difference.name: difference for difference in compare_estimators(old_means, new_means)}


def _read_score_column(metric: str, lines: tuple[Any, ...]) -> FloatArray | None:
    """Return one score of every prediction, or None if any prediction lacks it."""
    if metric == "stopped":
        return np.array([float(line.get("stopped") is True) for line in lines])
    scores = [read_scores(line).get(PER_SAMPLE_METRICS.get(metric, metric)) for line in lines]
    return None if None in scores else np.array(scores, np.float64)


MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS = 200 * 260, 480 * 640, 40_000_000
"""Minimum and maximum pixels of a thumbnail, and maximum pixels of all thumbnails.

Thumbnails are limited by area, which keeps wide formulas and tall pages readable.
"""

THUMBNAIL_QUALITY = 70
"""JPEG quality of thumbnails."""

MAX_ANSWER_CHARS = 4000
"""Maximum number of displayed characters of an answer."""

MAX_BOXES = 200
"""Maximum number of boxes that are drawn per answer."""

NUM_DECODE_THREADS = 8
"""Number of threads that decode images for thumbnails."""

MAX_PARALLEL_PIXELS = 16_000_000
"""Pixels of an image above which it is not decoded in parallel with others.

Each thread retains the memory of its largest image. In a training process, this would add up to
gigabytes.
"""

MAX_ID_CHARS = 200
"""Maximum number of displayed characters of a sample ID."""

JsonData = dict[str, Any]

ThumbnailCache = dict[tuple[str, int], JsonData]
"""Thumbnails by image path and thumbnail pixel limit."""


class ExampleDataBuilder:
    """Converts validation samples with answers to page data. Each image is included once.

    Args:
        folders: Folders to which relative image paths may refer, tried in order.
        formula_converter: Converter for answers in LaTeX. None if answers are not formulas.
        thumbnails: Thumbnails of the previous page. They are reused, and replaced by those of the
            new page.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        formula_converter: FormulaConverter | None,
        thumbnails: ThumbnailCache | None = None,
    ) -> None:
        self._folders, self._formula_converter = folders, formula_converter
        self._thumbnails: ThumbnailCache = {} if thumbnails is None else thumbnails

    def build(self, examples: Sequence[Example]) -> JsonData:
        """Return page data with `examples`, and `images` to which the examples refer by index."""
        thumbnails, image_indices = self.build_thumbnails([example.latest for example in examples])
        return {
            "images": thumbnails,
            "examples": [self._build_example(example, image_indices) for example in examples],
        }

    def build_thumbnails(
        self, lines: Iterable[JsonObject]
    ) -> tuple[list[JsonData | None], dict[str, int]]:
        """Return the thumbnails of all images of the given samples, and their indices by path.

        A thumbnail that cannot be created has an error message.
        """
        paths = dict.fromkeys(path for line in lines for path in read_image_paths(line))
        image_indices = {path: index for index, path in enumerate(paths)}
        max_pixels = min(
            MAX_THUMBNAIL_PIXELS, max(MIN_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS // max(1, len(paths)))
        )
        with ThreadPoolExecutor(NUM_DECODE_THREADS) as pool:
            small_thumbnails = list(
                pool.map(partial(self._get_thumbnail, max_pixels, MAX_PARALLEL_PIXELS), paths)
            )
        thumbnails = [
            self._get_thumbnail(max_pixels, MAX_IMAGE_PIXELS, path)
            if thumbnail is None
            else thumbnail
            for path, thumbnail in zip(paths, small_thumbnails, strict=True)
        ]
        self._thumbnails.clear()
        self._thumbnails |= {
            (thumbnail["path"], max_pixels): thumbnail
            for thumbnail in thumbnails
            if thumbnail and "src" in thumbnail
        }
        return thumbnails, image_indices

    def _get_thumbnail(self, max_pixels: int, max_source_pixels: int, name: str) -> JsonData | None:
        return self._thumbnails.get((name, max_pixels)) or self._make_thumbnail(
            max_pixels, max_source_pixels, name
        )

    def _make_thumbnail(
        self, max_pixels: int, max_source_pixels: int, name: str
    ) -> JsonData | None:
        """Return the thumbnail of an image, or an error message if it is unreadable.

        Returns None without decoding if the image has more than `max_source_pixels`.
        """
        try:
            candidates = [folder / name for folder in self._folders]
            path = next((file for file in candidates if file.exists()), Path(name))
            height, width = read_image_size(path)
            if height * width > max_source_pixels:
                return None
            scale = min(1.0, math.sqrt(max_pixels / (width * height)))
            longest = max(1, round(max(width, height) * scale))
            image = load_image(path, min_side=max(1, round(min(width, height) * scale)))
            inline_image = build_inline_image(image, longest, THUMBNAIL_QUALITY)
        except CorruptImageError as error:
            return {"path": name, "error": error.what}
        except (OSError, ValueError) as error:  # permission, null byte in path
            return {"path": name, "error": f"unreadable ({error})"}
        return {"path": name, "src": inline_image["src"], "width": width, "height": height}

    def _build_example(self, example: Example, image_indices: dict[str, int]) -> JsonData:
        return {
            **self.build_question(example.latest, image_indices),
            "kind": example.kind,
            "change": round(example.change, 4),
            "before": self.build_answer(example.before),
            "after": self.build_answer(example.after),
        }

    def build_question(self, line: JsonObject, image_indices: dict[str, int]) -> JsonData:
        """Return the page data of a sample without answers: question, images and references."""
        reference = line.get("gold")
        references = line.get("references")
        texts = [reference, *(references if isinstance(references, list) else [])]
        reference_texts = [text for text in texts if isinstance(text, str) and text]
        return {
            "id": _truncate(str(line.get("id")), MAX_ID_CHARS),
            "images": [image_indices[path] for path in read_image_paths(line)],
            "question": _truncate(str(line.get("prompt", ""))),
            "references": [_truncate(text) for text in reference_texts],
            "formula": self._convert_formula(reference_texts[0]) if reference_texts else None,
            "boxes": read_boxes(line.get("gold_boxes")),
        }

    def build_answer(self, line: JsonObject | None) -> JsonData | None:
        """Return the page data of an answer and its scores, or None without a prediction."""
        if line is None:
            return None
        text, is_complete = str(line.get("answer", "")), line.get("stopped") is not False
        num_tokens = line.get("num_tokens")
        return {
            "text": _truncate(text),
            # A truncated answer is not a valid formula.
            "formula": self._convert_formula(text) if is_complete else None,
            "boxes": read_boxes(line.get("boxes")),
            "scores": {
                format_metric_name(name): round(value, 4)
                for name, value in read_scores(line).items()
            },
            "is_complete": is_complete,
            "num_tokens": num_tokens if isinstance(num_tokens, int) else None,
        }

    def _convert_formula(self, text: str) -> object:
        return self._formula_converter.convert(text) if self._formula_converter else None


def read_boxes(content: object) -> list[JsonData]:
    """Return the boxes of a prediction that have finite corners, at most `MAX_BOXES`.

    Each box has `image` (index), `label` and `xyxy` (corners in pixels).
    """
    boxes = content if isinstance(content, list) else []
    valid_boxes = []
    for box in boxes[:MAX_BOXES]:
        corners = box.get("xyxy") if isinstance(box, dict) else None
        if isinstance(corners, list) and len(corners) == 4 and all(map(is_finite, corners)):
            label = str(box["label"])[:80] if box.get("label") else ""
            xyxy = [float(corner) for corner in corners]
            valid_boxes.append({"image": box.get("image", 0), "label": label, "xyxy": xyxy})
    return valid_boxes


def _truncate(text: str, max_chars: int = MAX_ANSWER_CHARS) -> str:
    if len(text) <= max_chars:
        return text
    return translate("{} [and {:,} more characters]", text[:max_chars], len(text) - max_chars)
