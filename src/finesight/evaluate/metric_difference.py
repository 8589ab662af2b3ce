"""Comparison of two evaluations of the same samples, with intervals."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from finesight.config import MetricSpec
from finesight.evaluate.bootstrap import (
    MIN_SAMPLES,
    ConfidenceInterval,
    ScoreEstimator,
    compute_difference_intervals,
    get_missing_difference_reason,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.task_metrics import compute_metrics
from finesight.metric_components import get_score

if TYPE_CHECKING:
    pass


T = TypeVar("T")

Verdict = Literal["better", "worse", "no clear change", ""]
"""Verdict on a difference; empty if it can have no interval."""

MIN_VISIBLE_CHANGE = 5e-5
"""Smallest difference that is not displayed as 0.0000."""

REASON_UNSAMPLED = "no interval: only the sum over all samples is known"
REASON_NO_PREDICTIONS = "no interval: the predictions are missing"


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A score of two evaluations, with the 95 % confidence interval of the difference.

    Attributes:
        low: Lower bound of after - before; None, like `high`, without an interval.
        note: Reason for a missing interval, or a warning about the score.
        num_samples: Number of predictions of a proportion; 0 for other scores, or if unknown.
    """

    name: str
    before: float
    after: float
    low: float | None
    high: float | None
    verdict: Verdict
    note: str = ""
    num_samples: int = 0

    def describe(self) -> str:
        """Describe both scores, the interval of the difference and the verdict in words."""
        change = f"{self.before:.4f} and {self.after:.4f}"
        if self.low is not None:
            change += f" ({self.low:+.4f} to {self.high:+.4f})"
        return f"{self.name} {change}, {self.verdict}"


def count_correct(metric: str, score: float, num_samples: int) -> int | None:
    """Return the number of correct answers of a score; None for a score of another kind."""
    if not math.isfinite(score) or not get_score(metric).counts_answers:
        return None
    count = round(score * num_samples)
    if num_samples > 0 and abs(score * num_samples - count) < 0.01:
        return count
    return None


def compare_cases(
    metric: MetricSpec,
    before: Sequence[EvalCase],
    after: Sequence[EvalCase],
    *,
    num_samples: int | None = None,
) -> list[MetricDifference]:
    """Compare the scores of two sets of predictions for the same samples.

    Predictions are paired by sample id, and in order for repeated ids. Unpaired predictions are
    ignored. The result is empty without pairs, and if their number is not `num_samples`.
    """
    old = index_by_sample(before, lambda case: case.id)
    new = index_by_sample(after, lambda case: case.id)
    keys = [key for key in old if key in new]
    if not keys or len(keys) != (num_samples or len(keys)):
        return []
    old_result = compute_metrics(metric, [old[key] for key in keys])
    new_result = compute_metrics(metric, [new[key] for key in keys])
    return compare_estimators(old_result.estimators, new_result.estimators)


def compare_estimators(
    before: Mapping[str, ScoreEstimator], after: Mapping[str, ScoreEstimator]
) -> list[MetricDifference]:
    """Compare score estimators of the same samples in the same order."""
    differences = []
    for name, interval in compute_difference_intervals(before, after).items():
        old = before[name]
        new = after[name]
        low, high = interval or (None, None)
        verdict: Verdict = "no clear change"
        if old.num_samples >= MIN_SAMPLES:
            verdict = _classify_change(name, interval)
        note = get_missing_difference_reason(old, new) or old.note
        num_samples = 0
        if old.successes_and_trials is not None and new.successes_and_trials is not None:
            num_samples = old.num_samples
        difference = MetricDifference(
            name, old.score, new.score, low, high, verdict, note, num_samples
        )
        differences.append(difference)
    return differences


def build_unsampled_difference(
    name: str, before: float, after: float, note: str = REASON_UNSAMPLED
) -> MetricDifference:
    """Compare two values of a score without per-sample values, such as the validation loss."""
    return MetricDifference(name, before, after, None, None, "", note)


def _classify_change(name: str, interval: ConfidenceInterval | None) -> Verdict:
    """Classify a change as clear if the interval excludes 0 and the change is visible."""
    if interval is None or max(map(abs, interval)) < MIN_VISIBLE_CHANGE:
        return "no clear change"
    low, high = interval
    if get_score(name).lower_is_better:
        low, high = -high, -low
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "no clear change"


def align_columns(rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Format rows as text with aligned columns.

    The first `num_left` columns are left-aligned, the others right-aligned. The last column is not
    padded.
    """
    *columns, _ = zip(*rows, strict=True)
    formats = []
    for index, column in enumerate(columns):
        alignment = "<" if index < num_left else ">"
        width = max(map(len, column))
        formats.append(f"{alignment}{width}")
    lines = []
    for *texts, last in rows:
        padded = [*map(format, texts, formats), last]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def index_by_sample(
    items: Sequence[T], get_sample_id: Callable[[T], str]
) -> dict[tuple[str, int], T]:
    """Index items by (sample id, occurrence); occurrences of an id are counted from 0."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    indexed = {}
    for item in items:
        sample_id = get_sample_id(item)
        indexed[sample_id, next(numbers[sample_id])] = item
    return indexed
