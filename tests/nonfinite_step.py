"""Steps with non-finite losses or gradients; also a rank of a distributed run."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
from tiny_task import act_before_step
from torch.distributed.distributed_c10d import _set_pg_timeout

from finesight.cli.app import run_command
from finesight.settings.recipe import load_recipe
from finesight.train import trainer
from finesight.train.parallel import distributed
from finesight.train.state import StepOutput, TrainState
from finesight.train.step import train_step
from finesight.train.step_batch import StepBatch
from finesight.train.training_run import train

SHORT_TIMEOUT = timedelta(seconds=5)

CorruptionKind = Literal["loss", "gradient", "jump"]


@contextmanager
def corrupt_steps(kind: CorruptionKind, steps: Collection[int]) -> Iterator[None]:
    """Corrupt the loss or gradient of these steps, counted from 1, within the context.

    The kinds are a NaN loss, an infinite gradient, and a much higher loss.
    """

    def corrupted_train_step(
        session: TrainState, step: StepBatch, *rest: Any, **more: Any
    ) -> StepOutput:
        if step.step_index + 1 not in steps:
            return train_step(session, step, *rest, **more)
        if kind == "gradient":
            first = session.engine.optimizer.param_groups[0].param_slices[0].parameter
            hook = first.register_hook(lambda gradient: gradient * math.inf)
        else:
            by = math.nan if kind == "loss" else -100.0
            hook = session.engine.model.register_forward_hook(lambda *called: called[-1] * by)
        try:
            return train_step(session, step, *rest, **more)
        finally:
            hook.remove()

    with patch.object(trainer, "train_step", corrupted_train_step):
        yield


@contextmanager
def before_steps(steps: Collection[int], act: Callable[[], object]) -> Iterator[None]:
    """Call a function before these steps, counted from 1, within the context."""
    with pytest.MonkeyPatch.context() as context:
        for step in steps:
            act_before_step(context, step - 1, act)
        yield


def train_with_corrupt_steps(kind: CorruptionKind, steps: Collection[int], recipe: Path) -> None:
    """Train a recipe; the function of each rank of a distributed run."""
    with corrupt_steps(kind, steps):
        train(load_recipe(recipe))


def train_with_short_timeout(*arguments: str) -> int:
    """Run the command `train` with a short timeout after its first step; return its exit code.

    All ranks have joined by then, however slowly they started.
    """
    real, num_steps = trainer.train_step, count(1)

    def shortened_train_step(*state: Any, **more: Any) -> StepOutput:
        if next(num_steps) == 2:
            distributed.COLLECTIVE_TIMEOUT = SHORT_TIMEOUT
            _set_pg_timeout(SHORT_TIMEOUT)
        return real(*state, **more)

    with (
        patch.object(trainer, "train_step", shortened_train_step),
        patch.object(distributed, "COLLECTIVE_TIMEOUT", distributed.COLLECTIVE_TIMEOUT),
    ):
        return run_command(["train", *arguments])
