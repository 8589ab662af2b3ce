"""Intervals of scores: how they are made, and the cases that have none."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.evaluate.bootstrap import (
    MIN_SAMPLES,
    MIN_SAMPLES_PER_CLASS,
    MIN_SAMPLES_UNBOUNDED,
    NON_NEGATIVE,
    NUM_RESAMPLES,
    REASON_CONSTANT_SCORE,
    REASON_FEW_SAMPLES,
    REASON_FEW_SAMPLES_UNBOUNDED,
    REASON_NO_CHANGE,
    REASON_NO_SAMPLES,
    REASON_RARE_CLASS,
    UNBOUNDED,
    ConfidenceInterval,
    FloatArray,
    SampleGroup,
    ScoreEstimator,
    build_grouped_sums,
    clopper_pearson_interval,
    compute_difference_intervals,
    compute_intervals,
    estimate_mean,
    estimate_ratio,
    get_missing_difference_reason,
    iter_resample_weights,
    safe_divide,
    tango_interval,
)


def interval(one: ScoreEstimator) -> ConfidenceInterval | None:
    return compute_intervals({"score": one})["score"]


def change(was: ScoreEstimator, now: ScoreEstimator) -> ConfidenceInterval | None:
    return compute_difference_intervals({"score": was}, {"score": now})["score"]


def values(*value_list: float) -> FloatArray:
    return np.array(value_list, np.float64)


@pytest.mark.parametrize("samples", [1, 7, 2000, 30_000])
def test_draws_are_always_the_same(samples: int) -> None:
    pieces = list(iter_resample_weights(samples))
    assert sum(len(weights) for weights, _ in pieces) == NUM_RESAMPLES
    assert all(len(weights) == len(extra) for weights, extra in pieces)
    weights, extra = next(iter_resample_weights(samples))
    assert (pieces[0][0] == weights).all()
    assert (pieces[0][1] == extra).all()


def test_samples_weigh_one_on_average_and_the_pseudo_observation_half() -> None:
    weights, extra = (
        np.concatenate(parts) for parts in zip(*iter_resample_weights(50), strict=True)
    )
    assert abs(weights.mean(axis=0) - 1).max() < 5 / np.sqrt(NUM_RESAMPLES)
    assert extra.mean() == pytest.approx(0.5, abs=5 * np.sqrt(0.5 / NUM_RESAMPLES))


def test_interval_of_mean_matches_normal_distribution() -> None:
    sample = np.random.default_rng(3).normal(10, 2, 4000)
    low, high = interval(estimate_mean(sample, UNBOUNDED)) or (0, 0)
    error = sample.std() / np.sqrt(len(sample))
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.25 * error)


def test_zeros_and_ones_have_the_exact_interval() -> None:
    sample = values(*[1] * 17, *[0] * 3)
    assert interval(estimate_mean(sample)) == clopper_pearson_interval(17, 20)
    # Of the samples, some may not count: formulas that cannot be drawn.
    assert interval(estimate_ratio(sample, values(*[1] * 18, 0, 0))) == clopper_pearson_interval(
        17, 18
    )
    # So have those of a metric of the user's own.
    assert interval(estimate_mean(sample, UNBOUNDED)) == clopper_pearson_interval(17, 20)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("samples", [1, 2, 6, 100])
def test_samples_of_equal_value_have_an_interval_with_a_width(value: float, samples: int) -> None:
    low, high = interval(estimate_mean(np.full(samples, value))) or (0, 0)
    assert 0 <= low <= value <= high <= 1
    # The rule of three: in fewer than 3 of 100 samples, an event may go unseen in 100.
    assert high - low > 0.02
    assert high - low < 4.5 / samples


def test_the_widths_near_an_end_do_not_jump() -> None:
    """A mean of values that are almost a proportion has an interval that is almost its."""
    exact = clopper_pearson_interval(19, 20)
    near = interval(estimate_mean(values(*[1.0] * 19, 0.001))) or (0, 0)
    assert tuple(near) == pytest.approx(tuple(exact), abs=0.05)


def test_one_group_of_samples_counts_by_its_size() -> None:
    edits, lengths = values(1, 0, 9), values(10, 10, 1000)
    one = estimate_ratio(edits, lengths, NON_NEGATIVE)
    assert one.score == pytest.approx(10 / 1020)
    low, high = interval(one) or (0, 0)
    assert 0 <= low < one.score < high


def test_an_error_rate_may_be_above_one() -> None:
    one = estimate_ratio(values(*[30] * 10, 4), np.full(11, 10.0), NON_NEGATIVE)
    low, high = interval(one) or (0, 0)
    assert 1 < low < one.score < high
    assert high < 3.01


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (estimate_mean(np.arange(19.0), NON_NEGATIVE), REASON_FEW_SAMPLES_UNBOUNDED),
        (estimate_mean(np.zeros(50), NON_NEGATIVE), REASON_CONSTANT_SCORE),
        (estimate_mean(np.full(50, 2.5), UNBOUNDED), REASON_CONSTANT_SCORE),
        (estimate_ratio(np.zeros(50), np.zeros(50)), REASON_NO_SAMPLES),
    ],
)
def test_missing_interval_has_a_reason(one: ScoreEstimator, reason: str) -> None:
    assert interval(one) is None
    assert one.get_missing_reason() == reason


def test_difference_without_interval_has_a_reason() -> None:
    few, some = np.linspace(0, 1, MIN_SAMPLES - 1), np.linspace(0, 1, MIN_SAMPLES)
    assert (
        get_missing_difference_reason(estimate_mean(few), estimate_mean(few**2))
        == REASON_FEW_SAMPLES
    )
    assert change(estimate_mean(few), estimate_mean(few**2)) is None
    assert get_missing_difference_reason(estimate_mean(some), estimate_mean(some**2)) == ""
    own = estimate_mean(10 * some, UNBOUNDED)
    other = estimate_mean(20 * some, UNBOUNDED)
    assert get_missing_difference_reason(own, other) == REASON_FEW_SAMPLES_UNBOUNDED
    assert other.get_missing_reason() == REASON_FEW_SAMPLES_UNBOUNDED, "the same rule"
    own = estimate_mean(np.arange(20.0), UNBOUNDED)
    assert get_missing_difference_reason(own, own) == REASON_NO_CHANGE
    empty = estimate_ratio(np.zeros(MIN_SAMPLES), np.zeros(MIN_SAMPLES))
    assert get_missing_difference_reason(empty, empty) == REASON_NO_SAMPLES


def test_reasons_state_the_minimum_samples() -> None:
    assert f" {MIN_SAMPLES} " in REASON_FEW_SAMPLES
    assert f" {MIN_SAMPLES_UNBOUNDED} " in REASON_FEW_SAMPLES_UNBOUNDED
    assert f" {MIN_SAMPLES_PER_CLASS} " in REASON_RARE_CLASS


def test_differences_of_zeros_and_ones_have_tangos_interval() -> None:
    was, now = values(0, 0, 0, 1, 1, 0, 1, 0), values(1, 1, 0, 1, 0, 1, 1, 0)
    assert change(estimate_mean(was), estimate_mean(now)) == tango_interval(3, 1, 8)
    # Of five, all agree by chance once in 16 sets: that is shown, and judged elsewhere.
    assert change(estimate_mean(was[:5]), estimate_mean(now[:5])) == tango_interval(2, 1, 5)


def test_scores_that_did_not_change_may_do_so_on_other_samples() -> None:
    same = estimate_mean(np.linspace(0.2, 1, 40))
    low, high = change(same, same) or (0, 0)
    assert -0.1 < low < 0 < high < 0.1


def test_a_small_gain_of_all_samples_is_clear() -> None:
    was = np.linspace(0, 0.9, 30)
    low, high = change(estimate_mean(was), estimate_mean(was + 0.01)) or (0, 0)
    assert 0 < low < 0.01 <= high < 0.02


@pytest.mark.parametrize("samples", [6, 8, 12])
def test_small_samples_rarely_give_false_positives(samples: int) -> None:
    """Of scores that do not differ, some 5 % do; the plain percentile interval says so of 15 %."""
    chance = np.random.default_rng(5)
    normal = chance.normal(size=(600, samples))
    rare = chance.choice([-1.0, 0.0, 1.0], p=[0.3, 0.4, 0.3], size=(600, samples))
    empty = estimate_mean(np.zeros(samples), UNBOUNDED)
    for changes in (normal, rare):
        was = {str(i): empty for i in range(600)}
        now = {str(i): estimate_mean(own, UNBOUNDED) for i, own in enumerate(changes)}
        bounds = [one for one in compute_difference_intervals(was, now).values() if one is not None]
        clear = sum(low > 0 or high < 0 for low, high in bounds)
        assert clear / 600 < 0.065


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_sums_of_groups_are_those_of_a_dense_matrix(share: float) -> None:
    chance = np.random.default_rng(6)
    dense = np.where(chance.random((30, 4, 3)) < share, chance.random((30, 4, 3)), 0.0)
    groups = []
    for index in range(4):
        used = np.flatnonzero(dense[:, index].any(axis=1))
        groups.append(SampleGroup(used, dense[used, index]))
    weights = chance.random((5, 30))
    assert build_grouped_sums(groups, 30)(weights) == pytest.approx(weights @ dense.reshape(30, 12))
    assert build_grouped_sums([], 30)(weights).shape == (5, 0)


def test_intervals_of_twenty_thousand_samples() -> None:
    """No wall clock: the work is bounded by the chunks, whose number does not grow with scores."""
    sample = np.random.default_rng(7).random(20_000)
    low, high = interval(estimate_mean(sample)) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * sample.std() / np.sqrt(20_000), rel=0.1)


def test_zero_over_zero_is_zero() -> None:
    assert safe_divide(values(0, 1), values(0, 2)).tolist() == [0.0, 0.5]
