"""Closed-form confidence intervals of one proportion and of two paired proportions."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE_LEVEL = 0.95

_NUM_BISECTIONS = 60
"""Bisection steps for [0, 1]; more have no effect in double precision."""

_TINY = 1e-300


class ConfidenceInterval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def clopper_pearson_interval(successes: float, trials: float) -> ConfidenceInterval:
    """Compute the exact 95 % interval of a proportion (Clopper and Pearson 1934).

    Its coverage is at least 95 % for every proportion and number of trials.
    """
    tail = (1 - CONFIDENCE_LEVEL) / 2
    failures = trials - successes
    low = beta_quantile(tail, successes, failures + 1) if successes else 0.0
    high = beta_quantile(1 - tail, successes + 1, failures) if failures else 1.0
    return ConfidenceInterval(low, high)


def tango_interval(num_gained: float, num_lost: float, num_trials: float) -> ConfidenceInterval:
    """Compute the 95 % score interval of the difference of two paired proportions (Tango 1998).

    Args:
        num_gained: Pairs that fail before and succeed after.
        num_lost: Pairs that succeed before and fail after.
        num_trials: All pairs.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)
    change = (num_gained - num_lost) / num_trials

    def score_statistic(difference: float) -> float:
        """Return the score statistic, which decreases with the assumed difference."""
        b = (2 * num_trials - num_gained + num_lost) * difference - num_gained - num_lost
        c = -num_lost * difference * (1 - difference)
        discordant = (math.sqrt(max(0.0, b * b - 8 * num_trials * c)) - b) / (4 * num_trials)
        variance = num_trials * (2 * discordant + difference * (1 - difference))
        return (num_gained - num_lost - num_trials * difference) / math.sqrt(max(_TINY, variance))

    low = _bisect_root(lambda difference: score_statistic(difference) - z, -1.0, change)
    high = _bisect_root(lambda difference: score_statistic(difference) + z, change, 1.0)
    return ConfidenceInterval(low, high)


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return the quantile of the beta distribution with parameters `a` and `b`, both above 0."""
    return _bisect_root(lambda x: probability - beta_cdf(x, a, b), 0.0, 1.0)


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
    # O(sqrt(max(a, b))) terms are required.
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


def _bisect_root(decreasing_fn: Callable[[float], float], low: float, high: float) -> float:
    """Find the root of a decreasing function between `low` and `high` by bisection."""
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        if decreasing_fn(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
