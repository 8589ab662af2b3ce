"""How sure a figure is: intervals from samples drawn anew (Efron 1979).

A figure of a set is computed from sums over its samples, so a resample is nothing but a weight for
each sample: how often it was drawn. All resamples of a set use the same draws, before and after
alike, which is what makes a comparison paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Weights = Array
"""How often each of N samples counts in each of R resamples: shape (R, N)."""

Figures = Callable[[Weights], dict[str, Array]]
"""Every figure of a set by name, once for each resample: shape (R,)."""

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

CHUNK = 4_000_000
"""Most numbers of weights that are held at a time."""


class Interval(NamedTuple):
    """Bounds that hold the figure of all samples of the kind in 95 of 100 sets drawn from them."""

    low: float
    high: float


def whole(samples: int) -> Weights:
    """The set as it is, each of its samples once: shape (1, N)."""
    return np.ones((1, samples))


def draws(samples: int) -> Iterator[Weights]:
    """The 1,000 resamples of a set of that many samples, always the same, in pieces: (r, N)."""
    chance = np.random.default_rng(SEED)
    rows = max(1, CHUNK // samples)
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = chance.integers(0, samples, (count, samples))
        places = (drawn + samples * np.arange(count)[:, None]).ravel()
        counted = np.bincount(places, minlength=count * samples)
        yield counted.reshape(count, samples).astype(np.float64)


def resampled(samples: int, figures: Figures) -> dict[str, Array]:
    """Every figure of every resample: shape (1000,)."""
    pieces = [figures(weights) for weights in draws(samples)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def interval(values: Array, samples: int) -> Interval:
    """The middle 95 % of the values of resamples, and more of them where the samples are few: the
    expanded percentile interval (Hesterberg 2015, section 3.3), for a percentile interval alone is
    too narrow by as much as one of the normal distribution in place of Student's."""
    tail = 0.0
    if samples > 1:
        widened = math.sqrt(samples / (samples - 1)) * _student(samples - 1)
        tail = NormalDist().cdf(-widened)
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _student(freedom: int) -> float:
    """The bound of Student's t that 95 % lie within (Fisher and Cornish's series)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def ratios(above: Array, below: Array) -> Callable[[Weights], Array]:
    """The figure that is a sum over the samples divided by another one; 0 where both are 0.

    `above` and `below`: shape (N,). A mean is the sum of values over the sum of ones.
    """
    columns = np.stack([above, below], axis=1)

    def figure(weights: Weights) -> Array:
        totals = weights @ columns
        return divided(totals[:, 0], totals[:, 1])

    return figure


def divided(above: Array, below: Array) -> Array:
    """Quotients, 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
