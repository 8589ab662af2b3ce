"""Comparison of two evaluations of the same samples, with intervals."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from finesight.evaluate.bootstrap import (
    ConfidenceInterval,
    ScoreEstimator,
    compute_difference_intervals,
    get_missing_difference_reason,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.score_format import format_score, format_score_change
from finesight.evaluate.task_metrics import compute_metrics, get_primary_metric
from finesight.evaluate.verdict import (
    Estimators,
    PValues,
    Verdict,
    compute_p_values,
    count_swaps,
    excludes_zero,
    find_clear_differences,
    judge_difference,
)
from finesight.metric_components import get_score
from finesight.settings.config import MetricSpec

T = TypeVar("T")

REASON_UNSAMPLED = "no interval: only the sum over all samples is known"
REASON_NO_PREDICTIONS = "no interval: the predictions are missing"
NOTE_UNTESTED = "not tested: the primary score has no clear change"


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A score of two evaluations, with the 95 % confidence interval of the difference.

    The verdict accounts for all differences of its family. Without a clear change, the interval
    contains 0. The verdict is empty for a difference that was not tested.

    Attributes:
        low: Lower bound of after - before; None, like `high`, without an interval.
        note: Reason for a missing interval, or a warning about the score.
        num_samples: Number of samples of the score; 0 if unknown.
        p_value: p-value of the difference alone, two-sided. None if it can never be clear.
        is_proportion: Whether both scores are shares of right and wrong predictions.
    """

    name: str
    before: float
    after: float
    low: float | None
    high: float | None
    verdict: Verdict
    note: str = ""
    num_samples: int = 0
    p_value: float | None = None
    is_proportion: bool = False

    @property
    def interval_text(self) -> str:
        """Interval of the difference; empty without one."""
        if self.low is None or self.high is None:
            return ""
        low = format_score_change(self.low, self.num_samples)
        return f"{low} to {format_score_change(self.high, self.num_samples)}"

    def describe(self) -> str:
        """Describe both scores, the interval of the difference and the verdict in words."""
        before = format_score(self.before, self.num_samples)
        change = f"{before} and {format_score(self.after, self.num_samples)}"
        if self.interval_text:
            change += f" ({self.interval_text})"
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

    The result is empty without pairs, and if their number is not `num_samples`.
    """
    old, new = pair_estimators(metric, before, after, num_samples=num_samples)
    if not old:
        return []
    primary = get_primary_metric(metric, dict.fromkeys(old, 0.0))
    return compare_estimators(old, new, primary)


def pair_estimators(
    metric: MetricSpec,
    before: Sequence[EvalCase],
    after: Sequence[EvalCase],
    *,
    num_samples: int | None = None,
) -> tuple[Estimators, Estimators]:
    """Return the score estimators of two sets of predictions for the same samples.

    Predictions are paired as by `pair_cases`. Both are empty without pairs, and if their number is
    not `num_samples`.
    """
    old, new = pair_cases(before, after)
    if not old or len(old) != (num_samples or len(old)):
        return {}, {}
    return compute_metrics(metric, old).estimators, compute_metrics(metric, new).estimators


def pair_cases(
    before: Sequence[EvalCase], after: Sequence[EvalCase]
) -> tuple[list[EvalCase], list[EvalCase]]:
    """Return the predictions of both sets for the same samples, in the order of the first set.

    Predictions are paired by sample id, and in order for repeated ids. Unpaired predictions are
    ignored.
    """
    old = index_by_sample(before, lambda case: case.id)
    new = index_by_sample(after, lambda case: case.id)
    keys = [key for key in old if key in new]
    return [old[key] for key in keys], [new[key] for key in keys]


def compare_estimators(
    before: Estimators, after: Estimators, primary: str = ""
) -> list[MetricDifference]:
    """Compare score estimators of the same samples in the same order, as one family."""
    (differences,) = compare_family([(before, after)], primary)
    return differences


def compare_family(
    pairs: Sequence[tuple[Estimators, Estimators]], primary: str = "", num_others: int = 0
) -> list[list[MetricDifference]]:
    """Compare pairs of evaluations whose differences get their verdicts together.

    Args:
        pairs: Score estimators before and after. Both have the same samples in the same order.
        primary: Primary metric, which is tested first. Empty for none.
        num_others: Number of further comparisons that could have been called clear.

    Returns:
        The differences of each pair.
    """
    num_tests = num_others + sum(len(before.keys() & after.keys()) for before, after in pairs)
    num_swaps = count_swaps(num_tests)
    p_values = []
    intervals = []
    tested = []
    for before, after in pairs:
        p_values.append(compute_p_values(before, after, num_swaps))
        intervals.append(compute_difference_intervals(before, after))
        tested.append(_reject_intervals_with_zero(p_values[-1], intervals[-1]))
    clear_names = find_clear_differences(tested, primary, num_others)
    family = []
    for index, (before, after) in enumerate(pairs):
        clear = clear_names[index]
        is_gated = p_values[index].get(primary) is not None and not clear
        differences = []
        for name, p_value in p_values[index].items():
            old = before[name]
            new = after[name]
            difference = _build_difference(name, old, new, intervals[index][name], p_value)
            if is_gated and name != primary and difference.interval_text:
                difference = replace(difference, note=difference.note or NOTE_UNTESTED)
            else:
                difference = _judge(difference, is_clear=name in clear)
            differences.append(difference)
        family.append(differences)
    return family


def _reject_intervals_with_zero(
    p_values: PValues, intervals: Mapping[str, ConfidenceInterval | None]
) -> PValues:
    """Return p-values that are 1 if the interval does not exclude 0.

    Such a difference is never clear, so it must not allow the tests of others either.
    """
    tested: dict[str, float | None] = {}
    for name, p_value in p_values.items():
        interval = intervals[name]
        tested[name] = p_value
        if p_value is not None and interval is not None and not excludes_zero(interval):
            tested[name] = 1.0
    return tested


def _build_difference(
    name: str,
    before: ScoreEstimator,
    after: ScoreEstimator,
    interval: ConfidenceInterval | None,
    p_value: float | None,
) -> MetricDifference:
    """Build the difference of a score, without a verdict."""
    low, high = interval or (None, None)
    note = get_missing_difference_reason(before, after) or before.note
    has_trials = before.successes_and_trials is not None
    return MetricDifference(
        name,
        before.score,
        after.score,
        low,
        high,
        "",
        note,
        before.num_samples,
        p_value,
        is_proportion=has_trials and after.successes_and_trials is not None,
    )


def _judge(difference: MetricDifference, *, is_clear: bool) -> MetricDifference:
    """Return a difference with its verdict, and with an interval that agrees."""
    if difference.low is None or difference.high is None:
        return replace(difference, verdict="no clear change")
    (low, high), verdict = judge_difference(
        (difference.low, difference.high),
        is_clear=is_clear,
        lower_is_better=get_score(difference.name).lower_is_better,
    )
    return replace(difference, low=low, high=high, verdict=verdict)


def build_unsampled_difference(
    name: str, before: float, after: float, note: str = REASON_UNSAMPLED
) -> MetricDifference:
    """Compare two values of a score without per-sample values, such as the validation loss."""
    return MetricDifference(name, before, after, None, None, "", note)


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
