from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finesight.evaluate.bootstrap import ConfidenceInterval
from finesight.evaluate.eval_case import select_eval_samples
from finesight.train.evaluation import EvalResult, find_best_eval


def _measured(*scores: float, headline: str | None = "exact") -> list[EvalResult]:
    steps = enumerate(scores, start=1)
    return [EvalResult(step, 1.0, {"exact": s, "cer": 0.5}, headline) for step, s in steps]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.5,), 0),
        ((0.1, 0.2), 0),
        ((0.2, 0.1), 1),
        ((0.2, 0.2, 0.2), 2),
        ((0.1, 0.3, 0.2, 0.3), 2),
    ],
)
def test_patience_counts_evaluations_since_best(scores, expected):
    assert find_best_eval(_measured(*scores))[1] == expected


def test_equal_scores_prefer_lower_loss():
    base, *trained = _measured(0.9, 0.1, 0.2, 0.3)
    assert find_best_eval([replace(base, step=0), *trained])[1] == 0
    falling = [replace(one, validation_loss=1 / one.step) for one in _measured(0.2, 0.2, 0.2)]
    assert find_best_eval(falling)[1] == 0
    assert find_best_eval([*falling, replace(falling[0], step=4)])[1] == 1


def test_patience_needs_a_consistent_metric():
    assert find_best_eval([]) == (None, 0)
    assert find_best_eval([*_measured(0.9, 0.8), *_measured(0.5, headline="cer")])[1] == 0


def test_evaluations_of_other_samples_are_not_compared():
    first, second, third = (
        replace(one, num_samples=64, num_loss_samples=64) for one in _measured(0.9, 0.3, 0.2)
    )
    assert find_best_eval([replace(first, num_samples=9), second, third]) == (second, 1)
    lower_loss = replace(second, step=4, validation_loss=0.5, num_loss_samples=200)
    assert find_best_eval([second, lower_loss]) == (second, 1)
    # An equal number of other samples.
    other = replace(second, step=5, sample_set="0af1")
    assert find_best_eval([second, lower_loss, other]) == (other, 0)
    assert lower_loss.as_best_eval().is_better_than(replace(first, num_samples=9).as_best_eval())


@pytest.mark.parametrize("limit", [1, 64, 500, 1000, None])
def test_common_subset_is_fixed_random_and_nested(limit):
    indices = [*range(0, 3000, 3)]
    chosen = select_eval_samples(indices, limit)
    assert len(chosen) == min(limit or 1000, 1000)
    assert chosen == sorted({*chosen} & {*indices})
    assert {*select_eval_samples(indices, 1)} <= {*chosen}
    assert select_eval_samples(chosen, 1) == select_eval_samples(indices, 1)
    # An index keeps its place if other samples are skipped.
    fewer = [index for index in indices if index in chosen or index % 2]
    assert {*select_eval_samples(fewer, limit)} >= {*chosen}
    if limit and 1 < limit < 1000:
        assert 1000 < sum(chosen) / limit < 2000, "not the first rows"


def test_evaluation_record_roundtrip():
    measured = EvalResult(
        7,
        1.25,
        {"exact": 0.5},
        "exact",
        {"exact": ConfidenceInterval(0.25, 0.75)},
        {"confusion": []},
        num_samples=20,
        num_loss_samples=30,
        sample_set="0af1",
        full=EvalResult(7, 1.5, {"exact": 0.25}, "exact", num_samples=40),
    )
    assert EvalResult.from_metrics(json.loads(json.dumps(measured.as_json()))) == measured
    assert measured.primary_score == 0.5
    assert EvalResult.from_metrics({"step": 3, "loss": 1.0}) is None


def test_old_record_has_no_intervals():
    line = {"step": 0, "validation_loss": 2.0, "scores": {"exact": 0.0}, "primary_metric": "exact"}
    measured = EvalResult.from_metrics(line)
    assert (measured.intervals, measured.details) == ({}, {})
