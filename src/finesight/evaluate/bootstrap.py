"""Confidence intervals of scores: which samples happen to be in the set (95 %).

A proportion has the exact interval, a difference of two paired proportions Tango's score interval.
Everything else is a function of sums over the samples and has a Bayesian bootstrap interval (Rubin
1981) with half a pseudo-observation. The pseudo-observation is a typical sample that is all wrong
for the lower bound, and all right for the upper bound. Without it, an interval has no width where
all samples score the same, and covers too rarely near the ends of the scale. With a whole one, a
mean of bounded values has the bound of Gaffke (2005), which for proportions is the exact one.
`benchmarks/interval_coverage.py` measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finesight.evaluate.proportions import LEVEL, Interval, clopper_pearson, tango

Array = NDArray[np.float64]

Weights = Array
"""Weight of each of N samples in each of R resamples: shape (R, N)."""

Sums = Callable[[Weights], Array]
"""K weighted sums over the samples, for each resample: shape (R, K)."""

Ends = tuple[float, float]

BOUNDED: Ends = (0.0, 1.0)
NON_NEGATIVE: Ends = (0.0, math.inf)
UNBOUNDED: Ends = (-math.inf, math.inf)

RESAMPLES = 2000
SEED = 0
CHUNK = 4_000_000
"""Weights held in memory at a time."""

PSEUDO = 0.5
"""Weight of the pseudo-observation; samples have weight 1 on average."""

FEWEST = 6
"""Samples below which a difference has no interval: five agree by chance once in 16 sets."""

FEWEST_UNBOUNDED = 20
"""Samples below which a score without known bounds has no interval."""

FEWEST_OF_CLASS = 5
"""Samples of each class or field below which a mean over them has no interval."""

# As literals: reports look them up in the table of translations.
FEW = "no interval: fewer than 6 samples"
FEW_UNBOUNDED = "no interval: fewer than 20 samples"
RARE = "no interval: a class or field is in fewer than 5 samples"
EMPTY = "no interval: no sample counts towards it"
CONSTANT = "no interval: all samples score the same, on a scale without bounds"
UNCHANGED = "no interval: no sample changed, on a scale without bounds"


@dataclass(frozen=True, slots=True, eq=False)
class Estimator:
    """A score of a set of N samples, as a function of K sums over them.

    Attributes:
        sums: The sums for each resample.
        value: The score from the sums, (R, K) -> (R,).
        rates: What each sample contributes to the score, on the scale of the score: shape (N,).
            For a mean these are the values themselves.
        worst: Sums of a typical sample of rate 0: shape (K,).
        slope: Difference of these sums per unit of rate: shape (K,).
        ends: Rates of the pseudo-observations for the lower and the upper bound.
        bounded: Whether `ends` are bounds of the score, and not taken from the samples.
        biased: Whether the score of a set is biased, so that the interval has to be corrected.
        proportion: Successes and trials of each sample where the score is a proportion: (2, N).
        reported: The score of the set where it is another estimate than `value` of its sums.
        undefined: Why neither the score nor a difference has an interval.
        note: A warning to show beside the score.
    """

    sums: Sums
    value: Callable[[Array], Array]
    rates: Array
    worst: Array
    slope: Array
    ends: Ends = BOUNDED
    bounded: bool = True
    biased: bool = False
    proportion: Array | None = None
    reported: float | None = None
    undefined: str = ""
    note: str = ""

    @property
    def score(self) -> float:
        """The score of the set."""
        return self.plug_in if self.reported is None else self.reported

    @property
    def plug_in(self) -> float:
        """The score's function of the sums over the set."""
        return float(self.value(self.sums(np.ones((1, len(self.rates)))))[0])

    @property
    def samples(self) -> int:
        """Number of samples that count towards the score."""
        return len(self.rates) if self.proportion is None else int(self.proportion[1].sum())

    def typical(self, rate: float) -> Array:
        """Return the sums of a typical sample of that rate: shape (K,)."""
        return self.worst + rate * self.slope

    def missing(self) -> str:
        """Return why the score has no interval, or an empty string."""
        if self.undefined or self.bounded or self.proportion is not None:
            return self.undefined
        if len(self.rates) < FEWEST_UNBOUNDED:
            return FEW_UNBOUNDED
        return CONSTANT if self.ends[0] == self.ends[1] else ""


