"""Tests of paired differences, Holm's rule, and intervals that agree with verdicts."""

import itertools
import math

import numpy as np
import pytest

from finesight.evaluate.bootstrap import ScoreEstimator, estimate_mean, estimate_ratio
from finesight.evaluate.metric_difference import compare_estimators, compare_family
from finesight.evaluate.verdict import (
    compute_mcnemar_p_value,
    compute_normal_p_value,
    compute_p_values,
    find_clear_differences,
)


@pytest.mark.parametrize(("gained", "lost"), [(4, 0), (0, 6), (9, 1), (3, 3), (20, 31), (450, 550)])
def test_mcnemar_p_value_is_exact(gained: int, lost: int) -> None:
    total = gained + lost
    tail = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    expected = min(1.0, 2 * tail / 2**total)
    assert compute_mcnemar_p_value(gained, lost) == pytest.approx(expected)


def test_mcnemar_p_value_of_many_changes_is_normal() -> None:
    expected = math.erfc((700 - 1) / math.sqrt(2 * 140_700))  # with correction for continuity
    assert compute_mcnemar_p_value(70_000, 70_700) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.05], [True]),
        ([0.03, 0.03], [False, False]),
        ([0.03, 0.02], [True, True]),  # 0.02 < 0.05 / 2, then 0.03 < 0.05
        ([0.04, 0.02, 0.03], [False, False, False]),
        ([0.04, 0.01, 0.03], [False, True, False]),  # 0.03 > 0.05 / 2 ends the steps
        ([0.04, None, None], [True, False, False]),  # differences that are never clear
        ([], []),
    ],
)
def test_holm_rule(p_values, expected):
    assert find_clear_differences(p_values) == expected


def estimate_scores(rng: np.random.Generator, num_samples: int) -> dict[str, ScoreEstimator]:
    sizes = rng.integers(1, 9, num_samples).astype(float)
    ratio = estimate_ratio(rng.binomial(9, 0.5, num_samples) / 9 * sizes, sizes)
    return {"mean": estimate_mean(rng.beta(0.4, 0.4, num_samples)), "ratio": ratio}


def test_permutation_test_has_all_swaps_of_few_samples() -> None:
    rng = np.random.default_rng(3)
    before = estimate_scores(rng, 7)
    after = estimate_scores(rng, 7)
    found = compute_p_values(before, after, num_tests=2)
    for name, p_value in found.items():
        old = before[name].weighted_sums(np.eye(7))
        new = after[name].weighted_sums(np.eye(7))
        changes = []
        for swaps in itertools.product([False, True], repeat=7):
            is_swapped = np.array(swaps)[:, None]
            sums = [np.where(is_swapped, *pair).sum(axis=0) for pair in ((new, old), (old, new))]
            left, right = (before[name].score_from_sums(one[None])[0] for one in sums)
            changes.append(abs(right - left))
        is_larger = np.array(changes) >= changes[0] - 1e-9
        assert p_value == is_larger.mean(), name


def test_tests_agree_on_many_samples() -> None:
    """The permutation test is the test of McNemar for proportions, and Student's for means."""
    rng = np.random.default_rng(4)
    before = rng.random(500) < 0.5
    after = rng.random(500) < 0.58
    # With three samples of other values, the mean is no proportion.
    values = [np.append(one.astype(float), [0.5, 0.5, 0.5]) for one in (before, after)]
    exact = compute_p_values(*({"a": estimate_mean(one[:-3])} for one in values), num_tests=1)["a"]
    swapped = compute_p_values(*({"a": estimate_mean(one)} for one in values), num_tests=1)["a"]
    assert exact is not None
    assert swapped == pytest.approx(exact, abs=0.02)
    differences = values[1] - values[0]
    margin = 1.96 * differences.std() / math.sqrt(len(differences))
    normal = compute_normal_p_value(differences.mean(), margin)
    assert swapped == pytest.approx(normal, abs=0.02)


@pytest.mark.parametrize(
    ("gained", "verdict"), [(0, "no clear change"), (5, "no clear change"), (6, "better")]
)
def test_few_gained_answers_are_no_clear_change(gained: int, verdict: str) -> None:
    """Tango's interval excludes 0 for four gained answers, the exact test needs six."""
    before = estimate_mean(np.zeros(40))
    after = estimate_mean((np.arange(40) < gained).astype(float))
    (one,) = compare_estimators({"accuracy": before}, {"accuracy": after})
    assert one.verdict == verdict
    assert one.low is not None
    assert (one.low > 0) == (verdict == "better")


def test_differences_of_a_family_are_tested_together() -> None:
    before = {"accuracy": estimate_mean(np.zeros(40))}
    better = {"accuracy": estimate_mean((np.arange(40) < 6).astype(float))}
    pairs = [(before, better)]
    assert compare_family(pairs)[0][0].verdict == "better"
    assert compare_family(pairs, num_others=1)[0][0].verdict == "no clear change"
    (first,), (second,) = compare_family(pairs * 2)
    assert first.verdict == second.verdict == "no clear change"
    assert first.low == 0
    # An unchanged score cannot be clear, so it does not count.
    (first,), (second,) = compare_family([*pairs, (before, before)])
    assert (first.verdict, second.verdict) == ("better", "no clear change")
    assert second.p_value is None


def test_many_differences_can_be_clear() -> None:
    """Swaps are as many as the first step of Holm's rule needs."""
    rng = np.random.default_rng(5)
    before = {f"score_{index}": estimate_mean(rng.random(60) / 2) for index in range(200)}
    after = {f"score_{index}": estimate_mean(rng.random(60) / 2 + 0.5) for index in range(200)}
    assert {one.verdict for one in compare_estimators(before, after)} == {"better"}
