"""Training steps: precision, interruption, overflow of the loss scale, dropout seeds."""

import math
import os
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vision_cache_fixtures import LORA, make_train_state

from finesight.errors import TrainingInterrupted
from finesight.train.state import StepOutput, TrainState
from finesight.train.step import forward_backward, micro_batch_seed, train_step
from finesight.train.step_batch import StepBatch


def make_state(folder: Path, precision: str = "fp32") -> tuple[TrainState, dict[str, torch.Tensor]]:
    state = make_train_state(folder, LORA | {"merger": "full"}, precision=precision)
    return state, {
        name: value.clone() for name, value in state.engine.optimizer.master_weights().items()
    }


def take_step(state: TrainState, number: int = 0) -> StepOutput:
    return train_step(state, state.engine.step_dataset.get_step(number))


def has_weights(state: TrainState, expected: dict[str, Any]) -> bool:
    found = state.engine.optimizer.master_weights()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_features_of_a_graph_are_freed_before_the_backward_pass():
    """Nothing else holds them, as in a captured graph with the vision encoder."""
    parameter = torch.ones(1, requires_grad=True)
    features: list[weakref.ref[Tensor]] = []

    def encode() -> Tensor:
        features_MKD = torch.zeros(2, 1, 1)
        features.append(weakref.ref(features_MKD))
        return features_MKD

    def backward(loss: Tensor) -> None:
        assert features[0]() is None
        loss.backward()

    class Doubling:
        lm_head_weight = parameter

        def __call__(self, *inputs: Any) -> Tensor:
            return parameter * 2

    model: Any = Doubling()
    objective: Any = SimpleNamespace(compute_loss=lambda h_LD, head_VD, inputs: h_LD * 3)
    batch: Any = None
    seed_1 = torch.zeros(1)
    losses = forward_backward(model, objective, batch, encode(), {}, seed_1, backward)
    assert losses.tolist() == [6.0]
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [6.0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_with_fp32_masters(tmp_path, precision):
    state, masters = make_state(tmp_path / "task", precision)
    outputs = [take_step(state) for _ in range(6)]
    assert all(one.is_applied for one in outputs)
    assert outputs[-1].wait()[0] < outputs[0].wait()[0] - 0.2
    assert {value.dtype for value in masters.values()} == {torch.float32}
    parameters = dict(state.engine.model.named_parameters())
    for name, value in state.engine.optimizer.master_weights(break_ties=True).items():
        assert torch.equal(parameters[name].detach(), value.to(state.run.hardware.dtype))


def test_interrupted_and_empty_steps_leave_no_state(tmp_path):
    state, before = make_state(tmp_path / "task")
    output = train_step(state, StepBatch(0, (), (), ()))
    assert not output.is_applied
    assert output.wait() == (0.0, 0.0)
    assert has_weights(state, before)
    step = state.engine.step_dataset.get_step(0)
    assert len(step.packs) >= 2
    state.engine.model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with state.run.stop.install_handlers(), pytest.raises(TrainingInterrupted):
        train_step(state, step)
    assert has_weights(state, before)
    assert state.engine.optimizer.grad_norm() == 0


def test_fp16_overflow_lowers_the_loss_scale_and_skips_the_step(tmp_path):
    state, before = make_state(tmp_path / "task", "fp16")
    scaler = state.engine.loss_scaler
    scaler.scale = 2.0**40
    assert not take_step(state).is_applied
    assert (scaler.scale, scaler.num_skipped) == (2.0**39, 1)
    assert has_weights(state, before)
    assert state.engine.optimizer.grad_norm() == 0
    # An overflow at the minimum scale persists.
    scaler.scale = scaler.MIN_SCALE
    hook = state.engine.model.register_forward_hook(lambda model, inputs, output: output * math.inf)
    assert not math.isfinite(sum(take_step(state).wait()))
    assert scaler.scale == scaler.MIN_SCALE
    assert has_weights(state, before)
    hook.remove()
    assert math.isfinite(take_step(state).wait()[1])
    assert not has_weights(state, before)


def test_dropout_seeds_differ_and_are_reproducible(tmp_path):
    (state, _), (again, masters) = (make_state(tmp_path / name) for name in "ab")
    seeds: list[int] = []
    state.engine.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for one in (state, again):
        torch.rand(len(masters))  # other random numbers in between do not matter
        take_step(one, 0)
        take_step(one, 1)
    assert has_weights(state, again.engine.optimizer.master_weights())
    assert len(set(seeds)) == len(seeds) >= 4
    assert micro_batch_seed(0, 1, 2) != micro_batch_seed(1, 1, 2)