def ratio(above: Array, below: Array, bounds: Ends = BOUNDED) -> Estimator:
    """Return the estimator of a sum over the samples divided by another one; 0 where both are 0.

    The size of the typical sample is the root mean square of `below`, so that a few large samples
    count. Without an upper bound, the pseudo-observation has rate 1 (an error in every character)
    or the errors of the worst sample, whichever is more.

    Args:
        above: Numerator of each sample, shape (N,).
        below: Denominator of each sample, shape (N,), not negative.
        bounds: Of the score.
    """
    columns = np.stack([above, below], axis=1)
    total = float(below.sum())
    size = math.sqrt(float((below**2).mean()))
    score = float(above.sum()) / total if total else 0.0
    rates = score + (above - score * below) / size if size else np.zeros_like(above)
    top = bounds[1] if math.isfinite(bounds[1]) else max(1.0, float(rates.max()))
    return Estimator(
        sums=lambda weights: weights @ columns,
        value=lambda sums: divided(sums[:, 0], sums[:, 1]),
        rates=rates,
        worst=np.array([0.0, size]),
        slope=np.array([size, 0.0]),
        ends=(0.0, top),
        proportion=np.stack([above, below]) if _is_proportion(above, below) else None,
        undefined="" if size else EMPTY,
    )


def mean(values: Array, bounds: Ends = BOUNDED) -> Estimator:
    """Return the estimator of the mean of a value of each sample, shape (N,).

    Where the score has no bound, the pseudo-observation lies beyond the samples by half their
    range. Zeros and ones alone are a proportion, save where values are known to be counts.
    """
    ones = np.ones_like(values)
    columns = np.stack([values, ones], axis=1)
    least, most = float(values.min()), float(values.max())
    beyond = (most - least) / 2
    bounded = all(map(math.isfinite, bounds))
    shares = bounds != NON_NEGATIVE and _is_proportion(values, ones)
    return Estimator(
        sums=lambda weights: weights @ columns,
        value=lambda sums: divided(sums[:, 0], sums[:, 1]),
        rates=values,
        worst=np.array([0.0, 1.0]),
        slope=np.array([1.0, 0.0]),
        ends=bounds if bounded else (max(bounds[0], least - beyond), most + beyond),
        bounded=bounded,
        proportion=np.stack([values, ones]) if shares else None,
    )


class SampleGroup(NamedTuple):
    """Samples that contribute to a class or field, shape (M,), and V values of each, (M, V)."""

    samples: NDArray[np.int64]
    values: Array


def typical_classes(counts: Sequence[int], samples: int) -> tuple[Array, str]:
    """Return how much of each class or field a typical sample has, for a mean over the classes.

    That is the class's share of the samples. Where one sample of the rarest class moves the mean
    by more than such a sample does, it is the rarest class alone.

    Args:
        counts: Samples that have each class, shape (C,).
        samples: All samples.

    Returns:
        The parts, shape (C,), and why the mean has no interval, or an empty string.
    """
    rarest = int(np.argmin(counts))
    parts = np.array(counts, np.float64) / samples
    if counts[rarest] * len(counts) < samples:
        parts = np.zeros(len(counts))
        parts[rarest] = 1.0
    return parts, RARE if counts[rarest] < FEWEST_OF_CLASS else ""


def grouped_sums(groups: Sequence[SampleGroup], samples: int) -> Sums:
    """Return V sums for each group, one group after the other: (R, N) -> (R, groups * V)."""
    # A product with a dense matrix is faster than gathering most of the weights.
    dense = {
        place: _dense(group, samples)
        for place, group in enumerate(groups)
        if 2 * len(group.samples) > samples
    }

    def sums(weights: Weights) -> Array:
        found = [
            weights @ dense[place] if place in dense else weights.T[one.samples].T @ one.values
            for place, one in enumerate(groups)
        ]
        return np.concatenate(found, axis=1) if found else np.zeros((len(weights), 0))

    return sums


def _dense(group: SampleGroup, samples: int) -> Array:
    values = np.zeros((samples, group.values.shape[1]))
    values[group.samples] = group.values
    return values


def _is_proportion(above: Array, below: Array) -> bool:
    """Whether each sample is one trial or none, and a success or not."""
    return bool(np.isin(below, (0, 1)).all() and ((above == 0) | (above == below)).all())


