"""Evaluations of a run: the best one, comparable samples, and their records."""

from dataclasses import replace

import pytest

from finesight.evaluate.eval_result import EvalResult, find_best_eval, select_eval_samples


def make_results(*scores: float, metric: str | None = "exact") -> list[EvalResult]:
    steps = enumerate(scores, start=1)
    return [EvalResult(step, 1.0, {"exact": s, "cer": 0.5}, metric) for step, s in steps]


def test_patience_counts_evaluations_since_best():
    for scores, expected in (
        ((0.1, 0.2), 0),
        ((0.2, 0.1), 1),
        ((0.2, 0.2, 0.2), 2),
        ((0.1, 0.3, 0.2, 0.3), 2),
    ):
        assert find_best_eval(make_results(*scores))[1] == expected
    base, *trained = make_results(0.9, 0.1, 0.2, 0.3)
    assert find_best_eval([replace(base, step=0), *trained])[1] == 0
    # Equal scores prefer the lower loss.
    falling = [replace(one, validation_loss=1 / one.step) for one in make_results(0.2, 0.2, 0.2)]
    assert find_best_eval(falling)[1] == 0
    assert find_best_eval([*falling, replace(falling[0], step=4)])[1] == 1
    # Patience needs a consistent metric.
    assert find_best_eval([]) == (None, 0)
    assert find_best_eval([*make_results(0.9, 0.8), *make_results(0.5, metric="cer")])[1] == 0


def test_evaluations_of_other_samples_are_not_compared():
    first, second, third = (
        replace(one, num_samples=64, num_loss_samples=64) for one in make_results(0.9, 0.3, 0.2)
    )
    first = replace(first, num_samples=9)
    assert find_best_eval([first, second, third]) == (second, 1)
    lower_loss = replace(second, step=4, validation_loss=0.5, num_loss_samples=200)
    assert find_best_eval([second, lower_loss]) == (second, 1)
    # An equal number of other samples.
    other = replace(second, step=5, sample_set="0af1")
    assert find_best_eval([second, lower_loss, other]) == (other, 0)
    assert lower_loss.as_best_eval().is_better_than(first.as_best_eval())


@pytest.mark.parametrize("limit", [1, 64, 500, 1000, None])
def test_common_subset_is_fixed_random_and_nested(limit):
    indices = [*range(0, 3000, 3)]
    chosen = select_eval_samples(indices, limit)
    assert len(chosen) == (limit or 1000)
    assert chosen == sorted({*chosen} & {*indices})
    assert {*select_eval_samples(indices, 1)} <= {*chosen}
    assert select_eval_samples(chosen, 1) == select_eval_samples(indices, 1)
    # An index keeps its place if other samples are skipped.
    fewer = [index for index in indices if index in chosen or index % 2]
    assert {*select_eval_samples(fewer, limit)} >= {*chosen}
    if limit and 1 < limit < 1000:
        assert 1000 < sum(chosen) / limit < 2000, "not the first rows"
