"""Validation samples with their answers before and after training, as page data.

Page data contain thumbnails, boxes, and formulas as MathML.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finesight.data.image_file import MAX_IMAGE_PIXELS, CorruptImageError, get_file, read_image_size
from finesight.data.sample import BoxPart
from finesight.errors import UserError
from finesight.evaluate.bootstrap import BOUNDED, UNBOUNDED, ScoreEstimator, estimate_mean
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.json_metrics import count_fields, name_boxes, parse_form
from finesight.evaluate.mathml import convert_formula
from finesight.evaluate.metric_difference import (
    MetricDifference,
    compare_estimators,
    index_by_sample,
)
from finesight.report.html import build_inline_image
from finesight.report.i18n import translate
from finesight.report.metric_rows import format_metric_name
from finesight.report.run_reader import JsonObject, as_object, is_finite, read_json_lines
from finesight.vision.image_processing import load_image

EXAMPLE_KINDS = ("worse", "better", "wrong", "right")
"""Classes of examples by score, in the order in which examples are selected.

- `worse`: the score decreased.
- `better`: the score increased.
- `wrong`: the score did not change, and an answer is incorrect.
- `right`: the score did not change, and all answers are correct (see `is_correct`).
"""

PER_SAMPLE_METRICS = {
    "accuracy_at_0.5": "hit",
    "accuracy_at_0.75": "hit_at_0.75",
    "f1_at_0.5": "f1",
    "mean_iou": "iou",
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
    """Validation sample with its predictions, such as those before and after training.

    Attributes:
        predictions: Prediction of each evaluation or run. None if missing.
        scores: Compared score of each prediction. None if unknown.
        kind: Class by score, such as `better`.
        change: Increase of the compared score, or range of the scores of several runs.
        row_index: Position of the sample in the predictions (0-based).
        is_incorrect: Whether the last scored answer is incorrect.
    """

    predictions: Sequence[JsonObject | None]
    scores: Sequence[float | None]
    kind: str
    change: float
    row_index: int = 0
    is_incorrect: bool = False

    @property
    def latest(self) -> JsonObject:
        """Last prediction of the sample. All predictions contain the same question."""
        return next(line for line in reversed(self.predictions) if line is not None)


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a page, with the total number of validation samples by class.

    Attributes:
        displayed: Examples on the page, by class, largest change first.
        counts: Number of examples by class, including those that are not displayed.
        metric: Name of the compared per-sample score. Empty if there is none.
        is_paired: True if there are predictions of several evaluations or runs.
        num_incorrect: Number of incorrect last answers of all classes, also improved ones.
    """

    displayed: list[Example]
    counts: dict[str, int]
    metric: str
    is_paired: bool
    num_incorrect: int = 0

    @property
    def total(self) -> int:
        """Number of examples, including those that are not displayed."""
        return sum(self.counts.values())

    def count_hidden(self) -> dict[str, int]:
        """Return the number of examples by class that are not displayed."""
        displayed_counts = Counter(example.kind for example in self.displayed)
        return {
            kind: count - displayed_counts[kind]
            for kind, count in self.counts.items()
            if count > displayed_counts[kind]
        }


