"""Intervals of scores: how they are made, and the cases that have none."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.evaluate.bootstrap import (
    CONSTANT,
    EMPTY,
    FEW,
    FEW_UNBOUNDED,
    FEWEST,
    FEWEST_OF_CLASS,
    FEWEST_UNBOUNDED,
    NON_NEGATIVE,
    RARE,
    RESAMPLES,
    UNBOUNDED,
    UNCHANGED,
    Array,
    Estimator,
    SampleGroup,
    differences,
    divided,
    draws,
    grouped_sums,
    intervals,
    mean,
    no_difference,
    ratio,
)
from finesight.evaluate.proportions import Interval, clopper_pearson, tango


def interval(one: Estimator) -> Interval | None:
    return intervals({"score": one})["score"]


def change(was: Estimator, now: Estimator) -> Interval | None:
    return differences({"score": was}, {"score": now})["score"]


def values(*numbers: float) -> Array:
    return np.array(numbers, np.float64)


@pytest.mark.parametrize("samples", [1, 7, 2000, 30_000])
def test_draws_are_always_the_same(samples: int) -> None:
    pieces = list(draws(samples))
    assert sum(len(weights) for weights, _ in pieces) == RESAMPLES
    assert all(len(weights) == len(extra) for weights, extra in pieces)
    weights, extra = next(draws(samples))
    assert (pieces[0][0] == weights).all()
    assert (pieces[0][1] == extra).all()


def test_samples_weigh_one_on_average_and_the_pseudo_observation_half() -> None:
    weights, extra = (np.concatenate(parts) for parts in zip(*draws(50), strict=True))
    assert abs(weights.mean(axis=0) - 1).max() < 5 / np.sqrt(RESAMPLES)
    assert extra.mean() == pytest.approx(0.5, abs=5 * np.sqrt(0.5 / RESAMPLES))


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    sample = np.random.default_rng(3).normal(10, 2, 4000)
    low, high = interval(mean(sample, UNBOUNDED)) or (0, 0)
    error = sample.std() / np.sqrt(len(sample))
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.25 * error)


def test_zeros_and_ones_have_the_exact_interval() -> None:
    sample = values(*[1] * 17, *[0] * 3)
    assert interval(mean(sample)) == clopper_pearson(17, 20)
    # Of the samples, some may not count: formulas that cannot be drawn.
    assert interval(ratio(sample, values(*[1] * 18, 0, 0))) == clopper_pearson(17, 18)
    # So have those of a metric of the user's own.
    assert interval(mean(sample, UNBOUNDED)) == clopper_pearson(17, 20)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("samples", [1, 2, 6, 100])
def test_samples_of_equal_value_have_an_interval_with_a_width(value: float, samples: int) -> None:
    low, high = interval(mean(np.full(samples, value))) or (0, 0)
    assert 0 <= low <= value <= high <= 1
    # The rule of three: in fewer than 3 of 100 samples, an event may go unseen in 100.
    assert high - low > 0.02
    assert high - low < 4.5 / samples


def test_the_widths_near_an_end_do_not_jump() -> None:
    """A mean of values that are almost a proportion has an interval that is almost its."""
    exact = clopper_pearson(19, 20)
    near = interval(mean(values(*[1.0] * 19, 0.001))) or (0, 0)
    assert tuple(near) == pytest.approx(tuple(exact), abs=0.05)


def test_one_group_of_samples_counts_by_its_size() -> None:
    edits, lengths = values(1, 0, 9), values(10, 10, 1000)
    one = ratio(edits, lengths, NON_NEGATIVE)
    assert one.score == pytest.approx(10 / 1020)
    low, high = interval(one) or (0, 0)
    assert 0 <= low < one.score < high


def test_an_error_rate_may_be_above_one() -> None:
    one = ratio(values(*[30] * 10, 4), np.full(11, 10.0), NON_NEGATIVE)
    low, high = interval(one) or (0, 0)
    assert 1 < low < one.score < high
    assert high < 3.01


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (mean(np.arange(19.0), NON_NEGATIVE), FEW_UNBOUNDED),
        (mean(np.zeros(50), NON_NEGATIVE), CONSTANT),
        (mean(np.full(50, 2.5), UNBOUNDED), CONSTANT),
        (ratio(np.zeros(50), np.zeros(50)), EMPTY),
    ],
)
def test_what_has_no_interval_says_why(one: Estimator, reason: str) -> None:
    assert interval(one) is None
    assert one.missing() == reason


def test_a_difference_that_has_no_interval_says_why() -> None:
    few, some = np.linspace(0, 1, FEWEST - 1), np.linspace(0, 1, FEWEST)
    assert no_difference(mean(few), mean(few**2)) == FEW
    assert change(mean(few), mean(few**2)) is None
    assert no_difference(mean(some), mean(some**2)) == ""
    own = mean(10 * some, UNBOUNDED)
    assert no_difference(own, own) == UNCHANGED
    nothing = ratio(np.zeros(FEWEST), np.zeros(FEWEST))
    assert no_difference(nothing, nothing) == EMPTY


def test_the_reasons_name_the_numbers() -> None:
    assert f" {FEWEST} " in FEW
    assert f" {FEWEST_UNBOUNDED} " in FEW_UNBOUNDED
    assert f" {FEWEST_OF_CLASS} " in RARE


def test_differences_of_zeros_and_ones_have_tangos_interval() -> None:
    was, now = values(0, 0, 0, 1, 1, 0, 1, 0), values(1, 1, 0, 1, 0, 1, 1, 0)
    assert change(mean(was), mean(now)) == tango(3, 1, 8)
    # Of five, all agree by chance once in 16 sets: that is shown, and judged elsewhere.
    assert change(mean(was[:5]), mean(now[:5])) == tango(2, 1, 5)


def test_scores_that_did_not_change_may_do_so_on_other_samples() -> None:
    same = mean(np.linspace(0.2, 1, 40))
    low, high = change(same, same) or (0, 0)
    assert -0.1 < low < 0 < high < 0.1


def test_a_small_gain_of_all_samples_is_clear() -> None:
    was = np.linspace(0, 0.9, 30)
    low, high = change(mean(was), mean(was + 0.01)) or (0, 0)
    assert 0 < low < 0.01 <= high < 0.02


@pytest.mark.parametrize("samples", [6, 8, 12])
def test_few_samples_without_a_difference_seldom_look_clear(samples: int) -> None:
    """Of scores that do not differ, some 5 % do; the plain percentile interval says so of 15 %."""
    chance = np.random.default_rng(5)
    normal = chance.normal(size=(600, samples))
    rare = chance.choice([-1.0, 0.0, 1.0], p=[0.3, 0.4, 0.3], size=(600, samples))
    nothing = mean(np.zeros(samples), UNBOUNDED)
    for changes in (normal, rare):
        was = {str(i): nothing for i in range(600)}
        now = {str(i): mean(own, UNBOUNDED) for i, own in enumerate(changes)}
        bounds = [one for one in differences(was, now).values() if one is not None]
        clear = sum(low > 0 or high < 0 for low, high in bounds)
        assert clear / 600 < 0.065


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_sums_of_groups_are_those_of_a_dense_matrix(share: float) -> None:
    chance = np.random.default_rng(6)
    dense = np.where(chance.random((30, 4, 3)) < share, chance.random((30, 4, 3)), 0.0)
    groups = []
    for place in range(4):
        used = np.flatnonzero(dense[:, place].any(axis=1))
        groups.append(SampleGroup(used, dense[used, place]))
    weights = chance.random((5, 30))
    assert grouped_sums(groups, 30)(weights) == pytest.approx(weights @ dense.reshape(30, 12))
    assert grouped_sums([], 30)(weights).shape == (5, 0)


def test_twenty_thousand_samples_are_quick() -> None:
    """No wall clock: the work is bounded by the chunks, whose number does not grow with scores."""
    sample = np.random.default_rng(7).random(20_000)
    low, high = interval(mean(sample)) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / np.sqrt(20_000), rel=0.1)


def test_nothing_over_nothing_is_nothing() -> None:
    assert divided(values(0, 1), values(0, 2)).tolist() == [0.0, 0.5]
