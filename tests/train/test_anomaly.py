"""Detection of loss spikes; tests/faults covers non-finite steps and corrupt images."""

from __future__ import annotations

import math

from finesight.train.logging import MIN_LOSS_WINDOW, is_loss_spike

CALM = [2.0 + 0.1 * math.sin(number) for number in range(64)]


def test_outlier_loss_is_a_jump() -> None:
    assert is_loss_spike(20.0, CALM)
    assert is_loss_spike(4.3, CALM)


def test_small_fluctuations_are_no_jump() -> None:
    assert not is_loss_spike(2.2, CALM)
    assert not is_loss_spike(3.9, CALM)
    noisy = [0.1 * 2 ** (number % 6) for number in range(64)]
    assert not is_loss_spike(3.2, noisy)


def test_few_losses_give_no_jump() -> None:
    assert not is_loss_spike(20.0, CALM[: MIN_LOSS_WINDOW - 1])
    assert is_loss_spike(20.0, CALM[:MIN_LOSS_WINDOW])


def test_new_loss_level_stops_being_a_jump() -> None:
    high = [20.0 + number % 5 for number in range(40)]
    assert is_loss_spike(20.0, [*CALM[:30], *high[:10]])
    assert not is_loss_spike(20.0, [*CALM[:20], *high])