def build_example_set(
    line_groups: Sequence[Sequence[JsonObject | None]],
    primary_metric: str | None,
    quotas: Mapping[str, int],
    max_examples: int,
) -> ExampleSet:
    """Classify the predictions of each sample, and select the examples of a page.

    Args:
        line_groups: Predictions of each sample. None if missing.
        primary_metric: Primary metric, by which examples are classified.
        quotas: Classes with the number of examples that are selected first. With the class
            `differ`, examples of unequal scores belong to it instead of `better` or `worse`.
    """
    metric = select_sample_metric(
        primary_metric, [line for lines in line_groups for line in lines if line is not None]
    )
    groups: dict[str, list[Example]] = {kind: [] for kind in quotas}
    for row_index, lines in enumerate(line_groups):
        scores = [read_scores(line).get(metric) if line else None for line in lines]
        known_scores = [score for score in scores if score is not None]
        change = max(known_scores, default=0.0) - min(known_scores, default=0.0)
        if "differ" not in quotas:
            change = known_scores[-1] - known_scores[0] if known_scores else 0.0
        kind = "wrong"
        if abs(change) > MIN_SCORE_CHANGE:
            kind = "better" if change > 0 else "worse"
            if "differ" in quotas:
                kind = "differ"
        correct = [
            is_correct(line, metric) for line in lines if line and metric in read_scores(line)
        ]
        if kind == "wrong" and correct and all(correct):
            kind = "right"
        is_incorrect = bool(correct) and not correct[-1]
        groups[kind].append(Example(lines, scores, kind, change, row_index, is_incorrect))
    for group in groups.values():
        group.sort(key=lambda example: -abs(example.change))
    # Classes with more examples use the rest of the quotas of smaller ones.
    counts = {kind: min(len(group), quotas[kind]) for kind, group in groups.items()}
    for kind, group in groups.items():
        counts[kind] += min(len(group) - counts[kind], max_examples - sum(counts.values()))
    return ExampleSet(
        displayed=[one for kind, group in groups.items() for one in group[: counts[kind]]],
        counts={kind: len(group) for kind, group in groups.items()},
        metric=metric,
        is_paired=any(len(lines) > 1 for lines in line_groups),
        num_incorrect=count_incorrect(one for group in groups.values() for one in group),
    )


def count_incorrect(examples: Iterable[Example]) -> int:
    """Return the number of examples that are incorrect or have no score."""
    return sum(example.kind == "wrong" or example.is_incorrect for example in examples)


