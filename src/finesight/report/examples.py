"""Validation samples with their answers before and after training, as page data.

Page data contain thumbnails, boxes, and formulas as MathML.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

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
from finesight.metric_components import get_score, list_preferred_scores
from finesight.report.html import build_inline_image
from finesight.report.i18n import translate
from finesight.report.metric_rows import format_metric_name
from finesight.report.run_reader import JsonObject, as_object, is_finite, read_json_lines
from finesight.samples.image_file import (
    MAX_IMAGE_PIXELS,
    CorruptImageError,
    get_file,
    read_image_size,
    read_jpeg_size,
)
from finesight.samples.sample import BoxPart
from finesight.vision.image_processing import load_image

EXAMPLE_KINDS = ("worse", "better", "wrong", "right")
"""Classes of examples by score, in the order in which examples are selected.

- `worse`: the score decreased.
- `better`: the score increased.
- `wrong`: the score did not change, and the last answer is incorrect.
- `right`: the score did not change, and the last answer is correct (see `is_correct`).
"""

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
class AnswerCounts:
    """Number of answers by their score of the compared metric.

    Attributes:
        correct: Answers that are correct; see `is_correct`.
        partly: Other answers with a score above 0.
        wrong: All other answers, also those without a score.
        num_gained: Correct answers to samples whose first answer is incorrect. None if unknown.
        num_lost: Incorrect answers to samples whose first answer is correct. None if unknown.
    """

    correct: int
    partly: int
    wrong: int
    num_gained: int | None = None
    num_lost: int | None = None

    @property
    def total(self) -> int:
        """Number of all answers."""
        return self.correct + self.partly + self.wrong


@dataclass(frozen=True)
class ExampleSet:
    """Examples of a page, with the total number of validation samples by class.

    Attributes:
        displayed: Examples on the page, by class, largest change first.
        counts: Number of examples by class, including those that are not displayed.
        metric: Name of the compared per-sample score. Empty if there is none.
        is_paired: True if there are predictions of several evaluations or runs.
        num_incorrect: Number of incorrect last answers of all classes, also improved ones.
        answer_counts: Counts of the answers of each evaluation or run. None without answers, or if
            the metric does not have a maximum of 1.
    """

    displayed: list[Example]
    counts: dict[str, int]
    metric: str
    is_paired: bool
    num_incorrect: int = 0
    answer_counts: Sequence[AnswerCounts | None] = ()

    @property
    def total(self) -> int:
        """Number of examples, including those that are not displayed."""
        return sum(self.counts.values())

    def count_hidden(self) -> dict[str, int]:
        """Return the number of examples by class that are not displayed."""
        displayed_counts = Counter(example.kind for example in self.displayed)
        hidden = {}
        for kind, count in self.counts.items():
            if count > displayed_counts[kind]:
                hidden[kind] = count - displayed_counts[kind]
        return hidden


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
    all_lines = chain.from_iterable(line_groups)
    metric = select_sample_metric(primary_metric, [line for line in all_lines if line is not None])
    answer_counts = []
    for column in zip(*line_groups, strict=True):
        answer_counts.append(count_answers(column, metric))
    groups: dict[str, list[Example]] = {kind: [] for kind in quotas}
    for row_index, lines in enumerate(line_groups):
        example = _classify_sample(lines, metric, row_index, is_unordered="differ" in quotas)
        groups[example.kind].append(example)
    counts: dict[str, int] = {}
    num_displayed: dict[str, int] = {}
    for kind, group in groups.items():
        group.sort(key=lambda example: -abs(example.change))
        counts[kind] = len(group)
        num_displayed[kind] = min(len(group), quotas[kind])
    # The quotas of small classes are not used up, and would leave space on the page.
    for kind, count in counts.items():
        num_free = max_examples - sum(num_displayed.values())
        num_displayed[kind] += min(count - num_displayed[kind], num_free)
    displayed: list[Example] = []
    for kind, group in groups.items():
        displayed += group[: num_displayed[kind]]
    return ExampleSet(
        displayed=displayed,
        counts=counts,
        metric=metric,
        is_paired=any(len(lines) > 1 for lines in line_groups),
        num_incorrect=count_incorrect(chain.from_iterable(groups.values())),
        answer_counts=answer_counts,
    )


def count_answers(lines: Sequence[JsonObject | None], metric: str) -> AnswerCounts | None:
    """Count the answers of an evaluation or run by their scores."""
    counts: Counter[str] = Counter()
    has_scores = False
    for line in lines:
        if line is None:
            continue
        score = read_scores(line).get(metric)
        # Custom scores may exceed the default maximum of 1. Captions have no correct answer.
        if score is not None and max(score, get_score(metric).maximum) > 1:
            return None
        has_scores |= score is not None
        if _has_correct_score(line, metric):
            counts["correct"] += 1
        elif score is not None and score > 0:
            counts["partly"] += 1
        else:
            counts["wrong"] += 1
    if not has_scores:
        return None
    return AnswerCounts(counts["correct"], counts["partly"], counts["wrong"])


def _classify_sample(
    lines: Sequence[JsonObject | None], metric: str, row_index: int, *, is_unordered: bool
) -> Example:
    """Classify the predictions of a sample by their scores.

    Args:
        is_unordered: Whether the predictions are those of several runs: unequal scores `differ`.
    """
    scores: list[float | None] = []
    known_scores: list[float] = []
    correct: list[bool] = []
    for prediction in lines:
        line = prediction or {}
        score = read_scores(line).get(metric)
        scores.append(score)
        if score is not None:
            known_scores.append(score)
            correct.append(is_correct(line, metric))
    change = 0.0
    if known_scores and is_unordered:
        change = max(known_scores) - min(known_scores)
    elif known_scores:
        change = known_scores[-1] - known_scores[0]
    kind = "wrong"
    has_changed = abs(change) > MIN_SCORE_CHANGE
    if has_changed and is_unordered:
        kind = "differ"
    elif has_changed:
        kind = "better" if change > 0 else "worse"
    elif correct and correct[-1] and (all(correct) or not is_unordered):
        kind = "right"
    is_incorrect = bool(correct) and not correct[-1]
    return Example(lines, scores, kind, change, row_index, is_incorrect)


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
    counts = [*examples.answer_counts]
    if counts and counts[-1] is not None and all(None not in pair for pair in pairs):
        num_gained, num_lost = count_changes(pairs, examples.metric)
        counts[-1] = replace(counts[-1], num_gained=num_gained, num_lost=num_lost)
    return replace(examples, is_paired=is_paired, answer_counts=counts)


def count_changes(pairs: Iterable[Sequence[JsonObject | None]], metric: str) -> tuple[int, int]:
    """Return how many answers became correct, and how many became incorrect."""
    changes: Counter[int] = Counter()
    for before, after in pairs:
        changes[_has_correct_score(after, metric) - _has_correct_score(before, metric)] += 1
    return changes[1], changes[-1]


def _has_correct_score(line: JsonObject | None, metric: str) -> bool:
    """Return whether an answer has a score of a metric and is correct."""
    return line is not None and metric in read_scores(line) and is_correct(line, metric)


def read_groups(path: Path, max_groups: int, max_bytes: int | None = None) -> list[Example]:
    """Read groups of responses, those of the latest step first; `row_index` is the step."""
    if not path.exists():
        return []
    groups: defaultdict[int, dict[int, JsonObject]] = defaultdict(dict)
    with suppress(UserError):
        for line in read_json_lines(path, max_bytes=max_bytes):
            step = line.get("step")
            number = line.get("response")
            if isinstance(step, int) and isinstance(number, int):
                # A step that was repeated after running out of memory replaces its responses.
                scores = read_scores(line) | {"advantage": line.get("advantage")}
                groups[step][number] = line | {"scores": scores}
    examples = []
    for step, lines in sorted(groups.items(), reverse=True)[:max_groups]:
        responses = [lines[number] for number in sorted(lines)]
        examples.append(Example(responses, [], "", 0.0, step))
    return examples


def pair_predictions(
    before: Path | None, after: Path | None, max_bytes: int | None = None
) -> Iterator[tuple[JsonObject | None, JsonObject | None]]:
    """Yield pairs of predictions for the same sample from two prediction files.

    The missing prediction of a pair is None. Samples with duplicate IDs are paired in order. Only
    samples of the second file are used, if there is one: others have no answer to classify.
    """
    before_lines = _index_predictions(before, max_bytes)
    after_lines = _index_predictions(after, max_bytes)
    for key, line in after_lines.items():
        yield before_lines.pop(key, None), line
    if after is None:
        for line in before_lines.values():
            yield line, None


def _index_predictions(
    path: Path | None, max_bytes: int | None
) -> dict[tuple[str, int], JsonObject]:
    """Index the predictions of a file by sample; empty without a file."""
    if path is None:
        return {}
    lines = list(read_json_lines(path, max_bytes=max_bytes))
    return index_by_sample(lines, lambda line: str(line.get("id")))


def select_sample_metric(primary_metric: str | None, lines: Sequence[JsonObject]) -> str:
    """Return the per-sample score that best represents the primary metric.

    Returns an empty string if the predictions have no suitable score.
    """
    available: set[str] = set()
    for line in lines:
        available.update(read_scores(line))
    candidates = list_preferred_scores()
    if primary_metric:
        candidates.insert(0, get_score(primary_metric).sample_score or primary_metric)
    return next((name for name in candidates if name in available), "")


def read_scores(line: JsonObject) -> dict[str, float]:
    """Return the per-sample scores of a prediction that are finite numbers."""
    scores = as_object(line.get("scores"))
    return {str(name): float(value) for name, value in scores.items() if is_finite(value)}


def is_correct(line: JsonObject, metric: str) -> bool:
    """Return whether an answer is correct.

    A score that counts correct answers, such as the exact match, decides. Without one, the answer
    has the maximum score or equals a reference in text and boxes. The CIDEr-D of a caption that
    equals its reference is below the maximum if its words are common.
    """
    for name, value in read_scores(line).items():
        if get_score(name).counts_answers:
            return value >= get_score(name).maximum - MIN_SCORE_CHANGE
    if read_scores(line).get(metric, 0.0) >= get_score(metric).maximum - MIN_SCORE_CHANGE:
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
    incorrect_lines = []
    for line in lines:
        if metric in read_scores(line) and not is_correct(line, metric):
            incorrect_lines.append(line)
    return incorrect_lines


def read_image_paths(line: JsonObject) -> list[str]:
    """Return the image paths of a prediction's sample."""
    paths = line.get("image")
    if not isinstance(paths, list):
        paths = [paths]
    return [path for path in paths if isinstance(path, str)]


