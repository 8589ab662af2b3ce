"""Optimizer: fp32 master weights, accumulation, clipping, groups, loss scaling and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finesight.config import TrainSettings
from finesight.train.optimizer import LossScaler, MasterWeightOptimizer

NAMES = {
    "visual.blocks.0.norm1.weight": (6,),
    "model.layers.0.mlp.down_proj.weight": (5, 6),
    "model.layers.0.mlp.down_proj.bias": (5,),
    "model.embed_tokens.weight": (7, 6),
}
LEARNING_RATES = {"default": 1e-2, "vision": 1e-3, "embeddings": 3e-3}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in NAMES.items()
    }


def settings(**changes: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {"learning_rate": LEARNING_RATES, "weight_decay": 0.1, **changes}
    )


def backward(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in named.values()]
    torch.stack(terms).sum().backward()


def take(masters: MasterWeightOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    backward(named, seed)
    masters.step(0.5, masters.grad_norm())


def test_fp32_matches_torch_adamw_with_groups_and_clipping() -> None:
    named, baseline = parameters(torch.float32), parameters(torch.float32)
    learning_rates = {"visual": 1e-3, "model.layers": 1e-2, "model.embed": 3e-3}
    reference = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": 0.5
                * next(value for start, value in learning_rates.items() if name.startswith(start)),
                "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
            }
            for name, parameter in baseline.items()
        ],
    )
    masters = MasterWeightOptimizer(named, settings(max_grad_norm=0.7))
    for seed in range(5):
        backward(baseline, seed)
        torch.nn.utils.clip_grad_norm_(baseline.values(), 0.7)
        reference.step()
        reference.zero_grad()
        take(masters, named, seed)
    for name in NAMES:
        torch.testing.assert_close(named[name].detach(), baseline[name].detach(), rtol=1e-6, atol=0)


def test_small_updates_survive_in_bf16() -> None:
    """Each update is 2^-12 of the value, which bf16 alone would round to zero."""
    named = {"model.layers.0.mlp.down_proj.weight": nn.Parameter(torch.ones(4, 4).bfloat16())}
    masters = MasterWeightOptimizer(
        named, settings(learning_rate=2.0**-12, weight_decay=0.0, max_grad_norm=None)
    )
    for _ in range(64):
        next(iter(named.values())).sum().backward()
        masters.step(1.0, masters.grad_norm())
    value = next(iter(named.values())).detach().float()
    torch.testing.assert_close(value, torch.full((4, 4), 1 - 64 / 4096), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_accumulated_in_fp32_and_freed(dtype: torch.dtype) -> None:
    named = {"model.layers.0.mlp.down_proj.weight": nn.Parameter(torch.zeros(2, 2).to(dtype))}
    masters = MasterWeightOptimizer(named, settings())
    parameter = next(iter(named.values()))
    (parameter * 4096).sum().backward()
    for _ in range(8):
        masters.accumulate_gradients()
        assert parameter.grad is None
        parameter.sum().backward()
    # 4096 + 1 is no bf16 number: a sum in the parameter's own type would still be 4096.
    assert masters.grad_norm().item() == pytest.approx(math.sqrt(4) * 4104)
    masters.step(1.0, masters.grad_norm())
    assert parameter.grad is None
    assert masters.grad_norm() == 0


def test_dropped_gradients_leave_no_state() -> None:
    named, again = parameters(torch.float32), parameters(torch.float32)
    masters, others = (
        MasterWeightOptimizer(named, settings()),
        MasterWeightOptimizer(again, settings()),
    )
    backward(named, seed=99)
    masters.zero_grad()
    take(masters, named, 1)
    take(others, again, 1)
    assert all(torch.equal(named[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [0, 3])
def test_state_resumes_bit_exactly(dtype: torch.dtype, taken: int) -> None:
    named, again = parameters(dtype), parameters(dtype)
    masters = MasterWeightOptimizer(named, settings())
    for seed in range(taken):
        take(masters, named, seed)
    others = MasterWeightOptimizer(again, settings())
    others.load_state(
        {name: value.clone() for name, value in masters.master_weights().items()},
        {name: value.clone() for name, value in masters.optimizer_state().items()},
    )
    for seed in range(10, 13):
        take(masters, named, seed)
        take(others, again, seed)
    for name in NAMES:
        assert torch.equal(named[name], again[name])
        assert torch.equal(masters.master_weights()[name], others.master_weights()[name])
    assert masters.optimizer_state()["num_steps"] == taken + 3


def test_state_with_other_names_is_rejected() -> None:
    masters = MasterWeightOptimizer(parameters(torch.float32), settings())
    values = dict(masters.master_weights())
    values.pop("model.embed_tokens.weight")
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight"):
        masters.load_state(values, masters.optimizer_state())


def test_loss_scale_is_removed_before_clipping() -> None:
    named, again = parameters(torch.float32), parameters(torch.float32)
    masters, others = (
        MasterWeightOptimizer(named, settings()),
        MasterWeightOptimizer(again, settings()),
    )
    backward(named, 0)
    for parameter in named.values():
        parameter.grad.mul_(1024)
    masters.step(1.0, masters.grad_norm(), loss_scale=1024.0)
    backward(again, 0)
    others.step(1.0, others.grad_norm())
    for name in NAMES:
        torch.testing.assert_close(named[name].detach(), again[name].detach())


def test_loss_scale_halves_on_overflow_and_recovers() -> None:
    scale = LossScaler(is_enabled=True)
    assert not scale.update(math.inf)
    assert not scale.update(math.nan)
    assert scale.scale == LossScaler.INIT_SCALE / 4
    assert scale.num_skipped == 2
    for _ in range(LossScaler.GROWTH_INTERVAL):
        assert scale.update(1.0)
    assert scale.scale == LossScaler.INIT_SCALE / 2
    other = LossScaler(is_enabled=True)
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nonfinite_step_leaves_state_unchanged(optimizer: str, wrong: float) -> None:
    """And the next one is as if it had not been."""
    retained, others = parameters(torch.float32), parameters(torch.float32)
    chosen = settings().model_copy(update={"optimizer": optimizer})
    masters, without = (
        MasterWeightOptimizer(retained, chosen),
        MasterWeightOptimizer(others, chosen),
    )
    for seed in range(3):
        take(masters, retained, seed)
        take(without, others, seed)
        backward(retained, 10 + seed)
        retained["visual.blocks.0.norm1.weight"].grad[0] = wrong
        masters.step(1.0, masters.grad_norm())
        assert masters.grad_norm() == 0
    for before, after in (
        (without.master_weights(), masters.master_weights()),
        (without.optimizer_state(), masters.optimizer_state()),
    ):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


def test_overflow_at_minimum_scale_does_not_lower_it() -> None:
    scale = LossScaler(is_enabled=True)
    for _ in range(15):
        assert not scale.update(math.nan)
    assert scale.scale == 1.0
    assert scale.update(math.nan)
    assert (scale.scale, scale.num_skipped) == (1.0, 15)
    assert LossScaler(is_enabled=False).update(math.inf)
