"""The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import pytest

from finesight.config import TrainSettings
from finesight.errors import UserError
from finesight.train.optimizer import LRSchedule, resolve_steps


def factors(total: int, **settings: object) -> list[float]:
    schedule = LRSchedule(TrainSettings.model_validate(settings), total)
    return [schedule.lr_factor(step) for step in range(total)]


def test_warmup_then_cosine() -> None:
    values = factors(14, lr_schedule="cosine", warmup=4)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)])


def test_linear_and_constant() -> None:
    assert factors(5, lr_schedule="linear", warmup=0) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert factors(4, lr_schedule="constant", warmup=2) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 100])
def test_every_step_has_a_positive_rate(kind: str, total: int) -> None:
    assert all(0 < value <= 1 for value in factors(total, lr_schedule=kind))


def test_fractions_round_up() -> None:
    assert resolve_steps(0.03, 100) == 3
    assert resolve_steps(0.03, 10) == 1
    assert resolve_steps(7, 10) == 7


def test_warmup_longer_than_run_is_rejected() -> None:
    with pytest.raises(UserError, match="100 warmup steps in a run of 50"):
        factors(50, warmup=100)
