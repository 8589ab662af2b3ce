"""Moments of eight bits: AdamW near bitsandbytes' and its own steps, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finesight.config import TrainSettings
from finesight.model.quant.nf4 import import_bitsandbytes
from finesight.train import optim_states, optimizer
from finesight.train.optim_states import BLOCK_SIZE, OptimState8bit
from finesight.train.optimizer import MasterWeightOptimizer

EXPERTS = "model.layers.0.mlp.experts.down_proj"
MATRIX, OTHER = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
SHAPES = {
    MATRIX: (33, 50),
    OTHER: (64, 64),
    EXPERTS: (3, 20, 30),
    "model.layers.0.mlp.down_proj.bias": (33,),
    "model.embed_tokens.weight": (70, 60),
}


def settings(optimizer: str = "adamw_8bit", **changes: object) -> TrainSettings:
    given = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return TrainSettings.model_validate(given)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def take(masters: MasterWeightOptimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in named.values()]
    torch.stack(terms).sum().backward()
    masters.step(0.5, masters.grad_norm())


@pytest.mark.parametrize("signed", [True, False])
def test_quantization_levels_match_bitsandbytes(signed: bool) -> None:
    theirs = import_bitsandbytes("test").functional.create_dynamic_map(signed=signed)
    assert torch.equal(optim_states.create_dynamic_map(signed), theirs)


@pytest.mark.parametrize("signed", [True, False])
def test_values_round_to_nearest_level(signed: bool) -> None:
    value_list = torch.randn(3 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0)) ** 3
    value_list = value_list if signed else value_list.abs()
    value_list[BLOCK_SIZE : 2 * BLOCK_SIZE] = 0
    moment, full = (
        OptimState8bit(len(value_list), value_list.device, signed),
        slice(0, 3 * BLOCK_SIZE),
    )
    assert not moment.read(full).any()
    moment.write(value_list, full)
    scale_31 = value_list.view(-1, BLOCK_SIZE).abs().amax(1, keepdim=True)
    every = scale_31[..., None] * optim_states.create_dynamic_map(signed)
    nearest = (every - value_list.view(-1, BLOCK_SIZE, 1)).abs().amin(2)
    off = (moment.read(full) - value_list).abs().view(-1, BLOCK_SIZE)
    # The smallest ones of a moment without a sign are not rounded to zero.
    large = value_list.view(-1, BLOCK_SIZE).abs() > 1e-6 * scale_31
    torch.testing.assert_close(off[large], nearest[large], rtol=1e-3, atol=1e-7)
    assert not moment.read(slice(BLOCK_SIZE, 2 * BLOCK_SIZE)).any()


def test_nonzero_second_moment_never_becomes_zero() -> None:
    value_list = torch.zeros(BLOCK_SIZE)
    value_list[0], value_list[1] = 1.0, 1e-9
    moment, full = OptimState8bit(BLOCK_SIZE, value_list.device, signed=False), slice(0, BLOCK_SIZE)
    moment.write(value_list, full)
    retained = moment.read(full)
    assert retained[1] > 0
    assert not retained[2:].any()


def test_rare_gradient_gives_a_small_update() -> None:
    """Were its second moment rounded to zero, the next step would be far too long."""
    parameter = nn.Parameter(torch.zeros(1, BLOCK_SIZE))
    masters = MasterWeightOptimizer(
        {MATRIX: parameter}, settings(learning_rate=1e-3, weight_decay=0, max_grad_norm=None)
    )
    for step in range(20):
        gradient = torch.zeros(1, BLOCK_SIZE)
        gradient[0, 0] = 1.0
        gradient[0, 1] = 1e-4 if step == 0 else 0.0
        parameter.grad = gradient
        masters.step(1.0, masters.grad_norm())
    master_E = masters.master_weights()[MATRIX].flatten()
    assert 0 < float(master_E[1].abs()) < 20e-3
    assert not master_E[2:].any()


def test_steps_are_close_to_bitsandbytes() -> None:
    """Compare with AdamW8bit on complete blocks; its CPU version does not round to nearest."""
    values = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    theirs = nn.Parameter(values.clone())
    optimizer = import_bitsandbytes("test").optim.AdamW8bit(
        [theirs], lr=1e-2, weight_decay=0.1, min_8bit_size=0
    )
    ours = nn.Parameter(values.clone())
    masters = MasterWeightOptimizer({MATRIX: ours}, settings(max_grad_norm=None))
    for seed in range(6):
        gradient = torch.randn(40, 128, generator=torch.Generator().manual_seed(seed)) / (seed + 1)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours.grad = gradient
        masters.step(1.0, masters.grad_norm())
    changed = theirs.detach() - values
    assert float((ours.detach() - theirs.detach()).norm() / changed.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_close_to_adamw(dtype: torch.dtype) -> None:
    values = []
    for name in ("adamw", "adamw_8bit"):
        named = parameters(dtype)
        masters = MasterWeightOptimizer(named, settings(name))
        start = {name: value.clone() for name, value in masters.master_weights().items()}
        for seed in range(20):
            take(masters, named, seed)
        values.append({name: v - start[name] for name, v in masters.master_weights().items()})
    for name in SHAPES:
        baseline, small = (updated[name] for updated in values)
        off = float((small - baseline).norm() / baseline.norm())
        # Vectors and embeddings keep their moments in fp32.
        assert off == 0.0 if name not in (MATRIX, OTHER, EXPERTS) else 0.0 < off < 0.1, name


def test_state_memory_per_parameter() -> None:
    masters = MasterWeightOptimizer(parameters(), settings())
    retained = masters.optimizer_state()
    for name, num_elements in ((MATRIX, 33 * 50), (OTHER, 64 * 64), (EXPERTS, 1800)):
        blocks = -(-num_elements // BLOCK_SIZE)
        own = {key: retained[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
        assert all(
            t.dtype == torch.uint8 and t.numel() == blocks * BLOCK_SIZE for t in own.values()
        )
        assert (
            retained[f"exp_avg_scale.{name}"].shape
            == retained[f"exp_avg_sq_scale.{name}"].shape
            == (blocks,)
        )
    assert retained["exp_avg.model.embed_tokens.weight"].dtype == torch.float32
    assert "exp_avg_scale.model.layers.0.mlp.down_proj.bias" not in retained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_state_resumes_bit_exactly(dtype: torch.dtype, taken: int) -> None:
    """This includes a parameter that ends within a block."""
    named, again = parameters(dtype), parameters(dtype)
    masters = MasterWeightOptimizer(named, settings())
    for seed in range(taken):
        take(masters, named, seed)
    others = MasterWeightOptimizer(again, settings())
    others.load_state(
        {name: value.clone() for name, value in masters.master_weights().items()},
        {name: value.clone() for name, value in masters.optimizer_state().items()},
    )
    for seed in range(10, 14):
        take(masters, named, seed)
        take(others, again, seed)
    for group, other in zip(masters.param_groups, others.param_groups, strict=True):
        full = slice(0, len(group.master_weights))
        assert torch.equal(group.master_weights.read(full), other.master_weights.read(full))
    retained = others.optimizer_state()
    assert all(
        torch.equal(moment, retained[name]) for name, moment in masters.optimizer_state().items()
    )
    assert retained["num_steps"] == taken + 4


def test_padding_between_parameters_stays_zero() -> None:
    named = parameters()
    masters = MasterWeightOptimizer(named, settings())
    for seed in range(5):
        take(masters, named, seed)
    group = next(g for g in masters.param_groups if g.param_slices[0].name == MATRIX)
    assert len(group.master_weights) == (7 + 8) * BLOCK_SIZE
    assert not group.master_weights.read(slice(33 * 50, 7 * BLOCK_SIZE)).any()
    assert not group.master_weights.read(slice(7 * BLOCK_SIZE + 3 * 20 * 30, 15 * BLOCK_SIZE)).any()


def test_chunked_steps_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may begin and end within a parameter."""
    changed = []
    for most in (optimizer.MAX_CHUNK_ELEMENTS, 2 * BLOCK_SIZE):
        monkeypatch.setattr(optimizer, "MAX_CHUNK_ELEMENTS", most)
        named = parameters()
        masters = MasterWeightOptimizer(named, settings())
        for seed in range(3):
            take(masters, named, seed)
        changed.append({name: value.clone() for name, value in masters.master_weights().items()})
    assert all(torch.equal(changed[0][name], changed[1][name]) for name in SHAPES)


def test_matrix_without_gradient_is_reported() -> None:
    named = parameters()
    masters = MasterWeightOptimizer(named, settings())
    (named[MATRIX] * 1e-4).sum().backward()
    masters.step(1.0, masters.grad_norm())
    assert masters.params_with_grad() == {MATRIX}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_step_matches_cpu() -> None:
    changed = []
    for device in ("cpu", "cuda"):
        named = {n: nn.Parameter(p.detach().to(device)) for n, p in parameters().items()}
        masters = MasterWeightOptimizer(named, settings())
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            draws = {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}
            terms = [(named[name] * drawn.to(device)).sum() for name, drawn in draws.items()]
            torch.stack(terms).sum().backward()
            masters.step(0.5, masters.grad_norm())
        changed.append({name: value.cpu() for name, value in masters.master_weights().items()})
    for name in SHAPES:
        off = float((changed[0][name] - changed[1][name]).norm() / changed[0][name].norm())
        assert off < 1e-3, (name, off)
