"""Intervals of proportions in closed form, against published values and exact coverage."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from each_value import each

from finesight.evaluate.bootstrap import (
    beta_cdf,
    beta_quantile,
    clopper_pearson_interval,
    tango_interval,
)


def binomial(successes: int, trials: int, share: float) -> float:
    return math.comb(trials, successes) * share**successes * (1 - share) ** (trials - successes)


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [
        # By statsmodels 0.15, proportion_confint(method="beta").
        (1, 10, (0.0025285785444617848, 0.4450161170281953)),
        (9, 10, (0.5549838829718047, 0.9974714214555382)),
        (3, 7, (0.09898827844250786, 0.815948432359917)),
        (50, 100, (0.39832112950330095, 0.6016788704966991)),
        (1999, 2000, (0.997217360165341, 0.9999873411761314)),
        (0, 20, (0.0, 1 - 0.025 ** (1 / 20))),
        (20, 20, (0.025 ** (1 / 20), 1.0)),
        (0, 1, (0.0, 0.975)),
    ],
)
def test_the_exact_interval_is_that_of_other_programs(
    successes: int, trials: int, expected: tuple[float, float]
) -> None:
    assert clopper_pearson_interval(successes, trials) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("trials", [1, 2, 3, 5, 8, 10, 15, 20, 30, 60])
def test_the_exact_interval_covers_every_share_in_95_of_100_sets(trials: int) -> None:
    """Exactly, by all outcomes; the bootstrap covered 5 to 87 % of shares near 0 or 1."""
    ends = [clopper_pearson_interval(successes, trials) for successes in range(trials + 1)]
    for number in range(1, 1000):
        share = number / 1000
        covered = (
            binomial(successes, trials, share)
            for successes, (low, high) in enumerate(ends)
            if low <= share <= high
        )
        assert math.fsum(covered) >= 0.95 - 1e-9, share


@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 8), (17, 4), (40, 41)])
def test_the_beta_distribution_is_a_sum_of_binomial_terms(a: int, b: int) -> None:
    trials = a + b - 1
    for share in (Fraction(1, 100), Fraction(1, 3), Fraction(1, 2), Fraction(97, 100)):
        exact = sum(
            math.comb(trials, k) * share**k * (1 - share) ** (trials - k)
            for k in range(a, trials + 1)
        )
        assert beta_cdf(float(share), a, b) == pytest.approx(float(exact), rel=1e-9)
        quantile = beta_quantile(float(exact), a, b)
        assert beta_cdf(quantile, a, b) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("gained", "lost", "trials", "expected"),
    [
        # Fagerland, Lydersen and Laake 2014, tables 2 and 7: (-0.517, -0.026), (-0.124, -0.0054).
        (1, 7, 21, (-0.5172323, -0.0260030)),
        (6, 16, 161, (-0.1240234, -0.0054334)),
        # By the likelihood's maximum under the restriction, found numerically with scipy 1.17.
        (40, 20, 160, (0.0308645, 0.2180642)),
        (3, 1, 50, (-0.0544250, 0.1461463)),
    ],
)
def test_the_interval_of_pairs_is_that_of_the_literature(
    gained: int, lost: int, trials: int, expected: tuple[float, float]
) -> None:
    assert tango_interval(gained, lost, trials) == pytest.approx(expected, abs=1e-6)


def test_the_interval_of_pairs_agrees_with_mcnemars_test() -> None:
    for gained in range(12):
        for lost in range(12 - gained):
            low, high = tango_interval(gained, lost, 12)
            clear = gained + lost > 0 and (gained - lost) ** 2 / (gained + lost) > 1.959964**2
            assert (low > 0 or high < 0) == clear, (gained, lost)
            turned = tango_interval(lost, gained, 12)
            assert (low, high) == pytest.approx((-turned.high, -turned.low), abs=1e-9)
            assert -1 <= low <= (gained - lost) / 12 <= high <= 1


def test_pairs_that_all_agree_have_an_interval_with_a_width() -> None:
    z2 = 1.959964**2
    low, high = tango_interval(0, 0, 30)
    assert (low, high) == pytest.approx((-z2 / (30 + z2), z2 / (30 + z2)), abs=1e-6)


@each("trials", [6, 10, 20])
@each("gain", [0.0, 0.02, 0.1, 0.4, 0.8])
@each("loss", [0.0, 0.02, 0.1])
def test_the_interval_of_pairs_covers_nearly_95_of_100_sets(
    trials: int, gain: float, loss: float
) -> None:
    covered = 0.0
    for gained in range(trials + 1):
        for lost in range(trials - gained + 1):
            low, high = tango_interval(gained, lost, trials)
            if low - 1e-9 <= gain - loss <= high + 1e-9:
                ways = math.comb(trials, gained) * math.comb(trials - gained, lost)
                same = (1 - gain - loss) ** (trials - gained - lost)
                covered += ways * gain**gained * loss**lost * same
    assert covered > 0.915