def find_image(name: str, folders: Sequence[Path]) -> Path:
    """Return the path of an image in the first folder with it.

    Without such a folder, this is the given path.
    """
    for folder in folders:
        path = folder / name
        if get_file(path).exists():
            return path
    return Path(name)


MAX_MEAN_ERROR = 1e-6
"""Maximum difference of a metric from the mean of its per-sample scores.

With a larger difference, the metric is not a mean.
"""


def estimate_differences(
    before: Path,
    after: Path,
    before_metrics: Mapping[str, float],
    after_metrics: Mapping[str, float],
    primary: str = "",
) -> dict[str, MetricDifference]:
    """Estimate the differences of all metrics that are means over samples.

    Args:
        primary: Primary metric, which is tested first. Empty for none.

    Returns:
        Difference with confidence interval by metric name. Other metrics are omitted.
    """
    pairs = [pair for pair in pair_predictions(before, after) if None not in pair]
    if not pairs:
        return {}
    before_estimators: dict[str, ScoreEstimator] = {}
    after_estimators: dict[str, ScoreEstimator] = {}
    for name in before_metrics.keys() & after_metrics.keys():
        scores = []
        for before_line, after_line in pairs:
            scores.append((_read_score(name, before_line), _read_score(name, after_line)))
        scores_N2 = np.array(scores)
        errors = scores_N2.mean(axis=0) - (before_metrics[name], after_metrics[name])
        if (abs(errors) < MAX_MEAN_ERROR).all():  # False for NaN
            bounds = UNBOUNDED
            if ((scores_N2 >= 0) & (scores_N2 <= 1)).all():
                bounds = BOUNDED
            before_estimators[name] = estimate_mean(scores_N2[:, 0], bounds)
            after_estimators[name] = estimate_mean(scores_N2[:, 1], bounds)
    differences = compare_estimators(before_estimators, after_estimators, primary)
    return {difference.name: difference for difference in differences}


