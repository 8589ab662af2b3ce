"""Confidence intervals of proportions in closed form: one proportion, and two paired ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95

_HALVINGS = 60
"""Steps of a bisection of [0, 1]; more change nothing in double precision."""

_TINY = 1e-300


class Interval(NamedTuple):
    """A 95 % confidence interval: in 95 of 100 sets of samples it contains the population value."""

    low: float
    high: float


def clopper_pearson(successes: float, trials: float) -> Interval:
    """Return the exact interval of a proportion (Clopper and Pearson 1934).

    Its coverage is at least 95 % for every proportion and number of trials.
    """
    tail = (1 - LEVEL) / 2
    failures = trials - successes
    low = beta_quantile(tail, successes, failures + 1) if successes else 0.0
    high = beta_quantile(1 - tail, successes + 1, failures) if failures else 1.0
    return Interval(low, high)


def tango(gained: float, lost: float, trials: float) -> Interval:
    """Return the score interval of the difference of two paired proportions (Tango 1998).

    Args:
        gained: Pairs that failed before and succeed after.
        lost: Pairs that succeeded before and fail after.
        trials: All pairs.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    change = (gained - lost) / trials

    def excess(difference: float) -> float:
        """The score statistic, which falls as the assumed difference grows."""
        b = (2 * trials - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        discordant = (math.sqrt(max(0.0, b * b - 8 * trials * c)) - b) / (4 * trials)
        variance = trials * (2 * discordant + difference * (1 - difference))
        return (gained - lost - trials * difference) / math.sqrt(max(_TINY, variance))

    low = _root(lambda difference: excess(difference) - z, -1.0, change)
    high = _root(lambda difference: excess(difference) + z, change, 1.0)
    return Interval(low, high)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return the quantile of the beta distribution with parameters `a` and `b`, both above 0."""
    return _root(lambda x: probability - beta_cdf(x, a, b), 0.0, 1.0)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b).

    Evaluates the continued fraction by Lentz's method (Press et al. 2007, section 6.4).
    """
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - beta_cdf(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _continued_fraction(x, a, b) / a


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction of I_x(a, b), which converges fast for x below the mean."""
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or _TINY)
    value = d
    # It takes O(sqrt(max(a, b))) terms.
    for m in range(1, 100 + 10 * math.isqrt(int(max(a, b)))):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / ((1 + term * d) or _TINY)
            c = (1 + term / c) or _TINY
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function changes its sign between `low` and `high`, by bisection."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
