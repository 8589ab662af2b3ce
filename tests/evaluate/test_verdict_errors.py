"""How often equal scores get a verdict: seeded simulations of pages, guards and searches.

The decision functions are those of the commands. Answers of two models to a sample are independent
draws of the same distribution, which depends on the sample.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from finesight.evaluate import metric_difference
from finesight.evaluate.bootstrap import ScoreEstimator, estimate_mean, estimate_ratio
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.metric_difference import compare_family
from finesight.evaluate.regression_guard import DROPPED, LoadedGroup, compare_answers, load_suite
from finesight.evaluate.verdict import FAMILY_ERROR, PValues, find_clear_differences
from finesight.infer.prediction import Prediction
from finesight.launch.trial_search import compare_primary


def compute_most(num_pages: int) -> float:
    """Return a share of pages that not one in 1,000 simulations exceeds by chance."""
    return FAMILY_ERROR + 3.1 * math.sqrt(FAMILY_ERROR * (1 - FAMILY_ERROR) / num_pages)


PRIMARY = "score_0"


def draw_model(
    rng: np.random.Generator,
    kind: str,
    difficulties_N: np.ndarray,
    num_metrics: int,
    shifts: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, ScoreEstimator]:
    """Draw the correlated scores of a model: proportions, skewed means, or ratios of sums.

    Args:
        shifts: Increase of the scores of each sample by metric, before they are clipped to 0 to 1.
    """
    num_samples = len(difficulties_N)
    answers_N = difficulties_N + rng.normal(size=num_samples)
    sizes_N = np.ceil(np.exp(difficulties_N))
    estimators = {}
    for index in range(num_metrics):
        # About 40 % zeros and 25 % ones.
        name = f"score_{index}"
        offset = 0.3 + shifts.get(name, 0.0)
        values_N = np.clip((answers_N + rng.normal(size=num_samples)) / 2 + offset, 0, 1)
        if kind == "binary":
            estimators[name] = estimate_mean(np.round(values_N))
        elif kind == "skewed":
            estimators[name] = estimate_mean(values_N)
        else:
            predicted_N = sizes_N + rng.poisson(1.0, num_samples)
            correct_N = np.round(values_N * sizes_N)
            estimators[name] = estimate_ratio(2 * correct_N, sizes_N + predicted_N)
    return estimators


def count_pages(
    kind: str,
    num_samples: int,
    num_metrics: int,
    num_pages: int,
    shifts_by_run: Sequence[Mapping[str, float]],
) -> int:
    """Count the pages with a verdict on a metric of a run that equals that of the baseline.

    Args:
        shifts_by_run: Metrics of each further run that differ; see `draw_model`.
    """
    rng = np.random.default_rng([num_samples, num_metrics, len(shifts_by_run)])
    num_found = 0
    for _ in range(num_pages):
        difficulties_N = rng.normal(size=num_samples)
        baseline = draw_model(rng, kind, difficulties_N, num_metrics)
        pairs = []
        for shifts in shifts_by_run:
            pairs.append((baseline, draw_model(rng, kind, difficulties_N, num_metrics, shifts)))
        is_wrong = False
        for differences, shifts in zip(compare_family(pairs, PRIMARY), shifts_by_run, strict=True):
            for one in differences:
                is_clear = one.verdict in ("better", "worse")
                assert not is_clear or one.low * one.high > 0
                assert one.verdict != "no clear change" or one.low <= 0 <= one.high
                is_wrong |= is_clear and one.name not in shifts
        num_found += is_wrong
    return num_found


EQUAL_RUNS: dict[str, list[dict[str, float]]] = {
    "all equal": [{}, {}],
    "primary metric changed": [{PRIMARY: 0.6}, {}],
    "others changed": [{"score_1": 0.6, "score_2": 0.6}, {PRIMARY: 0.6, "score_3": 0.6}],
}
"""Metrics that differ of each run of a page, by name of the case."""


@pytest.mark.parametrize("case", EQUAL_RUNS)
@pytest.mark.parametrize("kind", ["binary", "skewed"])
def test_equal_scores_rarely_get_a_verdict(kind: str, case: str) -> None:
    num_pages = 100
    found = count_pages(kind, 30, 4, num_pages, EQUAL_RUNS[case])
    assert found <= compute_most(num_pages) * num_pages


def find_each_difference(
    comparisons: Sequence[PValues], primary: str = "", num_others: int = 0
) -> list[set[str]]:
    """Test every difference at the full level, without a rule for families."""
    clear = []
    for p_values in comparisons:
        clear.append({name for name, one in p_values.items() if one is not None and one <= 0.05})
    return clear


def find_after_primary(
    comparisons: Sequence[PValues], primary: str = "", num_others: int = 0
) -> list[set[str]]:
    """Test the metrics after the primary one at the full level each, without Holm's rule."""
    clear = []
    for names in find_each_difference(comparisons):
        clear.append(names if primary in names else set())
    return clear


@pytest.mark.parametrize(
    ("rule", "case"),
    [(find_each_difference, "all equal"), (find_after_primary, "primary metric changed")],
)
def test_simulation_detects_a_missing_rule(
    monkeypatch: pytest.MonkeyPatch,
    rule: Callable[[Sequence[PValues], str, int], list[set[str]]],
    case: str,
) -> None:
    monkeypatch.setattr(metric_difference, "find_clear_differences", rule)
    num_pages = 150
    found = count_pages("binary", 100, 8, num_pages, EQUAL_RUNS[case])
    assert found > compute_most(num_pages) * num_pages