def _read_score(metric: str, line: Any) -> float:
    """Return a score of a prediction; NaN if it is missing."""
    if metric == "ended_with_eos":
        return float(line.get("finish_reason") == "stop")
    return read_scores(line).get(get_score(metric).sample_score or metric, math.nan)


# Bounds of the area of a thumbnail, which keep wide formulas and tall pages readable.
MIN_THUMBNAIL_PIXELS = 200 * 260
MAX_THUMBNAIL_PIXELS = 480 * 640

MAX_TOTAL_PIXELS = 40_000_000
"""Maximum number of pixels of all thumbnails of a page."""

THUMBNAIL_QUALITY = 70

MAX_ANSWER_CHARS = 4000

MAX_TURNS = 64
"""Maximum number of answers and tool results that are shown of an episode."""

MAX_TURN_IMAGES = 16
"""Maximum number of images that are shown of an episode."""

MAX_TURN_BYTES = 8_000_000
"""Maximum size of the images of episodes on a page, in base64."""

MAX_TURN_SIDE = 256
"""Maximum side in pixels of the images of episodes, which are thumbnails."""

_THUMBNAIL_URL = re.compile(r"data:image/jpeg;base64,([A-Za-z0-9+/]{1,200000}={0,2})")

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
        self._folders = folders
        self._has_formulas = has_formulas
        self._thumbnails: ThumbnailCache = {} if thumbnails is None else thumbnails
        self._num_turn_bytes = 0

    def build(self, examples: Sequence[Example]) -> JsonObject:
        """Return page data with `examples`, and `images` to which the examples refer by index."""
        self._num_turn_bytes = 0
        paths: dict[str, None] = {}
        score_names: set[str] = set()
        for example in examples:
            paths.update(dict.fromkeys(read_image_paths(example.latest)))
            for line in example.predictions:
                if line:
                    score_names.update(read_scores(line))
        thumbnails = self._build_thumbnails(list(paths))
        image_indices = {path: index for index, path in enumerate(paths)}
        return {
            "images": thumbnails,
            # Names in prediction files, for the export.
            "score_names": {format_metric_name(name): name for name in sorted(score_names)},
            "examples": [self._build_example(example, image_indices) for example in examples],
        }

    def _build_example(self, example: Example, image_indices: dict[str, int]) -> JsonObject:
        """Return the page data of an example: question, answers and scores."""
        scores: list[float | None] = []
        for score in example.scores:
            if score is not None:
                score = round(score, 4)
            scores.append(score)
        return {
            **self._build_question(example.latest, image_indices),
            "kind": example.kind,
            "change": round(example.change, 4),
            "row_index": example.row_index,
            "is_incorrect": example.is_incorrect,
            "is_truncated": _is_truncated(example.latest),
            "predictions": list(map(self._build_answer, example.predictions)),
            "scores": scores,
        }

    def _build_thumbnails(self, paths: Sequence[str]) -> list[JsonObject | None]:
        """Return the thumbnails of the images at the given paths.

        A thumbnail that cannot be created has an error message.
        """
        max_pixels = max(MIN_THUMBNAIL_PIXELS, MAX_TOTAL_PIXELS // max(1, len(paths)))
        max_pixels = min(MAX_THUMBNAIL_PIXELS, max_pixels)
        make_small = partial(self._make_thumbnail, max_pixels, MAX_PARALLEL_PIXELS)
        with ThreadPoolExecutor(NUM_DECODE_THREADS) as pool:
            small_thumbnails = list(pool.map(make_small, paths))
        thumbnails = []
        for path, thumbnail in zip(paths, small_thumbnails, strict=True):
            if not thumbnail:
                thumbnail = self._make_thumbnail(max_pixels, MAX_IMAGE_PIXELS, path)
            thumbnails.append(thumbnail)
        self._thumbnails.clear()
        for thumbnail in thumbnails:
            if thumbnail and "src" in thumbnail:
                self._thumbnails[thumbnail["path"], max_pixels] = thumbnail
        return thumbnails

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
        formula: object = None
        if reference_texts:
            formula = self._convert_formula(reference_texts[0])
        return {
            "id": _truncate(str(line.get("id")), MAX_ID_CHARS),
            "images": [image_indices[path] for path in read_image_paths(line)],
            "question": _truncate(str(line.get("prompt", ""))),
            "references": list(map(_truncate, reference_texts)),
            "formula": formula,
            "boxes": read_boxes(line.get("gold_boxes")),
        }

    def _build_answer(self, line: JsonObject | None) -> JsonObject | None:
        """Return the page data of an answer and its scores, or None without a prediction."""
        if line is None:
            return None
        text = str(line.get("answer", ""))
        references = _read_references(line)
        fields = None
        diff = None
        if len(references) == 1 and len(text) <= MAX_ANSWER_CHARS >= len(references[0]):
            fields = diff_fields(*_name_boxes(line, references))
            if fields is None:
                diff = diff_texts(text, references[0])
        is_complete = line.get("finish_reason") != "length"
        formula: object = None
        if is_complete:  # A truncated answer is not a valid formula.
            formula = self._convert_formula(text)
        scores = {}
        for name, value in read_scores(line).items():
            scores[format_metric_name(name)] = round(value, 4)
        num_tokens = line.get("num_tokens")
        if not isinstance(num_tokens, int):
            num_tokens = None
        turns = read_turns(line, MAX_TURN_BYTES - self._num_turn_bytes)
        for turn in turns:
            self._num_turn_bytes += sum(len(part.get("image", "")) for part in turn["parts"])
        return {
            "text": _truncate(text),
            "fields": fields,
            "diff": diff,
            "formula": formula,
            "boxes": read_boxes(line.get("boxes")),
            "scores": scores,
            "is_complete": is_complete,
            "num_tokens": num_tokens,
            "turns": turns,
        }

    def _convert_formula(self, text: str) -> object:
        if not self._has_formulas:
            return None
        return convert_formula(text)


def _name_boxes(line: JsonObject, references: Sequence[str]) -> tuple[str, str]:
    """Return answer and reference with equal texts for boxes that the metric `json` equates."""
    case = EvalCase(
        str(line.get("answer", "")),
        _build_box_parts(line.get("boxes")),
        tuple(references),
        _build_box_parts(line.get("gold_boxes")),
    )
    match line.get("image_size"):
        case [int(height), int(width)]:
            case = replace(case, image_size=(height, width))
    answer, reference, _ = name_boxes(case)
    return answer, reference


def _build_box_parts(content: object) -> tuple[BoxPart, ...]:
    """Return the valid boxes of a prediction as parts of a sample."""
    # read_boxes has validated them.
    return tuple(BoxPart.model_construct(**box) for box in read_boxes(content))


def _read_references(line: JsonObject) -> list[str]:
    """Return the reference texts of a prediction that are not empty."""
    texts = [line.get("gold")]
    references = line.get("references")
    if isinstance(references, list):
        texts += references
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
    pattern = _DIFF_TOKEN
    if len(reference.split()) == 1:
        pattern = re.compile(r"\S")
    words = list(pattern.finditer(text))
    reference_words = list(pattern.finditer(reference))
    sequence = list(map(itemgetter(0), words))
    reference_sequence = list(map(itemgetter(0), reference_words))
    counts = Counter(sequence)
    reference_counts = Counter(reference_sequence)
    if sum(count * reference_counts[word] for word, count in counts.items()) > MAX_DIFF_PAIRS:
        return None
    matcher = SequenceMatcher(None, sequence, reference_sequence, autojunk=False)
    num_equal = sum(block.size for block in matcher.get_matching_blocks())
    if num_equal < MIN_COMMON_FRACTION * max(len(words), len(reference_words)):
        return None
    differences = []
    for kind, start, end, reference_start, reference_end in matcher.get_opcodes():
        if kind != "equal":
            span = _get_span(words, start, end)
            reference_span = _get_span(reference_words, reference_start, reference_end)
            differences.append((*span, *reference_span))
    return differences


def _get_span(words: Sequence[re.Match[str]], start: int, end: int) -> tuple[int, int]:
    """Return the span of the words `start` to `end`; an empty one without words."""
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
    reference_form = parse_form(reference)
    form = parse_form(text)
    if reference_form is None or form is None:
        return None
    expected = count_fields(reference_form)
    predicted = count_fields(form)
    missing = expected - predicted
    extra = predicted - expected
    rows: defaultdict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, value in missing.elements():
        rows[name][0].append(value)
    for name, value in extra.elements():
        rows[name][1].append(value)
    return {
        "differences": [[name, *columns] for name, columns in rows.items()],
        "num_equal": (expected & predicted).total(),
    }


def read_boxes(content: object) -> list[JsonObject]:
    """Return the boxes of a prediction that have finite corners, at most `MAX_BOXES`.

    Each box has `image` (index), `label` and `xyxy` (corners in pixels).
    """
    if not isinstance(content, list):
        return []
    valid_boxes = []
    for box in content[:MAX_BOXES]:
        if not isinstance(box, dict):
            continue
        corners = box.get("xyxy")
        if isinstance(corners, list) and len(corners) == 4 and all(map(is_finite, corners)):
            label = str(box["label"])[:80] if box.get("label") else ""
            xyxy = list(map(float, corners))
            valid_boxes.append({"image": box.get("image", 0), "label": label, "xyxy": xyxy})
    return valid_boxes


def read_turns(line: JsonObject, max_bytes: int = MAX_TURN_BYTES) -> list[JsonObject]:
    """Return the turns of an episode with tools, at most `MAX_TURNS`; none for other answers.

    Each turn has `role`, and `parts` with `text`, or with `image`, the data URL of a thumbnail.

    Args:
        max_bytes: Maximum size of the images in base64. Further ones are left out.
    """
    turns = as_object(line.get("episode")).get("turns")
    if not isinstance(turns, list) or len(turns) < 2:
        return []
    valid_turns: list[JsonObject] = []
    num_images = 0
    for turn in map(as_object, turns[:MAX_TURNS]):
        content = turn.get("content")
        parts: list[JsonObject] = []
        for part in map(as_object, content if isinstance(content, list) else []):
            image = part.get("image")
            if isinstance(image, str) and _is_thumbnail(image):
                num_images += 1
                max_bytes -= len(image)
                if num_images <= MAX_TURN_IMAGES and max_bytes >= 0:
                    parts.append({"image": image})
            elif isinstance(part.get("text"), str):
                parts.append({"text": _truncate(part["text"])})
        valid_turns.append({"role": str(turn.get("role"))[:20], "parts": parts})
    return valid_turns


def _is_thumbnail(url: str) -> bool:
    """Return whether a data URL is a JPEG image whose header has the size of a thumbnail.

    Browsers allocate the pixels of an image by its header.
    """
    match = _THUMBNAIL_URL.fullmatch(url)
    if match is None:
        return False
    try:
        size = read_jpeg_size(base64.b64decode(match[1]))
    except ValueError:  # the characters are no base64
        return False
    return size is not None and max(size) <= MAX_TURN_SIDE


def _is_truncated(line: JsonObject) -> bool:
    """Return whether the page contains a text of a prediction only in part."""
    texts = [str(line.get("prompt", "")), str(line.get("answer", "")), *_read_references(line)]
    return max(map(len, texts)) > MAX_ANSWER_CHARS


def _truncate(text: str, max_chars: int = MAX_ANSWER_CHARS) -> str:
    if len(text) <= max_chars:
        return text
    return translate("{} [and {:,} more characters]", text[:max_chars], len(text) - max_chars)