def read_examples(
    before: Path | None,
    after: Path | None,
    primary_metric: str | None,
    max_examples: int,
    max_bytes: int | None = None,
) -> ExampleSet:
    """Read examples from the predictions before and after training.

    Args:
        before: Prediction file before training. None if missing.
        after: Prediction file after training. None if missing.
        primary_metric: Primary metric of the run, by which examples are classified.
        max_bytes: See `read_json_lines`.
    """
    quotas = dict.fromkeys(EXAMPLE_KINDS, max_examples // len(EXAMPLE_KINDS))
    is_paired = before is not None and after is not None
    pairs = list(pair_predictions(before, after, max_bytes))
    examples = build_example_set(pairs, primary_metric, quotas, max_examples)
    return replace(examples, is_paired=is_paired)


def read_groups(path: Path, max_groups: int, max_bytes: int | None = None) -> list[Example]:
    """Read groups of responses, those of the latest step first; `row_index` is the step."""
    groups: defaultdict[int, dict[int, JsonObject]] = defaultdict(dict)
    with suppress(UserError):
        for line in read_json_lines(path, max_bytes=max_bytes) if path.exists() else ():
            step, number = line.get("step"), line.get("response")
            if isinstance(step, int) and isinstance(number, int):
                # A step that was repeated after running out of memory replaces its responses.
                scores = read_scores(line) | {"advantage": line.get("advantage")}
                groups[step][number] = line | {"scores": scores}
    return [
        Example([lines[number] for number in sorted(lines)], [], "", 0.0, step)
        for step, lines in sorted(groups.items(), reverse=True)[:max_groups]
    ]


def pair_predictions(
    before: Path | None, after: Path | None, max_bytes: int | None = None
) -> Iterator[tuple[JsonObject | None, JsonObject | None]]:
    """Yield pairs of predictions for the same sample from two prediction files.

    The missing prediction of a pair is None. Samples with duplicate IDs are paired in order. Only
    samples of the second file are used, if there is one: others have no answer to classify.
    """
    before_lines, after_lines = (
        index_by_sample(
            list(read_json_lines(path, max_bytes=max_bytes)) if path else [],
            lambda line: str(line.get("id")),
        )
        for path in (before, after)
    )
    for key, line in after_lines.items():
        yield before_lines.pop(key, None), line
    for line in before_lines.values() if after is None else ():
        yield line, None


def select_sample_metric(primary_metric: str | None, lines: Sequence[JsonObject]) -> str:
    """Return the per-sample score that best represents the primary metric.

    Returns an empty string if the predictions have no suitable score.
    """
    available = {name for line in lines for name in read_scores(line)}
    candidates = [PER_SAMPLE_METRICS.get(primary_metric, primary_metric)] if primary_metric else []
    return next((name for name in (*candidates, *FALLBACK_METRICS) if name in available), "")


def read_scores(line: JsonObject) -> dict[str, float]:
    """Return the per-sample scores of a prediction that are finite numbers."""
    scores = as_object(line.get("scores"))
    return {str(name): float(value) for name, value in scores.items() if is_finite(value)}


def is_correct(line: JsonObject, metric: str) -> bool:
    """Return whether an answer has the maximum score, or equals a reference in text and boxes.

    The CIDEr-D of a caption that equals its reference is below the maximum if its words are common.
    """
    if read_scores(line).get(metric, 0.0) >= MAX_SCORES.get(metric, 1.0) - MIN_SCORE_CHANGE:
        return True
    has_equal_text = str(line.get("answer", "")).strip() in map(str.strip, _read_references(line))
    return has_equal_text and read_boxes(line.get("boxes")) == read_boxes(line.get("gold_boxes"))


def read_incorrect_lines(predictions: Path, primary_metric: str | None) -> list[JsonObject]:
    """Read the predictions with a score that are not correct, in file order.

    Raises:
        UserError: No prediction has a suitable score.
    """
    lines = list(read_json_lines(predictions))
    metric = select_sample_metric(primary_metric, lines)
    if not metric:
        raise UserError(
            f"none of {len(lines)} predictions has a score of {primary_metric or 'any metric'}",
            where=str(predictions),
            expected="scores of samples, as training and evaluation write",
            remedy="set eval.metric in the recipe, and evaluate again",
        )
    return [line for line in lines if metric in read_scores(line) and not is_correct(line, metric)]


def read_image_paths(line: JsonObject) -> list[str]:
    """Return the image paths of a prediction's sample."""
    value = line.get("image")
    paths: list[Any] = value if isinstance(value, list) else [value]
    return [path for path in paths if isinstance(path, str)]


def find_image(name: str, folders: Sequence[Path]) -> Path:
    """Return the path of an image in the first folder with it, or else the given path."""
    candidates = (folder / name for folder in folders)
    return next((path for path in candidates if get_file(path).exists()), Path(name))


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
    pairs = [pair for pair in pair_predictions(before, after) if None not in pair]
    estimators: tuple[dict[str, ScoreEstimator], dict[str, ScoreEstimator]] = ({}, {})
    for name in before_metrics.keys() & after_metrics.keys() if pairs else ():
        scores_N2 = np.array([[_read_score(name, line) for line in pair] for pair in pairs])
        errors = scores_N2.mean(axis=0) - (before_metrics[name], after_metrics[name])
        if (abs(errors) < MAX_MEAN_ERROR).all():  # False for NaN
            bounds = BOUNDED if ((scores_N2 >= 0) & (scores_N2 <= 1)).all() else UNBOUNDED
            for column_N, target in zip(scores_N2.T, estimators, strict=True):
                target[name] = estimate_mean(column_N, bounds)
    return {difference.name: difference for difference in compare_estimators(*estimators)}


def _read_score(metric: str, line: Any) -> float:
    """Return a score of a prediction; NaN if it is missing."""
    if metric == "ended_with_eos":
        return float(line.get("finish_reason") == "stop")
    return read_scores(line).get(PER_SAMPLE_METRICS.get(metric, metric), math.nan)


MIN_THUMBNAIL_PIXELS, MAX_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS = 200 * 260, 480 * 640, 40_000_000
"""Minimum and maximum pixels of a thumbnail, and maximum pixels of all thumbnails.

Thumbnails are limited by area, which keeps wide formulas and tall pages readable.
"""

THUMBNAIL_QUALITY = 70

MAX_ANSWER_CHARS = 4000

MAX_BOXES = 200
"""Maximum number of boxes that are drawn per answer."""

NUM_DECODE_THREADS = 8

MAX_PARALLEL_PIXELS = 16_000_000
"""Pixels of an image above which it is not decoded in parallel with others.

Each thread retains the memory of its largest image. In a training process, this would add up to
gigabytes.
"""

MAX_ID_CHARS = 200

ThumbnailCache = dict[tuple[str, int], JsonObject]
"""Thumbnails by image path and thumbnail pixel limit."""


class ExampleDataBuilder:
    """Converts validation samples with answers to page data. Each image is included once.

    Args:
        folders: Folders to which relative image paths may refer, tried in order.
        has_formulas: Whether answers are formulas in LaTeX.
        thumbnails: Thumbnails of the previous page. They are reused, and replaced by those of the
            new page.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        has_formulas: bool,
        thumbnails: ThumbnailCache | None = None,
    ) -> None:
        self._folders, self._has_formulas = folders, has_formulas
        self._thumbnails: ThumbnailCache = {} if thumbnails is None else thumbnails

    def build(self, examples: Sequence[Example]) -> JsonObject:
        """Return page data with `examples`, and `images` to which the examples refer by index."""
        thumbnails, image_indices = self._build_thumbnails([example.latest for example in examples])
        score_names = {
            name
            for example in examples
            for line in example.predictions
            if line
            for name in read_scores(line)
        }
        return {
            "images": thumbnails,
            # Names in prediction files, for the export.
            "score_names": {format_metric_name(name): name for name in sorted(score_names)},
            "examples": [
                {
                    **self._build_question(example.latest, image_indices),
                    "kind": example.kind,
                    "change": round(example.change, 4),
                    "row_index": example.row_index,
                    "is_incorrect": example.is_incorrect,
                    "is_truncated": _is_truncated(example.latest),
                    "predictions": [self._build_answer(line) for line in example.predictions],
                    "scores": [
                        None if score is None else round(score, 4) for score in example.scores
                    ],
                }
                for example in examples
            ],
        }

    def _build_thumbnails(
        self, lines: Iterable[JsonObject]
    ) -> tuple[list[JsonObject | None], dict[str, int]]:
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
                pool.map(partial(self._make_thumbnail, max_pixels, MAX_PARALLEL_PIXELS), paths)
            )
        thumbnails = [
            thumbnail or self._make_thumbnail(max_pixels, MAX_IMAGE_PIXELS, path)
            for path, thumbnail in zip(paths, small_thumbnails, strict=True)
        ]
        self._thumbnails.clear()
        self._thumbnails |= {
            (thumbnail["path"], max_pixels): thumbnail
            for thumbnail in thumbnails
            if thumbnail and "src" in thumbnail
        }
        return thumbnails, image_indices

    def _make_thumbnail(
        self, max_pixels: int, max_source_pixels: int, name: str
    ) -> JsonObject | None:
        """Return the thumbnail of an image, or an error message if it is unreadable.

        Returns None without decoding if the image has more than `max_source_pixels`.
        """
        if (name, max_pixels) in self._thumbnails:
            return self._thumbnails[name, max_pixels]
        try:
            path = find_image(name, self._folders)
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

    def _build_question(self, line: JsonObject, image_indices: dict[str, int]) -> JsonObject:
        """Return the page data of a sample without answers: question, images and references."""
        reference_texts = _read_references(line)
        return {
            "id": _truncate(str(line.get("id")), MAX_ID_CHARS),
            "images": [image_indices[path] for path in read_image_paths(line)],
            "question": _truncate(str(line.get("prompt", ""))),
            "references": [_truncate(text) for text in reference_texts],
            "formula": self._convert_formula(reference_texts[0]) if reference_texts else None,
            "boxes": read_boxes(line.get("gold_boxes")),
        }

    def _build_answer(self, line: JsonObject | None) -> JsonObject | None:
        """Return the page data of an answer and its scores, or None without a prediction."""
        if line is None:
            return None
        text, is_complete = str(line.get("answer", "")), line.get("finish_reason") != "length"
        num_tokens = line.get("num_tokens")
        references = _read_references(line)
        is_compared = len(references) == 1 and len(text) <= MAX_ANSWER_CHARS >= len(references[0])
        fields = diff_fields(*_name_boxes(line, references)) if is_compared else None
        return {
            "text": _truncate(text),
            "fields": fields,
            "diff": diff_texts(text, references[0]) if is_compared and fields is None else None,
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
        return convert_formula(text) if self._has_formulas else None


def _name_boxes(line: JsonObject, references: Sequence[str]) -> tuple[str, str]:
    """Return answer and reference with equal texts for boxes that the metric `json` equates."""
    boxes, gold_boxes = (
        tuple(BoxPart.model_construct(**box) for box in read_boxes(line.get(key)))
        for key in ("boxes", "gold_boxes")
    )
    case = EvalCase(str(line.get("answer", "")), boxes, tuple(references), gold_boxes)
    match line.get("image_size"):
        case [int(height), int(width)]:
            case = replace(case, image_size=(height, width))
    answer, reference, _ = name_boxes(case)
    return answer, reference


def _read_references(line: JsonObject) -> list[str]:
    """Return the reference texts of a prediction that are not empty."""
    references = line.get("references")
    texts = [line.get("gold"), *(references if isinstance(references, list) else [])]
    return [text for text in texts if isinstance(text, str) and text]


MAX_DIFF_PAIRS = 50_000
"""Maximum number of pairs of equal words of a diff, to which its time is proportional."""

MIN_COMMON_FRACTION = 0.4
"""Minimum fraction of equal words for an informative diff."""

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"

_DIFF_TOKEN = re.compile(rf"\\[A-Za-z]+|[{_CJK}]|[^\W{_CJK}]+|\S")
"""Pattern of the units of a diff: LaTeX command, CJK character, word, or other character."""


def diff_texts(text: str, reference: str) -> list[tuple[int, int, int, int]] | None:
    """Return the differences between an answer and its reference.

    Units are words, or characters if the reference is a single word. White space is not compared.

    Returns:
        Start and end in the answer, then in the reference, of each difference, in Unicode
        characters. None if the texts are long or differ in most words.
    """
    pattern = re.compile(r"\S") if len(reference.split()) == 1 else _DIFF_TOKEN
    words, reference_words = (list(pattern.finditer(one)) for one in (text, reference))
    sequence, reference_sequence = ([word[0] for word in one] for one in (words, reference_words))
    counts, reference_counts = Counter(sequence), Counter(reference_sequence)
    if sum(count * reference_counts[word] for word, count in counts.items()) > MAX_DIFF_PAIRS:
        return None
    matcher = SequenceMatcher(None, sequence, reference_sequence, autojunk=False)
    num_equal = sum(block.size for block in matcher.get_matching_blocks())
    if num_equal < MIN_COMMON_FRACTION * max(len(words), len(reference_words)):
        return None
    return [
        (*_get_span(words, start, end), *_get_span(reference_words, reference_start, reference_end))
        for kind, start, end, reference_start, reference_end in matcher.get_opcodes()
        if kind != "equal"
    ]


def _get_span(words: Sequence[re.Match[str]], start: int, end: int) -> tuple[int, int]:
    """Return the characters of the words `start` to `end`; an empty span if there is none."""
    if start < end:
        return words[start].start(), words[end - 1].end()
    position = words[start - 1].end() if start else 0
    return position, position


def diff_fields(text: str, reference: str) -> JsonObject | None:
    """Compare the fields of a JSON answer with its reference, as the `json` metric does.

    Returns:
        `differences`, rows of field, values of the reference and values of the answer, and
        `num_equal`, the number of equal values. None if a text is not a JSON object or list.
    """
    reference_form, form = parse_form(reference), parse_form(text)
    if reference_form is None or form is None:
        return None
    expected, predicted = count_fields(reference_form), count_fields(form)
    missing, extra = expected - predicted, predicted - expected
    rows: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for column, values in enumerate((missing, extra)):
        for name, value in values.elements():
            rows[name][column].append(value)
    return {
        "differences": [[name, *columns] for name, columns in rows.items()],
        "num_equal": (expected & predicted).total(),
    }


def read_boxes(content: object) -> list[JsonObject]:
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


def _is_truncated(line: JsonObject) -> bool:
    """Return whether the page contains a text of a prediction only in part."""
    texts = [str(line.get("prompt", "")), str(line.get("answer", "")), *_read_references(line)]
    return max(map(len, texts)) > MAX_ANSWER_CHARS


def _truncate(text: str, max_chars: int = MAX_ANSWER_CHARS) -> str:
    if len(text) <= max_chars:
        return text
    return translate("{} [and {:,} more characters]", text[:max_chars], len(text) - max_chars)
