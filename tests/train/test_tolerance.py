"""When a loss is a jump. What void steps and damaged pictures do is in tests/faults."""

from __future__ import annotations

import math

from finesight.train.tolerance import ENOUGH, is_jump

CALM = [2.0 + 0.1 * math.sin(number) for number in range(64)]


def test_a_loss_far_above_the_others_is_a_jump() -> None:
    assert is_jump(20.0, CALM)
    assert is_jump(4.3, CALM)


def test_small_swings_are_none() -> None:
    assert not is_jump(2.2, CALM)
    assert not is_jump(3.9, CALM)
    noisy = [0.1 * 2 ** (number % 6) for number in range(64)]
    assert not is_jump(3.2, noisy)


def test_few_losses_say_nothing() -> None:
    assert not is_jump(20.0, CALM[: ENOUGH - 1])
    assert is_jump(20.0, CALM[:ENOUGH])


def test_a_new_level_is_told_until_it_is_the_usual_one() -> None:
    high = [20.0 + number % 5 for number in range(40)]
    assert is_jump(20.0, [*CALM[:30], *high[:10]])
    assert not is_jump(20.0, [*CALM[:20], *high])
