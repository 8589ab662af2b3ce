"""Verdicts on differences of paired evaluations, with one error rate for all of a page.

A page compares several metrics, groups or runs. If nothing has changed, the probability that any
of its differences is called better or worse is at most `FAMILY_ERROR`:

- Proportions: exact McNemar test on the samples that changed.
- All other scores: permutation test, which swaps the two answers to random samples. It needs no
  assumption on the distribution of a score, and applies to ratios and corpus scores as they are.
- All differences of a page: fixed sequence within a comparison, Holm's rule between comparisons.

A comparison has one difference for each metric. Its primary metric is tested first, at the full
level. Only if this difference is clear, the other metrics are tested with Holm's step-down rule
(1979) at the same level. Without a primary metric that can be tested, Holm's rule applies to all
metrics of the comparison.

The error rate holds for any number of true differences. If the primary metric has not changed, a
wrong verdict needs an error of this one test. If it has changed, the other tests have the full
level to themselves, and Holm's rule keeps it.

A page with several comparisons, such as runs, trials or groups, gives each of them an equal share
of the level. The share of a comparison whose differences are all clear goes to the others. For
comparisons with one metric, this is Holm's rule over all of them. Other metrics are gated by the
primary metric of their own comparison: one run without a change does not hide the metrics of
another. Both steps are a graphical procedure of Bonferroni tests (Bretz et al. 2009).

The intervals on a page are those of single differences, because intervals that are adjusted to the
family would not be comparable between pages. A verdict needs a significant test and an interval
that excludes 0. A difference whose interval includes 0 counts with a p-value of 1, so that a
primary metric without a verdict does not open the tests of others. `judge_difference` extends the
interval of any other tested difference to 0, so that interval and verdict agree.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from finesight.evaluate.bootstrap import (
    MAX_CHUNK_ELEMENTS,
    MIN_SAMPLES,
    SEED,
    ConfidenceInterval,
    FloatArray,
    ScoreEstimator,
    count_discordant_pairs,
    get_missing_difference_reason,
)

Verdict = Literal["better", "worse", "no clear change", ""]
"""Verdict on a difference; empty if it has no interval or was not tested."""

FAMILY_ERROR = 0.05
"""Maximum probability of a verdict on any difference of a page without a real difference."""

MIN_VISIBLE_CHANGE = 5e-5
"""Smallest difference that is not displayed as 0.0000."""

MIN_SWAPS = 2000
SWAPS_PER_TEST = 40
"""Swaps for each test of a family, so that the first step of Holm's rule is twice the least p."""

PValues = Mapping[str, float | None]
"""p-value of each metric of a comparison. None for one that is never clear: it does not count."""

Estimators = Mapping[str, ScoreEstimator]


def judge_difference(
    interval: tuple[float, float], *, is_clear: bool, lower_is_better: bool = False
) -> tuple[ConfidenceInterval, Verdict]:
    """Return the interval and the verdict of a difference, which agree.

    The interval of a difference without a verdict of better or worse is extended to 0.

    Args:
        is_clear: Whether the test of the difference is significant in its family.
    """
    low, high = interval
    if not (is_clear and excludes_zero(interval)):
        return ConfidenceInterval(min(low, 0.0), max(high, 0.0)), "no clear change"
    is_better = (low > 0) != lower_is_better
    return ConfidenceInterval(low, high), "better" if is_better else "worse"


def excludes_zero(interval: tuple[float, float]) -> bool:
    """Return whether an interval excludes 0, and not only by less than is displayed."""
    low, high = interval
    is_visible = max(abs(low), abs(high)) >= MIN_VISIBLE_CHANGE
    return is_visible and (low > 0 or high < 0)


def find_clear_differences(
    comparisons: Sequence[PValues], primary: str = "", num_others: int = 0
) -> list[set[str]]:
    """Return the metrics of each comparison whose difference is clear in the family of all.

    Args:
        primary: Primary metric, which is tested first. Empty for none.
        num_others: Number of further comparisons in the family, none of which is clear.
    """
    open_comparisons = []
    for index, p_values in enumerate(comparisons):
        tested = {name: p_value for name, p_value in p_values.items() if p_value is not None}
        if tested:
            open_comparisons.append((index, tested))
    clear: list[set[str]] = [set() for _ in comparisons]
    while open_comparisons:
        level = FAMILY_ERROR / (len(open_comparisons) + num_others)
        unclear = []
        for index, tested in open_comparisons:
            clear[index] = _test_in_order(tested, primary, level)
            if len(clear[index]) < len(tested):
                unclear.append((index, tested))
        if len(unclear) == len(open_comparisons):
            break
        open_comparisons = unclear
    return clear


def _test_in_order(p_values: Mapping[str, float], primary: str, level: float) -> set[str]:
    """Return the clear metrics of a comparison: the primary one first, others by Holm's rule."""
    clear = set()
    others = dict(p_values)
    if primary in others:
        if others.pop(primary) > level:
            return set()
        clear.add(primary)
    names = sorted(others, key=lambda name: others[name])
    for rank, name in enumerate(names):
        if others[name] > level / (len(names) - rank):
            break
        clear.add(name)
    return clear