def test_primary_metric_has_the_power_of_a_single_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100 samples, five scores are about 10 points higher."""

    def count_clear_pages() -> int:
        rng = np.random.default_rng(11)
        num_clear = 0
        shifts = {f"score_{index}": 0.22 for index in range(5)}
        for _ in range(150):
            difficulties_N = rng.normal(size=100)
            before = draw_model(rng, "binary", difficulties_N, 5)
            after = draw_model(rng, "binary", difficulties_N, 5, shifts)
            primary, *_ = compare_family([(before, after)], PRIMARY)[0]
            num_clear += primary.verdict == "better"
        return num_clear

    found = count_clear_pages()
    monkeypatch.setattr(
        metric_difference,
        "find_clear_differences",
        lambda comparisons, primary, num_others: find_clear_differences(comparisons),
    )
    assert found > 1.4 * count_clear_pages()


PAGES_BY_SIZE = {
    "binary": {8: 1000, 30: 1000, 100: 1000, 400: 800, 2000: 400},
    "skewed": {8: 400, 30: 300, 100: 200, 400: 100, 2000: 40},
    "ratio": {8: 400, 30: 300, 100: 200, 400: 100, 2000: 40},
}


@pytest.mark.fuzz
@pytest.mark.parametrize("num_changed", [0, 1])
@pytest.mark.parametrize(("num_metrics", "num_runs"), [(1, 1), (8, 1), (2, 7)])
@pytest.mark.parametrize("num_samples", [8, 30, 100, 400, 2000])
@pytest.mark.parametrize("kind", PAGES_BY_SIZE)
def test_pages_rarely_have_a_verdict_on_equal_scores(
    kind: str, num_samples: int, num_metrics: int, num_runs: int, num_changed: int
) -> None:
    """The primary metric of the first run has changed, or that of no run."""
    shifts_by_run = [{PRIMARY: 0.6}] * num_changed + [{}] * (num_runs - num_changed)
    num_pages = PAGES_BY_SIZE[kind][num_samples]
    found = count_pages(kind, num_samples, num_metrics, num_pages, shifts_by_run)
    assert found <= compute_most(num_pages) * num_pages


def load_groups(
    folder: Path, metric: str, num_samples: int, allowed_drop: float
) -> list[LoadedGroup]:
    questions = ", ".join(["{prompt: Say right., answer: right}"] * num_samples)
    group = f"{{metric: {metric}, questions: [{questions}], allowed_drop: {allowed_drop}}}"
    file = folder / "suite.yaml"
    file.write_text("groups:\n" + "".join(f"  group-{n}: {group}\n" for n in range(4)))
    return load_suite(file)


def draw_predictions(
    rng: np.random.Generator, metric: str, num_samples: int, accuracy: float
) -> list[Prediction]:
    """Draw answers with a mean score of `accuracy` for both metrics."""
    predictions = []
    for index in range(num_samples):
        num_correct = 5 * (rng.random() < accuracy)
        if metric == "ocr":
            num_correct = rng.binomial(5, accuracy)
        answer = "right"[:num_correct].ljust(5, "?")
        predictions.append(Prediction(f"q{index}", (), "", answer, answer, (), 1, "stop"))
    return predictions


@pytest.mark.parametrize("allowed_drop", [0.0, 0.1])
@pytest.mark.parametrize(("num_samples", "num_suites"), [(8, 400), (32, 200), (100, 100)])
@pytest.mark.parametrize("metric", ["classification", "ocr"])
def test_guard_rarely_fails_an_allowed_drop(
    tmp_path: Path, metric: str, num_samples: int, num_suites: int, allowed_drop: float
) -> None:
    rng = np.random.default_rng(num_samples)
    groups = load_groups(tmp_path, metric, num_samples, allowed_drop)
    num_failed = 0
    for _ in range(num_suites):
        before = [draw_predictions(rng, metric, num_samples, 0.8) for _ in groups]
        after = [draw_predictions(rng, metric, num_samples, 0.8 - allowed_drop) for _ in groups]
        results = compare_answers(groups, before, after)
        num_failed += any(DROPPED in one.problems for one in results)
    assert num_failed <= compute_most(num_suites) * num_suites


def count_changed_choices(num_samples: int, num_trials: int, num_searches: int) -> int:
    """Count the searches that choose another trial than the recipe, though all are equal."""
    rng = np.random.default_rng([num_samples, num_trials])
    num_changed = 0
    for _ in range(num_searches):
        difficulties_N = rng.uniform(size=num_samples)
        trials = []
        for _ in range(num_trials + 1):
            cases = []
            for index, is_correct in enumerate(rng.uniform(size=num_samples) < difficulties_N):
                answer = "a" if is_correct else "b"
                cases.append(EvalCase(answer, (), ("ab"[index % 2],), (), str(index)))
            trials.append(cases)
        recipe, *others = trials
        # A third of the trials is complete: the best ones, as if rungs predicted the final score.
        others.sort(key=lambda cases: -sum(one.answer == one.references[0] for one in cases))
        complete = others[: max(1, num_trials // 3)]
        differences = compare_primary(
            "classification", recipe, complete, num_trials - len(complete)
        )
        num_changed += any(one.verdict == "better" for one in differences)
    return num_changed


def test_equal_trials_are_rarely_chosen() -> None:
    num_searches = 150
    num_changed = count_changed_choices(30, num_trials=8, num_searches=num_searches)
    assert num_changed <= compute_most(num_searches) * num_searches


@pytest.mark.parametrize(
    ("num_samples", "num_trials", "num_searches"), [(30, 1, 1000), (100, 8, 500), (400, 20, 100)]
)
def test_search_rarely_leaves_the_recipe_for_an_equal_trial(
    num_samples: int, num_trials: int, num_searches: int
) -> None:
    num_changed = count_changed_choices(num_samples, num_trials, num_searches)
    assert num_changed <= compute_most(num_searches) * num_searches
