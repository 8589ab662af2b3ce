"""The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import pytest

from finesight.config import Train
from finesight.errors import UserError
from finesight.train.schedule import Schedule, in_steps


def factors(total: int, **settings: object) -> list[float]:
    schedule = Schedule(Train.model_validate(settings), total)
    return [schedule.factor(step) for step in range(total)]


def test_warm_up_then_cosine() -> None:
    values = factors(14, schedule="cosine", warmup=4)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])


def test_linear_and_constant() -> None:
    assert factors(5, schedule="linear", warmup=0) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(4, schedule="constant", warmup=2) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 100])
def test_every_step_learns(kind: str, total: int) -> None:
    assert all(0 < value <= 1 for value in factors(total, schedule=kind))


def test_shares_round_up() -> None:
    assert in_steps(0.03, 100) == 3
    assert in_steps(0.03, 10) == 1
    assert in_steps(7, 10) == 7


def test_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match="100 steps of warm-up in a run of 50"):
        factors(50, warmup=100)
