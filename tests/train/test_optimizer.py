"""Optimizers with fp32 master weights: AdamW, 8-bit AdamW, groups, clipping, scaling and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finesight.config import TrainSettings
from finesight.errors import UserError
from finesight.model.kernels.adamw import BLOCK_SIZE
from finesight.model.quant.nf4 import import_bitsandbytes
from finesight.train import optim_states, optimizer
from finesight.train.optim_states import OptimState8bit, break_bf16_ties
from finesight.train.optimizer import LossScaler, LRSchedule, MasterWeightOptimizer, resolve_steps

EXPERTS = "model.layers.0.mlp.experts.down_proj"
MATRIX, OTHER = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
VECTOR, BIAS = "visual.blocks.0.norm1.weight", "model.layers.0.mlp.down_proj.bias"
SHAPES = {
    MATRIX: (33, 50),
    OTHER: (64, 64),
    EXPERTS: (3, 20, 30),
    BIAS: (33,),
    VECTOR: (6,),
    "model.embed_tokens.weight": (70, 60),
}
LEARNING_RATES = {"default": 1e-2, "vision": 1e-3, "embeddings": 3e-3}


def settings(optimizer: str = "adamw_8bit", **changes: object) -> TrainSettings:
    given = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return TrainSettings.model_validate(given)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def backward(named: dict[str, nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in named.values()]
    (torch.stack(terms).sum() * scale).backward()


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
    masters = MasterWeightOptimizer(
        named, settings("adamw", learning_rate=LEARNING_RATES, max_grad_norm=0.7)
    )
    for seed in range(5):
        backward(baseline, seed)
        torch.nn.utils.clip_grad_norm_(baseline.values(), 0.7)
        reference.step()
        reference.zero_grad()
        take(masters, named, seed)
    for name in SHAPES:
        torch.testing.assert_close(named[name].detach(), baseline[name].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("adamw", SHAPES), ("adamw_8bit", SHAPES), ("muon", SHAPES), ("muon", (MATRIX,))],
)
def test_state_resumes_bit_exactly(
    kind: str, names: tuple[str, ...], dtype: torch.dtype, taken: int
) -> None:
    """This includes a parameter that ends within a block, and Muon without AdamW parameters."""
    named, again = ({name: parameters(dtype)[name] for name in names} for _ in range(2))
    masters = MasterWeightOptimizer(named, settings(kind))
    for seed in range(taken):
        take(masters, named, seed)
    others = MasterWeightOptimizer(again, settings(kind))
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
    assert all(torch.equal(value, retained[n]) for n, value in masters.optimizer_state().items())
    assert retained["num_steps"] == (0 if names == (MATRIX,) else taken + 4)


def test_state_with_other_names_is_rejected() -> None:
    masters = MasterWeightOptimizer(parameters(torch.float32), settings())
    values = dict(masters.master_weights())
    values.pop("model.embed_tokens.weight")
    with pytest.raises(AssertionError, match=r"model\.embed_tokens\.weight"):
        masters.load_state(values, masters.optimizer_state())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_loss_scale_is_removed_before_clipping(kind: str) -> None:
    one, other = parameters(), parameters()
    for named, scale in ((one, 1.0), (other, 1024.0)):
        masters = MasterWeightOptimizer(named, settings(kind))
        backward(named, 8, scale)
        masters.step(1.0, masters.grad_norm(), scale)
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, other[name], msg=name)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nonfinite_step_leaves_state_unchanged(kind: str, wrong: float) -> None:
    """And the next one is as if it had not been."""
    retained, others = parameters(torch.float32), parameters(torch.float32)
    masters, without = (
        MasterWeightOptimizer(retained, settings(kind)),
        MasterWeightOptimizer(others, settings(kind)),
    )
    for seed in range(3):
        take(masters, retained, seed)
        take(without, others, seed)
        backward(retained, 10 + seed)
        retained[VECTOR].grad[0] = wrong
        masters.step(1.0, masters.grad_norm())
        assert masters.grad_norm() == 0
    for before, after in (
        (without.master_weights(), masters.master_weights()),
        (without.optimizer_state(), masters.optimizer_state()),
    ):
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), name


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


def test_overflow_at_minimum_scale_does_not_lower_it() -> None:
    scale = LossScaler(is_enabled=True)
    for _ in range(15):
        assert not scale.update(math.nan)
    assert scale.scale == 1.0
    assert scale.update(math.nan)
    assert (scale.scale, scale.num_skipped) == (1.0, 15)
    assert LossScaler(is_enabled=False).update(math.inf)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_master_weights_match_fp32_adamw(dtype: torch.dtype, micro: int) -> None:
    """Over many steps of sizes from far below to far above what the model's type can hold."""
    generator, shapes = torch.Generator().manual_seed(0), {MATRIX: (40, 32), BIAS: (64,)}
    named = {
        name: nn.Parameter((torch.randn(shape, generator=generator) ** 3).to(dtype))
        for name, shape in shapes.items()
    }
    baseline = {name: nn.Parameter(p.detach().float()) for name, p in named.items()}
    learning_rate, decay = 1e-3, 0.1
    masters = MasterWeightOptimizer(
        named, settings("adamw", learning_rate=learning_rate, max_grad_norm=None)
    )
    reference = torch.optim.AdamW(
        [
            {"params": [baseline[MATRIX]], "weight_decay": decay},
            {"params": [baseline[BIAS]], "weight_decay": 0.0},
        ],
        foreach=False,
        fused=False,
    )
    for step in range(120):
        factor = 10.0 ** (step % 7 - 4)
        total = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for number in range(micro):
            if number:
                masters.accumulate_gradients()
            drawn: dict[str, Tensor] = {
                name: torch.randn(shape, generator=generator).to(dtype)
                for name, shape in shapes.items()
            }
            torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum().backward()
            for name, gradient in drawn.items():
                total[name] += gradient
        for name, gradient in total.items():
            baseline[name].grad = gradient
        for group in reference.param_groups:
            group["lr"] = learning_rate * factor
        reference.step()
        masters.step(factor, masters.grad_norm())
    for name, expected in baseline.items():
        assert torch.equal(masters.master_weights()[name], expected.detach()), name
        state = reference.state[expected]
        assert torch.equal(masters.optimizer_state()[f"exp_avg.{name}"], state["exp_avg"])
        assert torch.equal(masters.optimizer_state()[f"exp_avg_sq.{name}"], state["exp_avg_sq"])
        equal = break_bf16_ties(expected.detach()) if dtype == torch.bfloat16 else expected.detach()
        assert torch.equal(named[name].detach(), equal.to(dtype))
        assert torch.equal(masters.export_weights()[name].to(dtype), named[name].detach())


def test_memory_per_parameter() -> None:
    named = {MATRIX: nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))}
    for kind, moments in (("adamw", 8.0), ("adamw_8bit", 2 + 8 / 256)):
        masters = MasterWeightOptimizer(named, settings(kind))
        wide = masters.param_groups[0].master_weights
        assert (wide.params_E.nbytes + wide.residual_E.nbytes) / 4096 == 4
        retained = sum(
            t.nbytes for name, t in masters.optimizer_state().items() if name != "num_steps"
        )
        assert retained / 4096 == moments


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
