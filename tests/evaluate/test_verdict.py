"""Tests of paired differences, Holm's rule, and intervals that agree with verdicts."""

import itertools
import math

import numpy as np
import pytest

from finesight.evaluate.bootstrap import (
    UNBOUNDED,
    ScoreEstimator,
    estimate_mean,
    estimate_ratio,
)
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import (
    NOTE_UNTESTED,
    compare_estimators,
    compare_family,
    pair_estimators,
)
from finesight.evaluate.verdict import (
    MIN_SWAPS,
    compute_mcnemar_p_value,
    compute_normal_p_value,
    compute_p_values,
    find_clear_differences,
    judge_difference,
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
    metrics = {f"score_{index}": p_value for index, p_value in enumerate(p_values)}
    (clear,) = find_clear_differences([metrics])
    assert [name in clear for name in metrics] == expected
    # Comparisons of one metric each get the same verdicts.
    comparisons = [{"score": p_value} for p_value in p_values]
    assert [bool(one) for one in find_clear_differences(comparisons)] == expected


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        ([{"main": 0.05, "a": 0.03, "b": 0.02}], ["main a b"]),  # 0.02 < 0.05 / 2, 0.03 < 0.05
        ([{"main": 0.05, "a": 0.03, "b": 0.03}], ["main"]),
        ([{"main": 0.06, "a": 1e-9}], [""]),
        # Without a primary metric that can be tested, Holm's rule applies to all others.
        ([{"main": None, "a": 0.03, "b": 0.02}], ["a b"]),
        ([{"a": 0.03, "b": 0.03}], [""]),
        # Each of two comparisons has 0.025. The share of one with clear metrics goes to the other.
        ([{"main": 0.02, "a": 0.5}, {"main": 0.04, "a": 0.5}], ["main", ""]),
        ([{"main": 0.02, "a": 0.02}, {"main": 0.04, "a": 0.04}], ["main a", "main a"]),
        # The unchanged run does not count. The unclear one does not hide metrics of the other.
        ([{"main": 0.5, "a": 0.5}, {"main": 0.02, "a": 0.02}, {"main": None}], ["", "main a", ""]),
    ],
)
def test_primary_metric_is_tested_first(comparisons, expected):
    found = find_clear_differences(comparisons, "main")
    assert found == [set(one.split()) for one in expected]


def test_further_comparisons_have_their_share() -> None:
    for num_others, expected in ((0, {"a"}), (1, {"a"}), (2, set())):
        assert find_clear_differences([{"a": 0.02}], num_others=num_others) == [expected]


def test_scores_without_a_test_keep_their_interval() -> None:
    """The primary score has no clear change, so the others have no verdict."""
    pairs = {"main": (np.arange(30) % 2, np.arange(30) < 16), "exact": (np.zeros(30), np.ones(30))}
    before, after = (
        {name: estimate_mean(one[i].astype(float)) for name, one in pairs.items()} for i in (0, 1)
    )
    main, exact = compare_estimators(before, after, "main")
    assert main.verdict == "no clear change"
    assert (exact.verdict, exact.note) == ("", NOTE_UNTESTED)
    assert exact.low is not None
    assert exact.low > 0
    (alone,) = compare_estimators({"exact": before["exact"]}, {"exact": after["exact"]}, "main")
    assert (alone.verdict, alone.low) == ("better", exact.low)


def test_primary_score_without_a_verdict_opens_no_tests() -> None:
    """Its change is significant, but its interval excludes 0 by less than is displayed."""
    values = np.random.default_rng(6).random(60) / 2
    before = {"main": estimate_mean(values), "other": estimate_mean(values)}
    after = {"main": estimate_mean(values + 2e-5), "other": estimate_mean(values + 0.2)}
    main, other = compare_estimators(before, after, "main")
    assert main.p_value is not None
    assert main.p_value < 0.01
    assert main.verdict == "no clear change"
    assert other.verdict == ""


