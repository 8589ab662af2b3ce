"""95 % confidence intervals of metric scores under sampling of the evaluation set.

- Proportions: exact interval (Clopper-Pearson).
- Differences of two paired proportions: Tango's score interval.
- All other scores: Bayesian bootstrap (Rubin 1981) over sums of the samples, with half a
  pseudo-observation.

The pseudo-observation is a typical sample that is completely wrong for the lower bound and
completely right for the upper bound. Without it, an interval has zero width if all samples score
the same, and its coverage is too low near the ends of the scale. With a pseudo-observation of
weight 1, a mean of bounded values has the bound of Gaffke (2005), which is exact for proportions.
`benchmarks/interval_coverage.py` measures the coverage.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE_LEVEL = 0.95

_NUM_BISECTIONS = 60
"""Bisection steps for [0, 1]; more have no effect in double precision."""


class ConfidenceInterval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def clopper_pearson_interval(successes: float, trials: float) -> ConfidenceInterval:
    """Compute the exact 95 % interval of a proportion (Clopper and Pearson 1934).

    Its coverage is at least 95 % for every proportion and number of trials.
    """
    low = _exact_lower_bound(successes, trials)
    complement = _exact_lower_bound(trials - successes, trials)
    return ConfidenceInterval(low, 1.0 - complement)


def _exact_lower_bound(successes: float, trials: float) -> float:
    """Return the proportion for which at least `successes` have a probability of 2.5 %."""
    if not successes:
        return 0.0
    failures = trials - successes
    counts = np.arange(successes, trials)
    factors = (trials - counts) / (counts + 1)
    log_ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(failures + 1)

    def missing_probability(p: float) -> float:
        log_mass = log_ways + successes * math.log(p) + failures * math.log1p(-p)
        # Each further success multiplies the binomial probability by factor * odds.
        tail = math.exp(log_mass) * (1 + float(np.cumprod(factors * p / (1 - p)).sum()))
        return (1 - CONFIDENCE_LEVEL) / 2 - tail

    return _bisect_root(missing_probability, 0.0, successes / trials)


def tango_interval(
    num_gained: float, num_lost: float, num_trials: float, level: float = CONFIDENCE_LEVEL
) -> ConfidenceInterval:
    """Compute the score interval of the difference of two paired proportions (Tango 1998).

    `num_gained` pairs fail before and succeed after, `num_lost` pairs the reverse.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    change = (num_gained - num_lost) / num_trials

    def score_statistic(difference: float) -> float:
        """Return the score statistic, which decreases with the hypothesized difference."""
        b = (2 * num_trials - num_gained + num_lost) * difference - num_gained - num_lost
        c = -num_lost * difference * (1 - difference)
        discordant = (math.sqrt(max(0.0, b * b - 8 * num_trials * c)) - b) / (4 * num_trials)
        variance = num_trials * (2 * discordant + difference * (1 - difference))
        return (num_gained - num_lost - num_trials * difference) / math.sqrt(max(1e-300, variance))

    low = _bisect_root(lambda difference: score_statistic(difference) - z, -1.0, change)
    high = _bisect_root(lambda difference: score_statistic(difference) + z, change, 1.0)
    return ConfidenceInterval(low, high)


