from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finesight.evaluate.bootstrap import Interval
from finesight.train.measure import Measured, waited


def _measured(*scores: float, headline: str | None = "exact") -> list[Measured]:
    steps = enumerate(scores, start=1)
    return [Measured(step, 1.0, {"exact": s, "cer": 0.5}, headline) for step, s in steps]


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
def test_waiting_counts_measurements_since_a_better_one(scores, expected):
    assert waited(_measured(*scores)) == expected


def test_of_equal_scores_the_lower_loss_is_better_and_the_base_does_not_count():
    base, *trained = _measured(0.9, 0.1, 0.2, 0.3)
    assert waited([replace(base, step=0), *trained]) == 0
    falling = [replace(one, held_out_loss=1 / one.step) for one in _measured(0.2, 0.2, 0.2)]
    assert waited(falling) == 0
    assert waited([*falling, replace(falling[0], step=4)]) == 1


def test_without_a_metric_and_after_another_one_nobody_waits():
    assert waited(_measured(0.2, 0.1, headline=None)) == 0
    assert waited([]) == 0
    assert waited([*_measured(0.9, 0.8), *_measured(0.5, headline="cer")]) == 0


def test_a_measurement_is_read_as_it_was_noted():
    measured = Measured(
        7, 1.25, {"exact": 0.5}, "exact", {"exact": Interval(0.25, 0.75)}, {"confusion": []}
    )
    assert Measured.read(json.loads(json.dumps(measured.as_json()))) == measured
    assert measured.score == 0.5
    assert Measured.read({"step": 3, "loss": 1.0}) is None


def test_a_line_of_an_earlier_release_has_no_intervals():
    line = {"step": 0, "held_out_loss": 2.0, "scores": {"exact": 0.0}, "headline": "exact"}
    measured = Measured.read(line)
    assert measured is not None
    assert (measured.intervals, measured.details) == ({}, {})