def estimate_scores(rng: np.random.Generator, num_samples: int) -> dict[str, ScoreEstimator]:
    sizes = rng.integers(1, 9, num_samples).astype(float)
    ratio = estimate_ratio(rng.binomial(9, 0.5, num_samples) / 9 * sizes, sizes)
    return {"mean": estimate_mean(rng.beta(0.4, 0.4, num_samples)), "ratio": ratio}


def test_permutation_test_has_all_swaps_of_few_samples() -> None:
    rng = np.random.default_rng(3)
    before = estimate_scores(rng, 7)
    after = estimate_scores(rng, 7)
    found = compute_p_values(before, after, MIN_SWAPS)
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
    proportions = [{"a": estimate_mean(one[:-3])} for one in values]
    means = [{"a": estimate_mean(one)} for one in values]
    exact = compute_p_values(*proportions, MIN_SWAPS)["a"]
    swapped = compute_p_values(*means, MIN_SWAPS)["a"]
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


@pytest.mark.parametrize(
    ("interval", "is_clear", "expected"),
    [
        ((0.1, 0.3), True, ((0.1, 0.3), "better")),
        ((-0.3, -0.1), True, ((-0.3, -0.1), "worse")),
        ((0.1, 0.3), False, ((0.0, 0.3), "no clear change")),
        ((-0.1, 0.3), True, ((-0.1, 0.3), "no clear change")),
        ((-0.3, -0.1), False, ((-0.3, 0.0), "no clear change")),
        # A difference that is displayed as 0.0000.
        ((1e-5, 4e-5), True, ((0.0, 4e-5), "no clear change")),
    ],
)
def test_interval_and_verdict_agree(interval, is_clear, expected):
    assert judge_difference(interval, is_clear=is_clear) == expected
    opposite = {"better": "worse", "worse": "better"}.get(expected[1], expected[1])
    found = judge_difference(interval, is_clear=is_clear, lower_is_better=True)
    assert found == (expected[0], opposite)


def test_clear_difference_that_is_not_visible_has_an_interval_with_zero() -> None:
    rng = np.random.default_rng(6)
    values = rng.random(60) / 2
    (one,) = compare_estimators(
        {"similarity": estimate_mean(values)}, {"similarity": estimate_mean(values + 2e-5)}
    )
    assert one.p_value is not None
    assert one.p_value < 0.01
    assert one.verdict == "no clear change"
    assert one.low == 0


def test_scores_of_nan_are_never_clear() -> None:
    values = np.linspace(0, 1, 30)
    after = np.append(values[1:], np.nan)
    found = compute_p_values({"a": estimate_mean(values)}, {"a": estimate_mean(after)}, MIN_SWAPS)
    assert found == {"a": 1.0}


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_permutation_test_does_not_depend_on_the_scale(scale: float) -> None:
    rng = np.random.default_rng(7)
    values = rng.random(30), rng.random(30) + 0.4
    before, after = ({"a": estimate_mean(one * scale, UNBOUNDED)} for one in values)
    p_value = compute_p_values(before, after, MIN_SWAPS)["a"]
    assert p_value is not None
    assert p_value < 0.01


def list_answers(form: str, answers: str) -> list[EvalCase]:
    """Build samples with two references, of which answers choose one."""
    references = tuple(form.format(name) for name in "ab")
    return [EvalCase(form.format(one), (), references, (), str(n)) for n, one in enumerate(answers)]


@pytest.mark.parametrize(
    ("metric", "form"), [("classification", "{}"), ("json", '{{"{}": "1", "c": "1"}}')]
)
def test_macro_f1_with_several_references_is_tested(metric: str, form: str) -> None:
    """The columns of the sums do not depend on the reference that an answer matches."""
    before = list_answers(form, "z" * 12 + "b" * 12)
    after = list_answers(form, "a" * 24)
    old, new = pair_estimators(metric, before, after)
    assert old["f1_macro"].pseudo_sums.shape == new["f1_macro"].pseudo_sums.shape
    p_value = compute_p_values(old, new, MIN_SWAPS)["f1_macro"]
    assert p_value is not None
    assert p_value < 0.05
    # The mean does not include the class or field that no answer matches.
    assert new["f1_macro"].score == 1
    assert not new["f1_macro"].undefined_reason
