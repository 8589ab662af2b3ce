"""Intervals of scores: exact for proportions, else resampled, and the cases without one."""

import numpy as np
import pytest

from finesight.evaluate.bootstrap import (
    MIN_SAMPLES,
    NON_NEGATIVE,
    NUM_RESAMPLES,
    REASON_CONSTANT_SCORE,
    REASON_FEW_SAMPLES,
    REASON_FEW_SAMPLES_UNBOUNDED,
    REASON_NO_CHANGE,
    REASON_NO_SAMPLES,
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
def test_exact_interval_is_that_of_other_programs(successes, trials, expected):
    assert clopper_pearson_interval(successes, trials) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("gained", "lost", "trials", "expected"),
    [
        # Fagerland, Lydersen and Laake 2014, tables 2 and 7: (-0.517, -0.026), (-0.124, -0.0054).
        (1, 7, 21, (-0.5172323, -0.0260030)),
        (6, 16, 161, (-0.1240234, -0.0054334)),
        # By the likelihood's maximum under the restriction, found numerically with scipy 1.17.
        (40, 20, 160, (0.0308645, 0.2180642)),
        (3, 1, 50, (-0.0544250, 0.1461463)),
        (0, 0, 30, (-(1.959964**2) / (30 + 1.959964**2), 1.959964**2 / (30 + 1.959964**2))),
    ],
)
def test_interval_of_pairs_is_that_of_the_literature(gained, lost, trials, expected):
    assert tango_interval(gained, lost, trials) == pytest.approx(expected, abs=1e-6)


def interval(one: ScoreEstimator) -> ConfidenceInterval:
    found = compute_intervals({"score": one})["score"]
    assert found is not None
    return found


def change(was: ScoreEstimator, now: ScoreEstimator) -> ConfidenceInterval:
    found = compute_difference_intervals({"score": was}, {"score": now})["score"]
    assert found is not None
    return found


def values(*value_list: float) -> FloatArray:
    return np.array(value_list, np.float64)


@pytest.mark.parametrize("samples", [1, 50, 30_000])
def test_resamples_are_always_the_same(samples: int) -> None:
    pieces = list(iter_resample_weights(samples))
    assert sum(len(weights) for weights, _ in pieces) == NUM_RESAMPLES
    assert all(len(weights) == len(extra) for weights, extra in pieces)
    weights, extra = next(iter_resample_weights(samples))
    assert (pieces[0][0] == weights).all()
    assert (pieces[0][1] == extra).all()
    if samples == 50:
        # Samples weigh 1 on average, the pseudo-observation half.
        assert abs(weights.mean(axis=0) - 1).max() < 5 / np.sqrt(NUM_RESAMPLES)
        assert extra.mean() == pytest.approx(0.5, abs=5 * np.sqrt(0.5 / NUM_RESAMPLES))


def test_interval_of_mean_matches_normal_distribution() -> None:
    for sample in (
        np.random.default_rng(3).normal(10, 2, 4000),
        np.random.default_rng(7).random(20_000),
    ):
        low, high = interval(estimate_mean(sample, UNBOUNDED))
        error = sample.std() / np.sqrt(len(sample))
        assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.25 * error)
        assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.25 * error)


def test_zeros_and_ones_have_the_exact_interval() -> None:
    sample, exact = values(*[1] * 17, *[0] * 3), clopper_pearson_interval(17, 20)
    assert interval(estimate_mean(sample)) == exact
    assert interval(estimate_mean(sample, UNBOUNDED)) == exact
    # Some samples may not count, such as formulas that cannot be rendered.
    counting = estimate_ratio(sample, values(*[1] * 18, 0, 0))
    assert interval(counting) == clopper_pearson_interval(17, 18)
    # A mean of values that are almost a proportion has almost its interval.
    near = interval(estimate_mean(values(*[1.0] * 19, 0.001)))
    assert tuple(near) == pytest.approx(tuple(clopper_pearson_interval(19, 20)), abs=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("samples", [1, 2, 6, 100])
def test_samples_of_equal_value_have_an_interval_with_a_width(value: float, samples: int) -> None:
    low, high = interval(estimate_mean(np.full(samples, value)))
    assert 0 <= low <= value <= high <= 1
    # The rule of three: in fewer than 3 of 100 samples, an event may go unseen in 100.
    assert 0.02 < high - low < 4.5 / samples


def test_error_rates_count_samples_by_their_size() -> None:
    one = estimate_ratio(values(1, 0, 9), values(10, 10, 1000), NON_NEGATIVE)
    assert one.score == pytest.approx(10 / 1020)
    low, high = interval(one)
    assert 0 <= low < one.score < high
    one = estimate_ratio(values(*[30] * 10, 4), np.full(11, 10.0), NON_NEGATIVE)
    low, high = interval(one)
    assert 1 < low < one.score < high < 3.01


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
    assert compute_intervals({"score": one}) == {"score": None}
    assert one.get_missing_reason() == reason


FEW, SOME = np.linspace(0, 1, MIN_SAMPLES - 1), np.linspace(0, 1, MIN_SAMPLES)
MANY = estimate_mean(np.arange(20.0), UNBOUNDED)
EMPTY = estimate_ratio(np.zeros(MIN_SAMPLES), np.zeros(MIN_SAMPLES))


@pytest.mark.parametrize(
    ("was", "now", "reason"),
    [
        (estimate_mean(FEW), estimate_mean(FEW**2), REASON_FEW_SAMPLES),
        (estimate_mean(SOME), estimate_mean(SOME**2), ""),
        (
            estimate_mean(SOME, UNBOUNDED),
            estimate_mean(2 * SOME, UNBOUNDED),
            REASON_FEW_SAMPLES_UNBOUNDED,
        ),
        (MANY, MANY, REASON_NO_CHANGE),
        (EMPTY, EMPTY, REASON_NO_SAMPLES),
    ],
)
def test_difference_without_interval_has_a_reason(was, now, reason):
    assert get_missing_difference_reason(was, now) == reason
    found = compute_difference_intervals({"score": was}, {"score": now})["score"]
    assert (found is None) == bool(reason)


def test_intervals_of_no_change_and_of_a_small_gain() -> None:
    same = estimate_mean(np.linspace(0.2, 1, 40))
    low, high = change(same, same)
    assert -0.1 < low < 0 < high < 0.1
    was = np.linspace(0, 0.9, 30)
    low, high = change(estimate_mean(was), estimate_mean(was + 0.01))
    assert 0 < low < 0.01 <= high < 0.02


@pytest.mark.parametrize("samples", [6, 8, 12])
def test_small_samples_rarely_give_false_positives(samples: int) -> None:
    """Of equal scores, some 5 % seem to differ; with the plain percentile interval 15 %."""
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
    assert safe_divide(values(0, 1), values(0, 2)).tolist() == [0.0, 0.5]
