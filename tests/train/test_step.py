"""Training step: updated and frozen parameters, and errors."""

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
from tiny_task import make_task, write_recipe

from finesight.errors import TrainingInterrupted
from finesight.recipe import load_recipe
from finesight.train.console import TrainingConsole
from finesight.train.dataloader import StepBatch
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_train_state
from finesight.train.trainer import TrainState, micro_batch_seed, train_step
from finesight.train.training_run import StopRequest


def make_train_state(folder: Path, **train: Any) -> TrainState:
    recipe = make_task(folder) | {"output_dir": str(folder / "run")}
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    screen = TrainingConsole(Console(file=sys.stderr))
    return build_train_state(load_recipe(path), RunDir(folder / "run"), screen, resume=False)


def values(session: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in session.optimizer.master_weights().items()}


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_with_fp32_masters(tmp_path: Path, precision: str) -> None:
    session = make_train_state(tmp_path, precision=precision)
    step = session.step_dataset.get_step(0)
    losses = []
    for _ in range(6):
        taken = train_step(session, step, StopRequest())
        assert taken.is_applied
        losses.append(taken.wait()[0])
    assert losses[-1] < losses[0] - 0.2
    assert all(
        value.dtype == torch.float32 for value in session.optimizer.master_weights().values()
    )
    parameters = dict(session.model.named_parameters())
    for name, value in session.optimizer.export_weights().items():
        assert torch.equal(parameters[name].detach(), value.to(session.hardware.dtype))


def test_interrupted_step_leaves_no_state(tmp_path: Path) -> None:
    session = make_train_state(tmp_path)
    stop, step, before = StopRequest(), session.step_dataset.get_step(0), values(session)
    assert len(step.packs) >= 2
    with stop.install_handlers():
        hook = session.model.register_forward_pre_hook(
            lambda model, inputs: os.kill(os.getpid(), signal.SIGINT)
        )
        with pytest.raises(TrainingInterrupted):
            train_step(session, step, stop)
        hook.remove()
    assert is_equal(values(session), before)
    assert session.optimizer.grad_norm() == 0


def test_persistent_fp16_overflow_skips_the_step(tmp_path: Path) -> None:
    session = make_train_state(tmp_path, precision="fp16")
    before = values(session)
    session.loss_scaler.scale = session.loss_scaler.MIN_SCALE
    hook = session.model.register_forward_hook(lambda model, inputs, output: output * math.inf)
    loss, norm = train_step(session, session.step_dataset.get_step(0), StopRequest()).wait()
    assert not math.isfinite(loss + norm)
    assert session.loss_scaler.scale == session.loss_scaler.MIN_SCALE
    assert is_equal(values(session), before)
    hook.remove()
    assert math.isfinite(
        train_step(session, session.step_dataset.get_step(0), StopRequest()).wait()[1]
    )
    assert not is_equal(values(session), before)


def test_fp16_overflow_lowers_the_loss_scale(tmp_path: Path) -> None:
    session = make_train_state(tmp_path, precision="fp16")
    before = values(session)
    session.loss_scaler.scale = 2.0**40
    taken = train_step(session, session.step_dataset.get_step(0), StopRequest())
    assert not taken.is_applied
    assert session.loss_scaler.scale == 2.0**39
    assert session.loss_scaler.num_skipped == 1
    assert is_equal(values(session), before)
    assert session.optimizer.grad_norm() == 0
    session.loss_scaler.scale = 2.0**10
    assert train_step(session, session.step_dataset.get_step(0), StopRequest()).is_applied


def test_empty_step_does_not_update_parameters(tmp_path: Path) -> None:
    session = make_train_state(tmp_path)
    before = values(session)
    taken = train_step(session, StepBatch(0, (), (), ()), StopRequest())
    assert not taken.is_applied
    assert taken.wait() == (0.0, 0.0)
    assert is_equal(values(session), before)


def test_dropout_seeds_differ_and_are_reproducible(
    tmp_path: Path,
) -> None:
    session, again = make_train_state(tmp_path / "a"), make_train_state(tmp_path / "b")
    seeds: list[int] = []
    session.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for one in (session, again):
        torch.rand(len(values(session)))  # other random numbers in between do not matter
        train_step(one, one.step_dataset.get_step(0), StopRequest())
        train_step(one, one.step_dataset.get_step(1), StopRequest())
    assert is_equal(values(session), values(again))
    assert len(set(seeds)) == len(seeds) >= 4
    assert micro_batch_seed(0, 1, 2) != micro_batch_seed(1, 1, 2)