def _bisect_root(decreasing_fn: Callable[[float], float], low: float, high: float) -> float:
    """Find the root of a decreasing function between `low` and `high` by bisection."""
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        if decreasing_fn(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


FloatArray = NDArray[np.float64]

ResampleWeights = FloatArray
"""Weight of each of N samples in each of R resamples: shape (R, N)."""

WeightedSumsFn = Callable[[ResampleWeights], FloatArray]
"""Function that computes K weighted sums over the samples for each resample: shape (R, K)."""

ScoreBounds = tuple[float, float]

BOUNDED: ScoreBounds = (0.0, 1.0)
NON_NEGATIVE: ScoreBounds = (0.0, math.inf)
UNBOUNDED: ScoreBounds = (-math.inf, math.inf)

NUM_RESAMPLES = 2000
SEED = 0
MAX_CHUNK_ELEMENTS = 4_000_000
"""Maximum number of resample weights that are in memory at a time."""

PSEUDO_WEIGHT = 0.5
"""Weight of the pseudo-observation; the average weight of a sample is 1."""

MIN_SAMPLES = 6
"""Minimum number of samples for the interval of a difference of scores with bounds.

Five samples change in the same direction by chance in 1 of 16 sets.
"""

MIN_SAMPLES_UNBOUNDED = 20
"""Minimum number of samples for the intervals of a score without known bounds."""

MIN_SAMPLES_PER_CLASS = 5
"""Minimum number of samples of each class or field for the interval of a macro mean."""

# String literals, so that reports can look up their translations.
REASON_FEW_SAMPLES = "no interval: fewer than 6 samples"
REASON_FEW_SAMPLES_UNBOUNDED = "no interval: fewer than 20 samples, on a scale without bounds"
REASON_RARE_CLASS = "no interval: a class or field is in fewer than 5 samples"
REASON_NO_SAMPLES = "no interval: no sample counts towards it"
REASON_CONSTANT_SCORE = "no interval: all samples score the same, on a scale without bounds"
REASON_NO_CHANGE = "no interval: no sample changed, on a scale without bounds"


@dataclass(frozen=True, slots=True, eq=False)
class ScoreEstimator:
    """Estimator of a score of N samples, computed from K sums over the samples.

    Attributes:
        score_from_sums: Computes the score from the sums, (R, K) -> (R,).
        sample_rates: Contribution of each sample on the scale of the score, shape (N,); for a mean
            the values themselves.
        pseudo_sums: Sums of a typical sample of rate 0, shape (K,).
        pseudo_slope: Change of these sums per unit of rate, shape (K,).
        pseudo_rates: Rates of the pseudo-observations for the lower and the upper bound.
        is_bounded: Whether `pseudo_rates` are bounds of the score instead of estimates.
        is_biased: Whether the score is biased on small sets, so that the interval is
            bias-corrected.
        successes_and_trials: Successes and trials of each sample, shape (2, N), if the score is a
            proportion.
        reported_score: Score of the set if it differs from `score_from_sums` of its sums.
        undefined_reason: Reason why neither the score nor a difference has an interval.
    """

    weighted_sums: WeightedSumsFn
    score_from_sums: Callable[[FloatArray], FloatArray]
    sample_rates: FloatArray
    pseudo_sums: FloatArray
    pseudo_slope: FloatArray
    pseudo_rates: ScoreBounds = BOUNDED
    is_bounded: bool = True
    is_biased: bool = False
    successes_and_trials: FloatArray | None = None
    reported_score: float | None = None
    undefined_reason: str = ""
    note: str = ""

    @property
    def score(self) -> float:
        """Reported score of the set of samples."""
        if self.reported_score is not None:
            return self.reported_score
        return self.plug_in_score

    @property
    def plug_in_score(self) -> float:
        """Plug-in estimate: the score computed from the sums over all samples."""
        sums = self.weighted_sums(np.ones((1, len(self.sample_rates))))
        return float(self.score_from_sums(sums)[0])

    @property
    def num_samples(self) -> int:
        """Number of samples that the score is based on."""
        if self.successes_and_trials is not None:
            return int(self.successes_and_trials[1].sum())
        return len(self.sample_rates)

    def get_missing_reason(self) -> str:
        """Return the reason why the score has no confidence interval, or an empty string."""
        if self.undefined_reason or self.is_bounded or self.successes_and_trials is not None:
            return self.undefined_reason
        if len(self.sample_rates) < MIN_SAMPLES_UNBOUNDED:
            return REASON_FEW_SAMPLES_UNBOUNDED
        low, high = self.pseudo_rates
        if low == high:
            return REASON_CONSTANT_SCORE
        return ""


def estimate_ratio(
    numerator: FloatArray, denominator: FloatArray, bounds: ScoreBounds = BOUNDED
) -> ScoreEstimator:
    """Return the estimator of a ratio of two sums over the samples.

    The ratio is 0 if both sums are 0. The size of the typical sample is the root mean square of
    `denominator`, which weights large samples more than the mean does. Without an upper bound, the
    pseudo-observation has rate 1 (an error in every character) or that of the worst sample,
    whichever is larger.

    Args:
        numerator: Numerator of each sample, shape (N,).
        denominator: Denominator of each sample, shape (N,), not negative.
    """
    columns = np.stack([numerator, denominator], axis=1)
    # Each sample is at most one binary trial.
    is_trial = np.isin(denominator, (0, 1)) & ((numerator == 0) | (numerator == denominator))
    total = float(denominator.sum())
    size = math.sqrt(float((denominator**2).mean()))
    score = 0.0
    if total:
        score = float(numerator.sum()) / total
    rates = np.zeros_like(numerator)
    if size:
        rates = score + (numerator - score * denominator) / size
    top = bounds[1]
    if not math.isfinite(top):
        top = max(1.0, float(rates.max()))
    return ScoreEstimator(
        weighted_sums=lambda weights: weights @ columns,
        score_from_sums=lambda sums: safe_divide(sums[:, 0], sums[:, 1]),
        sample_rates=rates,
        pseudo_sums=np.array([0.0, size]),
        pseudo_slope=np.array([size, 0.0]),
        pseudo_rates=(0.0, top),
        successes_and_trials=columns.T if is_trial.all() else None,
        undefined_reason="" if size else REASON_NO_SAMPLES,
    )


def estimate_mean(values: FloatArray, bounds: ScoreBounds = BOUNDED) -> ScoreEstimator:
    """Return the estimator of the mean of one value per sample.

    Without bounds, the pseudo-observation exceeds the samples by half their range. If all values
    are 0 or 1, the mean is treated as a proportion, unless `bounds` is NON_NEGATIVE.

    Args:
        values: Value of each sample, shape (N,).
    """
    is_bounded = all(map(math.isfinite, bounds))
    pseudo_rates = bounds
    if not is_bounded:
        least = float(values.min())
        most = float(values.max())
        beyond = (most - least) / 2
        pseudo_rates = (max(bounds[0], least - beyond), most + beyond)
    ratio = estimate_ratio(values, np.ones_like(values))
    successes_and_trials = ratio.successes_and_trials
    if bounds == NON_NEGATIVE:
        successes_and_trials = None
    return replace(
        ratio,
        sample_rates=values,
        pseudo_rates=pseudo_rates,
        is_bounded=is_bounded,
        successes_and_trials=successes_and_trials,
    )


class SampleGroup(NamedTuple):
    """Indices (M,) and values (M, V) of the samples that contain a class or field."""

    sample_indices: NDArray[np.int64]
    values: FloatArray


ClassCounts = Counter[tuple[str, str]]
"""Number of occurrences of each (class or field, value) pair in an answer or a reference."""


def count_by_class(
    pairs: Sequence[tuple[ClassCounts, ClassCounts]], names: Collection[str]
) -> dict[str, SampleGroup]:
    """Count the correct, predicted and reference values of each class or field in each sample.

    Args:
        pairs: Predicted values of each sample, and those of the reference that is compared.
        names: Classes or fields of all references. Each has a group, so that the sums of two
            evaluations have the same columns. Others are ignored.
    """
    rows: dict[str, dict[int, list[float]]] = {name: {} for name in sorted(names)}
    for i, (predicted, reference) in enumerate(pairs):
        for column, counts in enumerate((predicted & reference, predicted, reference)):
            for (name, _), count in counts.items():
                if name in rows:
                    rows[name].setdefault(i, [0.0, 0.0, 0.0])[column] += count
    groups = {}
    for name, counts_by_sample in rows.items():
        sample_indices = np.array(list(counts_by_sample), np.int64)
        values = np.array(list(counts_by_sample.values()), np.float64).reshape(-1, 3)
        groups[name] = SampleGroup(sample_indices, values)
    return groups


def estimate_macro_f1(
    groups: Sequence[SampleGroup], sample_rates: FloatArray, *, counts_predicted: bool
) -> ScoreEstimator:
    """Return the estimator of macro F1, the mean of F1 over classes or fields.

    Args:
        groups: Groups of `count_by_class`.
        sample_rates: Contribution of each sample on the scale of the score, shape (N,).
        counts_predicted: Whether the mean includes a group with predicted values only.
    """

    def is_included(predicted: FloatArray, wanted: FloatArray) -> NDArray[np.bool_]:
        return wanted + counts_predicted * predicted > 0

    def compute_score(sums: FloatArray) -> FloatArray:
        correct, predicted, wanted = np.moveaxis(sums.reshape(len(sums), len(groups), 3), 2, 0)
        f1_sums = safe_divide(2 * correct, predicted + wanted).sum(axis=1)
        return safe_divide(f1_sums, is_included(predicted, wanted).sum(axis=1) * 1.0)

    included = []
    for index, group in enumerate(groups):
        _, predicted, wanted = group.values.sum(axis=0)
        if is_included(predicted, wanted):
            included.append(index)
    sizes = np.zeros(len(groups))
    sizes[included], undefined_reason = compute_typical_sizes(
        [groups[index] for index in included], 2, len(sample_rates)
    )

    return ScoreEstimator(
        weighted_sums=build_grouped_sums(groups, len(sample_rates)),
        score_from_sums=compute_score,
        sample_rates=sample_rates,
        # The typical sample predicts as many values as its references have.
        pseudo_sums=np.outer(sizes, [0, 1, 1]).ravel(),
        pseudo_slope=np.outer(sizes, [1, 0, 0]).ravel(),
        is_biased=True,
        undefined_reason=undefined_reason,
    )


def compute_typical_sizes(
    groups: Sequence[SampleGroup], column: int, num_samples: int, power: int = 1
) -> tuple[FloatArray, str]:
    """Return the size of each class in a typical sample, for the interval of a macro mean.

    By default, it is the mean size in the samples that contain the class or field, times the
    fraction of these samples. If a single sample of the rarest class has more influence on the
    mean, the typical sample has this class only.

    Args:
        column: Column of the group values with the size of the references.
        power: Exponent of the mean; 2 for the root mean square.

    Returns:
        The sizes, shape (C,), and the reason why the mean has no interval, or an empty string.
    """
    if not groups:
        return np.zeros(0), REASON_NO_SAMPLES
    counts = np.array([np.count_nonzero(group.values[:, column]) for group in groups])
    rarest = int(np.argmin(counts))
    parts = counts / num_samples
    if counts[rarest] * len(counts) < num_samples:
        parts = np.eye(len(counts))[rarest]
    totals = np.array([(group.values[:, column] ** power).sum() for group in groups])
    sizes = (totals / np.maximum(1, counts)) ** (1 / power)
    reason = ""
    if counts[rarest] < MIN_SAMPLES_PER_CLASS:
        reason = REASON_RARE_CLASS
    return parts * sizes, reason


def build_grouped_sums(groups: Sequence[SampleGroup], num_samples: int) -> WeightedSumsFn:
    """Return a function that computes weighted sums of the values of each sample group.

    It maps resample weights (R, N) to the V sums of each group, concatenated: (R, groups * V).
    """
    # For large groups a dense matrix product is faster than indexing the weights.
    dense: dict[int, FloatArray] = {}
    for index, group in enumerate(groups):
        if 2 * len(group.sample_indices) > num_samples:
            dense[index] = np.zeros((num_samples, group.values.shape[1]))
            dense[index][group.sample_indices] = group.values

    def sums(weights: ResampleWeights) -> FloatArray:
        if not groups:
            return np.zeros((len(weights), 0))
        found = []
        for index, group in enumerate(groups):
            if index in dense:
                found.append(weights @ dense[index])
            else:
                found.append(weights.T[group.sample_indices].T @ group.values)
        return np.concatenate(found, axis=1)

    return sums


def iter_resample_weights(num_samples: int) -> Iterator[tuple[ResampleWeights, FloatArray]]:
    """Yield the bootstrap resamples of a set of samples in chunks, equal in every call.

    Yields:
        Sample weights (R, N), exponentially distributed with mean 1, and the weight of the
        pseudo-observation (R,).
    """
    rng = np.random.default_rng(SEED)
    chunk_rows = max(1, MAX_CHUNK_ELEMENTS // num_samples)
    for start in range(0, NUM_RESAMPLES, chunk_rows):
        count = min(chunk_rows, NUM_RESAMPLES - start)
        pseudo_weights = rng.standard_gamma(PSEUDO_WEIGHT, count)
        # Weights of a sample are contiguous, because sums index them by sample.
        yield rng.standard_exponential((num_samples, count)).T, pseudo_weights


def compute_intervals(
    estimators: Mapping[str, ScoreEstimator],
) -> dict[str, ConfidenceInterval | None]:
    """Return the 95 % confidence intervals of scores of the same samples; None if undefined."""
    result: dict[str, ConfidenceInterval | None] = dict.fromkeys(estimators)
    statistics: dict[str, tuple[BootstrapTerms, ScoreBounds]] = {}
    for name, one in estimators.items():
        if one.get_missing_reason():
            continue
        if one.successes_and_trials is not None:
            successes, trials = one.successes_and_trials.sum(axis=1)
            result[name] = clopper_pearson_interval(float(successes), float(trials))
        else:
            statistics[name] = [(1, one, one.pseudo_rates)], one.pseudo_rates
    return result | _bootstrap(statistics)


def compute_difference_intervals(
    before: Mapping[str, ScoreEstimator],
    after: Mapping[str, ScoreEstimator],
    level: float = CONFIDENCE_LEVEL,
) -> dict[str, ConfidenceInterval | None]:
    """Return the intervals of score differences (after - before); None if undefined.

    Both evaluations must have the same samples in the same order.
    """
    pairs = {name: (before[name], after[name]) for name in before if name in after}
    result: dict[str, ConfidenceInterval | None] = dict.fromkeys(pairs)
    statistics: dict[str, tuple[BootstrapTerms, ScoreBounds]] = {}
    for name, (old, new) in pairs.items():
        if get_missing_difference_reason(old, new):
            continue
        if (counts := count_discordant_pairs(old, new)) is not None:
            result[name] = tango_interval(*counts, level)
        else:
            ends = UNBOUNDED
            if old.is_bounded and new.is_bounded:
                old_low, old_high = old.pseudo_rates
                new_low, new_high = new.pseudo_rates
                ends = new_low - old_high, new_high - old_low
            old_rates, new_rates = _choose_change_rates(old, new)
            statistics[name] = [(1, new, new_rates), (-1, old, old_rates)], ends
    return result | _bootstrap(statistics, level)


def get_missing_difference_reason(before: ScoreEstimator, after: ScoreEstimator) -> str:
    """Return the reason why a score difference has no interval, or an empty string."""
    undefined = before.undefined_reason or after.undefined_reason
    if undefined or count_discordant_pairs(before, after) is not None:
        return undefined
    num_samples = len(before.sample_rates)
    if before.is_bounded and after.is_bounded:
        return REASON_FEW_SAMPLES if num_samples < MIN_SAMPLES else ""
    if num_samples < MIN_SAMPLES_UNBOUNDED:
        return REASON_FEW_SAMPLES_UNBOUNDED
    if (before.sample_rates == after.sample_rates).all():
        return REASON_NO_CHANGE
    return ""


def count_discordant_pairs(
    before: ScoreEstimator, after: ScoreEstimator
) -> tuple[float, float, float] | None:
    """Count the trials that only one of two evaluations passes.

    Returns:
        Gained, lost and all trials, or None if the scores are not proportions of the same trials.
    """
    if before.successes_and_trials is None or after.successes_and_trials is None:
        return None
    old, old_trials = before.successes_and_trials
    new, new_trials = after.successes_and_trials
    if (old_trials != new_trials).any():
        return None
    return float((new > old).sum()), float((old > new).sum()), float(old_trials.sum())


def _choose_change_rates(
    before: ScoreEstimator, after: ScoreEstimator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the rates of the pseudo-observation before and after, for both bounds.

    The pseudo-observation changes as much as the sample with the largest change. If no sample
    changed, it changes by the full scale.
    """
    least = min(before.pseudo_rates[0], after.pseudo_rates[0])
    most = max(before.pseudo_rates[1], after.pseudo_rates[1])
    max_change = float(np.abs(after.sample_rates - before.sample_rates).max())
    change = min(max_change, most - least) or most - least
    low = min(max((before.score + after.score - change) / 2, least), most - change)
    return (low + change, low), (low, low + change)


BootstrapTerms = Sequence[tuple[int, ScoreEstimator, tuple[float, float]]]
"""Sign, estimator, and rates of the pseudo-observation for both bounds, of each score in a sum."""


def _bootstrap(
    statistics: Mapping[str, tuple[BootstrapTerms, ScoreBounds]],
    level: float = CONFIDENCE_LEVEL,
) -> dict[str, ConfidenceInterval]:
    """Compute the interval of each score or difference from the same resamples, within bounds."""
    if not statistics:
        return {}
    # Several scores may have the same sums.
    sum_functions: set[WeightedSumsFn] = set()
    num_samples = 0
    for terms, _ in statistics.values():
        for _, one, _ in terms:
            sum_functions.add(one.weighted_sums)
            num_samples = max(num_samples, len(one.sample_rates))
    chunks: dict[str, list[FloatArray]] = defaultdict(list)
    for weights, pseudo_weights in iter_resample_weights(num_samples):
        sums = {function: function(weights) for function in sum_functions}
        for name, (terms, _) in statistics.items():
            chunks[name].append(_compute_bound_values(terms, sums, pseudo_weights))
    intervals = {}
    for name, (terms, ends) in statistics.items():
        values = np.concatenate(chunks[name], axis=1)
        intervals[name] = _build_interval(terms, values, ends, level)
    return intervals


def _compute_bound_values(
    terms: BootstrapTerms,
    sums: Mapping[WeightedSumsFn, FloatArray],
    pseudo_weights: FloatArray,
) -> FloatArray:
    """Return the values of R resamples for the lower and the upper bound: (2, R).

    A third row has values without pseudo-observation for the correction of a biased score.
    """

    def compute_values(bound: int, pseudo_weights: FloatArray) -> FloatArray:
        values = np.zeros_like(pseudo_weights)
        for sign, one, rates in terms:
            pseudo_sums = one.pseudo_sums + rates[bound] * one.pseudo_slope
            pseudo_sums = pseudo_weights[:, None] * pseudo_sums
            values += sign * one.score_from_sums(sums[one.weighted_sums] + pseudo_sums)
        return values

    rows = [compute_values(bound, pseudo_weights) for bound in (0, 1)]
    if any(one.is_biased for _, one, _ in terms):
        rows.append(compute_values(0, 0 * pseudo_weights))
    return np.stack(rows)


def _build_interval(
    terms: BootstrapTerms, values: FloatArray, ends: ScoreBounds, level: float
) -> ConfidenceInterval:
    """Return the interval between bias-corrected quantiles of the resamples.

    The interval is clipped to `ends` and extended to contain the score. The correction is 2 x
    bias: on average, resamples exceed the set by as much as the set exceeds the population.
    """
    score = sum(sign * one.score for sign, one, _ in terms)
    plug_in = sum(sign * one.plug_in_score for sign, one, _ in terms)
    lows, highs, *unshifted = values
    shift = 0.0
    if unshifted:
        shift = 2 * (float(unshifted[0].mean()) - plug_in)
    tail = (1 - level) / 2
    low = float(np.quantile(lows, tail)) - shift
    high = float(np.quantile(highs, 1 - tail)) - shift
    return ConfidenceInterval(min(max(low, ends[0]), score), max(min(high, ends[1]), score))


def safe_divide(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide elementwise, with 0 as the quotient if the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
