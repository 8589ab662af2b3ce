from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finesight.evaluate.bootstrap import ConfidenceInterval
from finesight.train.evaluation import EvalResult, count_evals_since_best


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
    assert count_evals_since_best(_measured(*scores)) == expected


def test_equal_scores_prefer_lower_loss():
    base, *trained = _measured(0.9, 0.1, 0.2, 0.3)
    assert count_evals_since_best([replace(base, step=0), *trained]) == 0
    falling = [replace(one, validation_loss=1 / one.step) for one in _measured(0.2, 0.2, 0.2)]
    assert count_evals_since_best(falling) == 0
    assert count_evals_since_best([*falling, replace(falling[0], step=4)]) == 1


def test_patience_needs_a_consistent_metric():
    assert count_evals_since_best(_measured(0.2, 0.1, headline=None)) == 0
    assert count_evals_since_best([]) == 0
    assert count_evals_since_best([*_measured(0.9, 0.8), *_measured(0.5, headline="cer")]) == 0


def test_evaluation_record_roundtrip():
    measured = EvalResult(
        7,
        1.25,
        {"exact": 0.5},
        "exact",
        {"exact": ConfidenceInterval(0.25, 0.75)},
        {"confusion": []},
    )
    assert EvalResult.from_metrics(json.loads(json.dumps(measured.as_json()))) == measured
    assert measured.primary_score == 0.5
    assert EvalResult.from_metrics({"step": 3, "loss": 1.0}) is None


def test_old_record_has_no_intervals():
    line = {"step": 0, "validation_loss": 2.0, "scores": {"exact": 0.0}, "primary_metric": "exact"}
    measured = EvalResult.from_metrics(line)
    assert (measured.intervals, measured.details) == ({}, {})
