"""fp32 masters against plain AdamW; accumulation, clipping, groups, loss scaling, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finesight.config import Train
from finesight.train.optimizer import LossScale, Masters

NAMES = {
    "visual.blocks.0.norm1.weight": (6,),
    "model.layers.0.mlp.down_proj.weight": (5, 6),
    "model.layers.0.mlp.down_proj.bias": (5,),
    "model.embed_tokens.weight": (7, 6),
}
RATES = {"default": 1e-2, "vision": 1e-3, "embeddings": 3e-3}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in NAMES.items()
    }


def settings(**changes: object) -> Train:
    return Train.model_validate({"learning_rate": RATES, "weight_decay": 0.1, **changes})


def backward(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in named.values()]
    torch.stack(terms).sum().backward()


def take(masters: Masters, named: dict[str, nn.Parameter], seed: int) -> None:
    backward(named, seed)
    masters.step(0.5, masters.norm())


def test_fp32_equals_torch_adamw_with_groups_and_clipping() -> None:
    named, plain = parameters(torch.float32), parameters(torch.float32)
    rates = {"visual": 1e-3, "model.layers": 1e-2, "model.embed": 3e-3}
    reference = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "lr": 0.5 * next(rate for start, rate in rates.items() if name.startswith(start)),
                "weight_decay": 0.1 if parameter.dim() > 1 else 0.0,
            }
            for name, parameter in plain.items()
        ],
    )
    masters = Masters(named, settings(clip=0.7))
    for seed in range(5):
        backward(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain.values(), 0.7)
        reference.step()
        reference.zero_grad()
        take(masters, named, seed)
    for name in NAMES:
        torch.testing.assert_close(named[name].detach(), plain[name].detach(), rtol=1e-6, atol=0)


def test_small_updates_survive_in_bf16() -> None:
    """Each step moves by 2^-12 of the value: bf16 alone would round every one of them away."""
    named = {"model.layers.0.mlp.down_proj.weight": nn.Parameter(torch.ones(4, 4).bfloat16())}
    masters = Masters(named, settings(learning_rate=2.0**-12, weight_decay=0.0, clip=None))
    for _ in range(64):
        next(iter(named.values())).sum().backward()
        masters.step(1.0, masters.norm())
    value = next(iter(named.values())).detach().float()
    torch.testing.assert_close(value, torch.full((4, 4), 1 - 64 / 4096), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_fp32_and_freed(dtype: torch.dtype) -> None:
    named = {"model.layers.0.mlp.down_proj.weight": nn.Parameter(torch.zeros(2, 2).to(dtype))}
    masters = Masters(named, settings())
    parameter = next(iter(named.values()))
    (parameter * 4096).sum().backward()
    for _ in range(8):
        masters.add_up()
        assert parameter.grad is None
        parameter.sum().backward()
    # 4096 + 1 is no bf16 number: a sum in the parameter's own type would still be 4096.
    assert masters.norm().item() == pytest.approx(math.sqrt(4) * 4104)
    masters.step(1.0, masters.norm())
    assert parameter.grad is None
    assert masters.norm() == 0


def test_dropped_gradients_leave_no_trace() -> None:
    named, again = parameters(torch.float32), parameters(torch.float32)
    masters, others = Masters(named, settings()), Masters(again, settings())
    backward(named, seed=99)
    masters.forget_gradients()
    take(masters, named, 1)
    take(others, again, 1)
    assert all(torch.equal(named[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taken", [0, 3])
def test_state_continues_bit_for_bit(dtype: torch.dtype, taken: int) -> None:
    named, again = parameters(dtype), parameters(dtype)
    masters = Masters(named, settings())
    for seed in range(taken):
        take(masters, named, seed)
    others = Masters(again, settings())
    others.load(
        {name: value.clone() for name, value in masters.values().items()},
        {name: value.clone() for name, value in masters.moments().items()},
    )
    for seed in range(10, 13):
        take(masters, named, seed)
        take(others, again, seed)
    for name in NAMES:
        assert torch.equal(named[name], again[name])
        assert torch.equal(masters.values()[name], others.values()[name])
    assert masters.moments()["steps"] == taken + 3


def test_state_with_other_names_is_refused() -> None:
    masters = Masters(parameters(torch.float32), settings())
    values = dict(masters.values())
    values.pop("model.embed_tokens.weight")
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight"):
        masters.load(values, masters.moments())


def test_loss_scale_undone_before_clipping() -> None:
    named, again = parameters(torch.float32), parameters(torch.float32)
    masters, others = Masters(named, settings()), Masters(again, settings())
    backward(named, 0)
    for parameter in named.values():
        parameter.grad.mul_(1024)
    masters.step(1.0, masters.norm(), grad_scale=1024.0)
    backward(again, 0)
    others.step(1.0, others.norm())
    for name in NAMES:
        torch.testing.assert_close(named[name].detach(), again[name].detach())


def test_loss_scale_halves_on_overflow_and_grows_after_a_calm() -> None:
    scale = LossScale(active=True)
    assert not scale.accept(math.inf)
    assert not scale.accept(math.nan)
    assert scale.value == LossScale.START / 4
    assert scale.skipped == 2
    for _ in range(LossScale.CALM):
        assert scale.accept(1.0)
    assert scale.value == LossScale.START / 2
    other = LossScale(active=True)
    other.load(scale.state())
    assert other.state() == scale.state()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_step_whose_norm_is_no_number_leaves_all_as_it_is(optimizer: str, wrong: float) -> None:
    """And the next one is as if it had not been."""
    kept, others = parameters(torch.float32), parameters(torch.float32)
    chosen = settings().model_copy(update={"optimizer": optimizer})
    masters, without = Masters(kept, chosen), Masters(others, chosen)
    for seed in range(3):
        take(masters, kept, seed)
        take(without, others, seed)
        backward(kept, 10 + seed)
        kept["visual.blocks.0.norm1.weight"].grad[0] = wrong
        masters.step(1.0, masters.norm())
        assert masters.norm() == 0
    for before, after in (
        (without.values(), masters.values()),
        (without.moments(), masters.moments()),
    ):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


def test_overflow_that_lasts_at_the_lowest_scale_is_not_for_the_scale_to_mend() -> None:
    scale = LossScale(active=True)
    for _ in range(15):
        assert not scale.accept(math.nan)
    assert scale.value == 1.0
    assert scale.accept(math.nan)
    assert (scale.value, scale.skipped) == (1.0, 15)
    assert LossScale(active=False).accept(math.inf)