def draws(samples: int) -> Iterator[tuple[Weights, Array]]:
    """Yield the resamples of a set of that many samples in chunks, the same ones in every call.

    Yields:
        Weights of the samples (R, N), exponentially distributed with mean 1, and the weight of the
        pseudo-observation (R,).
    """
    generator = np.random.default_rng(SEED)
    rows = max(1, CHUNK // samples)
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        extra = generator.standard_gamma(PSEUDO, count)
        # The weights of a sample lie together, since sums gather them by sample.
        yield generator.standard_exponential((samples, count)).T, extra


def intervals(estimators: Mapping[str, Estimator]) -> dict[str, Interval | None]:
    """Return the 95 % intervals of scores of the same samples, None where there is none."""
    found: dict[str, Interval | None] = dict.fromkeys(estimators)
    statistics: dict[str, Statistic] = {}
    for name, one in estimators.items():
        if one.missing():
            continue
        if one.proportion is not None:
            successes, trials = one.proportion.sum(axis=1)
            found[name] = clopper_pearson(float(successes), float(trials))
        else:
            statistics[name] = partial(_ends, one)
    for name, values in _resampled(statistics, _samples(estimators)).items():
        one = estimators[name]
        found[name] = _interval(values, one.plug_in, one.score, one.ends)
    return found


def differences(
    before: Mapping[str, Estimator], after: Mapping[str, Estimator]
) -> dict[str, Interval | None]:
    """Return the 95 % intervals of the differences (after - before) of scores of the same samples
    in the same order, None where there is none."""
    shared = [name for name in before if name in after]
    found: dict[str, Interval | None] = dict.fromkeys(shared)
    statistics: dict[str, Statistic] = {}
    for name in shared:
        was, now = before[name], after[name]
        if no_difference(was, now):
            continue
        pairs = _pairs(was, now)
        if pairs is not None:
            found[name] = tango(*pairs)
        else:
            statistics[name] = partial(_changes, was, now)
    for name, values in _resampled(statistics, _samples(before)).items():
        was, now = before[name], after[name]
        plug_in = now.plug_in - was.plug_in
        found[name] = _interval(values, plug_in, now.score - was.score, UNBOUNDED)
    return found


def no_difference(was: Estimator, now: Estimator) -> str:
    """Return why a difference has no interval, or an empty string."""
    undefined = was.undefined or now.undefined
    if undefined or _pairs(was, now) is not None:
        return undefined
    if len(was.rates) < FEWEST:
        return FEW
    changed = bool((was.rates != now.rates).any())
    return "" if changed or (was.bounded and now.bounded) else UNCHANGED


def _pairs(was: Estimator, now: Estimator) -> tuple[float, float, float] | None:
    """Samples gained and lost, and all trials, of two proportions of the same trials."""
    if was.proportion is None or now.proportion is None:
        return None
    (old, trials), (new, others) = was.proportion, now.proportion
    if (trials != others).any():
        return None
    return float((new > old).sum()), float((old > new).sum()), float(trials.sum())


class _Resamples:
    """A chunk of resamples, and the sums over them that were asked for."""

    def __init__(self, weights: Weights, extra: Array) -> None:
        self._weights, self._extra = weights, extra
        self._sums: dict[Sums, Array] = {}

    def values(self, one: Estimator, rate: float | None = None) -> Array:
        """The score of each resample, with a pseudo-observation of that rate: shape (R,)."""
        if one.sums not in self._sums:
            self._sums[one.sums] = one.sums(self._weights)
        sums = self._sums[one.sums]
        return one.value(sums if rate is None else sums + self._extra[:, None] * one.typical(rate))


Values = tuple[Array, Array, Array | None]
"""Of each resample: the values from which the lower and the upper bound are taken, and those
without a pseudo-observation where they tell a bias."""

Statistic = Callable[[_Resamples], Values]


def _ends(one: Estimator, resamples: _Resamples) -> Values:
    low, high = one.ends
    plain = resamples.values(one) if one.biased else None
    return resamples.values(one, low), resamples.values(one, high), plain


def _changes(was: Estimator, now: Estimator, resamples: _Resamples) -> Values:
    """The pseudo-observation changes by as much as any sample did, against the bound. Where none
    changed, it changes by the whole scale."""
    least, most = min(was.ends[0], now.ends[0]), max(was.ends[1], now.ends[1])
    change = min(float(np.abs(now.rates - was.rates).max()), most - least) or most - least
    low = min(max((was.score + now.score - change) / 2, least), most - change)
    high = low + change
    fallen = resamples.values(now, low) - resamples.values(was, high)
    risen = resamples.values(now, high) - resamples.values(was, low)
    plain = resamples.values(now) - resamples.values(was) if was.biased or now.biased else None
    return fallen, risen, plain


def _resampled(statistics: Mapping[str, Statistic], samples: int) -> dict[str, list[Array]]:
    """Return the values of all resamples, by the name of the statistic."""
    if not statistics:
        return {}
    pieces: dict[str, list[Values]] = {name: [] for name in statistics}
    for weights, extra in draws(samples):
        resamples = _Resamples(weights, extra)
        for name, statistic in statistics.items():
            pieces[name].append(statistic(resamples))
    return {
        name: [
            np.concatenate(parts) for parts in zip(*several, strict=True) if parts[0] is not None
        ]
        for name, several in pieces.items()
    }


def _interval(values: Sequence[Array], plug_in: float, score: float, ends: Ends) -> Interval:
    """Return the quantiles, less twice the bias, within the ends and around the score.

    The resamples are as far above the set as the set is above the population, on average.
    """
    lows, highs, *plain = values
    shift = 2 * (float(plain[0].mean()) - plug_in) if plain else 0.0
    tail = (1 - LEVEL) / 2
    low, high = float(np.quantile(lows, tail)) - shift, float(np.quantile(highs, 1 - tail)) - shift
    return Interval(min(max(low, ends[0]), score), max(min(high, ends[1]), score))


def _samples(estimators: Mapping[str, Estimator]) -> int:
    return max((len(one.rates) for one in estimators.values()), default=0)


def divided(above: Array, below: Array) -> Array:
    """Return the quotients, 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