def compute_mcnemar_p_value(num_gained: int, num_lost: int) -> float:
    """Compute the two-sided p-value of the exact McNemar test."""
    total = num_gained + num_lost
    least = min(num_gained, num_lost)
    log_ways = math.lgamma(total + 1) - math.lgamma(least + 1) - math.lgamma(total - least + 1)
    # Each smaller count multiplies the binomial probability by count / (total - count + 1).
    counts = np.arange(least, 0, -1)
    factors = np.cumprod(counts / (total - counts + 1))
    tail = math.exp(log_ways - total * math.log(2)) * (1 + float(factors.sum()))
    return min(1.0, 2 * tail)


def compute_normal_p_value(change: float, margin: float) -> float:
    """Compute the two-sided p-value of a normal change with the half 95 % interval `margin`."""
    if not margin:
        return float(change == 0)
    return math.erfc(1.96 * abs(change) / margin / math.sqrt(2))


def count_swaps(num_tests: int) -> int:
    """Return the number of swaps for a family of tests."""
    return max(MIN_SWAPS, SWAPS_PER_TEST * num_tests)


def compute_p_values(
    before: Estimators, after: Estimators, num_swaps: int
) -> dict[str, float | None]:
    """Compute the p-value of the difference of each score of the same samples.

    The p-value is None if the difference is never clear: it has no interval, or too few samples
    changed. Because this does not depend on the direction of the changes, the difference need not
    count as a test of the family.

    Args:
        num_swaps: Number of swaps of a permutation test; see `count_swaps`.
    """
    p_values: dict[str, float | None] = {}
    permuted: dict[str, tuple[ScoreEstimator, ScoreEstimator]] = {}
    for name, old in before.items():
        if name not in after:
            continue
        new = after[name]
        p_values[name] = None
        if get_missing_difference_reason(old, new):
            continue
        counts = count_discordant_pairs(old, new)
        # Sums can be swapped if they have the same columns. Columns depend on the references of
        # the samples only, never on the answers.
        if counts is None and old.pseudo_sums.shape == new.pseudo_sums.shape:
            permuted[name] = old, new
        elif counts is not None and counts[0] + counts[1] >= MIN_SAMPLES:
            p_values[name] = compute_mcnemar_p_value(int(counts[0]), int(counts[1]))
    return p_values | _permute(permuted, num_swaps)


def _permute(
    pairs: Mapping[str, tuple[ScoreEstimator, ScoreEstimator]], num_swaps: int
) -> dict[str, float | None]:
    """Compute the p-value of each difference by the same swaps, None if no sample changed.

    It is the share of swaps with at least the observed difference. The observed one counts.
    """
    if not pairs:
        return {}
    sum_functions = {one.weighted_sums for pair in pairs.values() for one in pair}
    num_samples = max(len(old.sample_rates) for old, _ in pairs.values())
    unit_weights = np.ones((1, num_samples))
    totals = {function: function(unit_weights) for function in sum_functions}
    changes: defaultdict[str, list[FloatArray]] = defaultdict(list)
    has_changed: set[str] = set()
    for swaps in _iter_swaps(num_samples, num_swaps):
        sums = {function: function(swaps) for function in sum_functions}
        for name, (old, new) in pairs.items():
            sum_changes = sums[new.weighted_sums] - sums[old.weighted_sums]
            if sum_changes.any():
                has_changed.add(name)
            swapped_before = old.score_from_sums(totals[old.weighted_sums] + sum_changes)
            swapped_after = new.score_from_sums(totals[new.weighted_sums] - sum_changes)
            changes[name].append(np.abs(swapped_after - swapped_before))
    p_values: dict[str, float | None] = dict.fromkeys(pairs)
    for name in has_changed:
        old, new = pairs[name]
        values = np.concatenate(changes[name])
        # Equal differences differ by rounding, which is relative to the scores.
        tolerance = 1e-9 * max(abs(old.plug_in_score), abs(new.plug_in_score))
        # A difference of NaN is not smaller, so that a score of NaN has a p-value of 1.
        is_smaller = values < values[0] - tolerance
        p_values[name] = float((~is_smaller).mean())
    return p_values


def _iter_swaps(num_samples: int, num_swaps: int) -> Iterator[FloatArray]:
    """Yield chunks of swaps, 1 for each sample whose answers are swapped: (R, N).

    The first swap changes nothing. Few samples have all possible swaps.
    """
    if num_samples < math.log2(num_swaps):
        bits = np.arange(2**num_samples)[:, None] >> np.arange(num_samples)
        yield (bits & 1).astype(np.float64)
        return
    yield np.zeros((1, num_samples))
    rng = np.random.default_rng(SEED)
    chunk_rows = max(1, MAX_CHUNK_ELEMENTS // num_samples)
    for start in range(1, num_swaps, chunk_rows):
        count = min(chunk_rows, num_swaps - start)
        # Swaps of a sample are contiguous, because sums index them by sample.
        bits = rng.integers(0, 2, (num_samples, count), dtype=np.int8)
        yield bits.astype(np.float64).T
