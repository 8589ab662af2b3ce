"""Validation samples with their answers before and after training, for run reports."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finesight.report.run_reader import JsonObject, is_finite, read_json_lines

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
        max_examples: Maximum number of displayed examples.
    """
    line_pairs = list(pair_predictions(before, after))
    metric = select_sample_metric(
        primary_metric, [line for pair in line_pairs for line in pair if line is not None]
    )
    examples = [
        _classify_example(before_line, after_line, metric) for before_line, after_line in line_pairs
    ]
    counts = Counter(example.kind for example in examples)
    return ExampleSet(
        displayed=_select_examples(examples, max_examples),
        counts={kind: counts[kind] for kind in EXAMPLE_KINDS},
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
    change = (
        after_score - before_score if before_score is not None and after_score is not None else 0.0
    )
    max_score = MAX_SCORES.get(metric, 1.0)
    last_score = after_score if after_score is not None else before_score
    kind: ExampleKind = (
        "right"
        if last_score is not None and last_score >= max_score - MIN_SCORE_CHANGE
        else "wrong"
    )
    if abs(change) > MIN_SCORE_CHANGE:
        kind = "better" if change > 0 else "worse"
    return Example(before, after, kind, change)


def _select_examples(examples: Iterable[Example], max_examples: int) -> list[Example]:
    """Select at most `max_examples` examples, largest score changes first.

    Each class gets a quarter of the examples. Classes with more examples use quotas of smaller
    ones.
    """
    by_kind: dict[ExampleKind, list[Example]] = {kind: [] for kind in EXAMPLE_KINDS}
    for example in examples:
        by_kind[example.kind].append(example)
    for group in by_kind.values():
        group.sort(key=lambda example: -abs(example.change))
    quotas = {
        kind: min(len(group), max_examples // len(EXAMPLE_KINDS)) for kind, group in by_kind.items()
    }
    for kind, group in by_kind.items():
        quotas[kind] += min(len(group) - quotas[kind], max_examples - sum(quotas.values()))
    return [example for kind, group in by_kind.items() for example in group[: quotas[kind]]]


def read_image_paths(line: JsonObject) -> list[str]:
    """Return the image paths of a prediction's sample."""
    value = line.get("image")
    paths: list[Any] = value if isinstance(value, list) else [value]
    return [path for path in paths if isinstance(path, str)]
