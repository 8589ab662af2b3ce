"""One step: what it moves, what it leaves alone, and when it refuses to go on."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_run import make_task, write_recipe

from finesight.errors import Interrupted
from finesight.recipe import load_recipe
from finesight.train.loader import Step
from finesight.train.prepare import Session, prepare
from finesight.train.progress import Screen
from finesight.train.run import Run
from finesight.train.step import seed_of, take_step
from finesight.train.stop import Stop


def session_of(folder: Path, **train: Any) -> Session:
    recipe = make_task(folder) | {"output": str(folder / "run")}
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    screen = Screen(Console(file=sys.stderr))
    return prepare(load_recipe(path), Run(folder / "run"), screen, resume=False)


def values(session: Session) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in session.masters.values().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns_in_fp32_masters(tmp_path: Path, precision: str) -> None:
    session = session_of(tmp_path, precision=precision)
    step = session.data.step(0)
    losses = []
    for _ in range(6):
        taken = take_step(session, step, Stop())
        assert taken.moved
        losses.append(taken.wait()[0])
    assert losses[-1] < losses[0] - 0.2
    assert all(value.dtype == torch.float32 for value in session.masters.values().values())
    parameters = dict(session.model.named_parameters())
    for name, value in session.masters.published().items():
        assert torch.equal(parameters[name].detach(), value.to(session.machine.dtype))


def test_a_signal_within_a_step_leaves_no_trace(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    stop, step, before = Stop(), session.data.step(0), values(session)
    assert len(step.packs) >= 2
    with stop.listening():
        hook = session.model.register_forward_pre_hook(
            lambda model, inputs: os.kill(os.getpid(), signal.SIGINT)
        )
        with pytest.raises(Interrupted):
            take_step(session, step, stop)
        hook.remove()
    assert same(values(session), before)
    assert session.masters.norm() == 0


def test_overflow_that_no_scale_prevents_moves_nothing_and_raises_nothing(tmp_path: Path) -> None:
    session = session_of(tmp_path, precision="fp16")
    before = values(session)
    session.scale.value = session.scale.LOWEST
    hook = session.model.register_forward_hook(lambda model, inputs, output: output * math.inf)
    loss, norm = take_step(session, session.data.step(0), Stop()).wait()
    assert not math.isfinite(loss + norm)
    assert session.scale.value == session.scale.LOWEST
    assert same(values(session), before)
    hook.remove()
    assert math.isfinite(take_step(session, session.data.step(0), Stop()).wait()[1])
    assert not same(values(session), before)


def test_overflow_in_fp16_skips_the_step_and_lowers_the_scale(tmp_path: Path) -> None:
    session = session_of(tmp_path, precision="fp16")
    before = values(session)
    session.scale.value = 2.0**40
    taken = take_step(session, session.data.step(0), Stop())
    assert not taken.moved
    assert session.scale.value == 2.0**39
    assert session.scale.skipped == 1
    assert same(values(session), before)
    assert session.masters.norm() == 0
    session.scale.value = 2.0**10
    assert take_step(session, session.data.step(0), Stop()).moved


def test_step_without_a_sample_moves_nothing(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    before = values(session)
    taken = take_step(session, Step(0, (), (), ()), Stop())
    assert not taken.moved
    assert taken.wait() == (0.0, 0.0)
    assert same(values(session), before)


def test_dropout_differs_between_micro_batches_and_steps_and_repeats_on_demand(
    tmp_path: Path,
) -> None:
    session, again = session_of(tmp_path / "a"), session_of(tmp_path / "b")
    seeds: list[int] = []
    session.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for one in (session, again):
        torch.rand(len(values(session)))  # other random numbers in between do not matter
        take_step(one, one.data.step(0), Stop())
        take_step(one, one.data.step(1), Stop())
    assert same(values(session), values(again))
    assert len(set(seeds)) == len(seeds) >= 4
    assert seed_of(0, 1, 2) != seed_of(1, 1, 2)
