"""Moments of eight bits: AdamW near bitsandbytes' and its own steps, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finesight.config import Train
from finesight.model.nf4 import bitsandbytes
from finesight.train import adamw, moments
from finesight.train.moments import BLOCK, EightBits
from finesight.train.optimizer import Masters

EXPERTS = "model.layers.0.mlp.experts.down_proj"
MATRIX, OTHER = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
SHAPES = {
    MATRIX: (33, 50),
    OTHER: (64, 64),
    EXPERTS: (3, 20, 30),
    "model.layers.0.mlp.down_proj.bias": (33,),
    "model.embed_tokens.weight": (70, 60),
}


def settings(optimizer: str = "adamw8bit", **changes: object) -> Train:
    given = {"optimizer": optimizer, "learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return Train.model_validate(given)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def take(masters: Masters, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    terms = [(p * torch.randn(p.shape, generator=generator).to(p)).sum() for p in named.values()]
    torch.stack(terms).sum().backward()
    masters.step(0.5, masters.norm())


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_bitsandbytes(signed: bool) -> None:
    theirs = bitsandbytes("test").functional.create_dynamic_map(signed=signed)
    assert torch.equal(moments.levels(signed), theirs)


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_are_rounded_to_the_nearest_level(signed: bool) -> None:
    numbers = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(0)) ** 3
    numbers = numbers if signed else numbers.abs()
    numbers[BLOCK : 2 * BLOCK] = 0
    moment, whole = EightBits(len(numbers), numbers.device, signed), slice(0, 3 * BLOCK)
    assert not moment.of(whole).any()
    moment.keep(numbers, whole)
    scale_31 = numbers.view(-1, BLOCK).abs().amax(1, keepdim=True)
    every = scale_31[..., None] * moments.levels(signed)
    nearest = (every - numbers.view(-1, BLOCK, 1)).abs().amin(2)
    off = (moment.of(whole) - numbers).abs().view(-1, BLOCK)
    # The smallest ones of a moment without a sign are not rounded to zero.
    large = numbers.view(-1, BLOCK).abs() > 1e-6 * scale_31
    torch.testing.assert_close(off[large], nearest[large], rtol=1e-3, atol=1e-7)
    assert not moment.of(slice(BLOCK, 2 * BLOCK)).any()


def test_a_second_moment_that_is_not_zero_never_becomes_zero() -> None:
    numbers = torch.zeros(BLOCK)
    numbers[0], numbers[1] = 1.0, 1e-9
    moment, whole = EightBits(BLOCK, numbers.device, signed=False), slice(0, BLOCK)
    moment.keep(numbers, whole)
    kept = moment.of(whole)
    assert kept[1] > 0
    assert not kept[2:].any()


def test_a_gradient_that_comes_once_moves_its_number_a_little() -> None:
    """Were its second moment rounded to zero, the next step would be far too long."""
    parameter = nn.Parameter(torch.zeros(1, BLOCK))
    masters = Masters({MATRIX: parameter}, settings(learning_rate=1e-3, weight_decay=0, clip=None))
    for step in range(20):
        gradient = torch.zeros(1, BLOCK)
        gradient[0, 0] = 1.0
        gradient[0, 1] = 1e-4 if step == 0 else 0.0
        parameter.grad = gradient
        masters.step(1.0, masters.norm())
    master_E = masters.values()[MATRIX].flatten()
    assert 0 < float(master_E[1].abs()) < 20e-3
    assert not master_E[2:].any()


def test_steps_are_nearly_those_of_bitsandbytes() -> None:
    """Of its AdamW8bit, on a tensor of whole blocks. On a CPU, it does not round to the nearest."""
    values = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    theirs = nn.Parameter(values.clone())
    optimizer = bitsandbytes("test").optim.AdamW8bit(
        [theirs], lr=1e-2, weight_decay=0.1, min_8bit_size=0
    )
    ours = nn.Parameter(values.clone())
    masters = Masters({MATRIX: ours}, settings(clip=None))
    for seed in range(6):
        gradient = torch.randn(40, 128, generator=torch.Generator().manual_seed(seed)) / (seed + 1)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours.grad = gradient
        masters.step(1.0, masters.norm())
    moved = theirs.detach() - values
    assert float((ours.detach() - theirs.detach()).norm() / moved.norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_stays_near_adamw(dtype: torch.dtype) -> None:
    values = []
    for optimizer in ("adamw", "adamw8bit"):
        named = parameters(dtype)
        masters = Masters(named, settings(optimizer))
        start = {name: value.clone() for name, value in masters.values().items()}
        for seed in range(20):
            take(masters, named, seed)
        values.append({name: v - start[name] for name, v in masters.values().items()})
    for name in SHAPES:
        plain, small = (moved[name] for moved in values)
        off = float((small - plain).norm() / plain.norm())
        # Vectors and embeddings keep their moments in fp32.
        assert off == 0.0 if name not in (MATRIX, OTHER, EXPERTS) else 0.0 < off < 0.1, name


def test_moments_of_matrices_take_two_bytes_and_a_scale() -> None:
    masters = Masters(parameters(), settings())
    kept = masters.moments()
    for name, numbers in ((MATRIX, 33 * 50), (OTHER, 64 * 64), (EXPERTS, 1800)):
        blocks = -(-numbers // BLOCK)
        own = {key: kept[f"{key}.{name}"] for key in ("first", "second")}
        assert all(t.dtype == torch.uint8 and t.numel() == blocks * BLOCK for t in own.values())
        assert kept[f"first_scale.{name}"].shape == kept[f"second_scale.{name}"].shape == (blocks,)
    assert kept["first.model.embed_tokens.weight"].dtype == torch.float32
    assert "first_scale.model.layers.0.mlp.down_proj.bias" not in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_state_continues_bit_for_bit(dtype: torch.dtype, taken: int) -> None:
    """Also behind the end of a parameter that fills no whole block."""
    named, again = parameters(dtype), parameters(dtype)
    masters = Masters(named, settings())
    for seed in range(taken):
        take(masters, named, seed)
    others = Masters(again, settings())
    others.load(
        {name: value.clone() for name, value in masters.values().items()},
        {name: value.clone() for name, value in masters.moments().items()},
    )
    for seed in range(10, 14):
        take(masters, named, seed)
        take(others, again, seed)
    for group, other in zip(masters.groups, others.groups, strict=True):
        whole = slice(0, len(group.masters))
        assert torch.equal(group.masters.of(whole), other.masters.of(whole))
    kept = others.moments()
    assert all(torch.equal(moment, kept[name]) for name, moment in masters.moments().items())
    assert kept["steps"] == taken + 4


def test_numbers_between_parameters_stay_zero() -> None:
    named = parameters()
    masters = Masters(named, settings())
    for seed in range(5):
        take(masters, named, seed)
    group = next(g for g in masters.groups if g.pieces[0].name == MATRIX)
    assert len(group.masters) == (7 + 8) * BLOCK
    assert not group.masters.of(slice(33 * 50, 7 * BLOCK)).any()
    assert not group.masters.of(slice(7 * BLOCK + 3 * 20 * 30, 15 * BLOCK)).any()


def test_steps_of_long_groups_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may begin and end within a parameter."""
    moved = []
    for most in (adamw.MOST, 2 * BLOCK):
        monkeypatch.setattr(adamw, "MOST", most)
        named = parameters()
        masters = Masters(named, settings())
        for seed in range(3):
            take(masters, named, seed)
        moved.append({name: value.clone() for name, value in masters.values().items()})
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in SHAPES)


def test_a_matrix_that_no_gradient_reached_is_told() -> None:
    named = parameters()
    masters = Masters(named, settings())
    (named[MATRIX] * 1e-4).sum().backward()
    masters.step(1.0, masters.norm())
    assert masters.reached() == {MATRIX}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_steps_as_a_cpu_does() -> None:
    moved = []
    for device in ("cpu", "cuda"):
        named = {n: nn.Parameter(p.detach().to(device)) for n, p in parameters().items()}
        masters = Masters(named, settings())
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            draws = {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}
            terms = [(named[name] * drawn.to(device)).sum() for name, drawn in draws.items()]
            torch.stack(terms).sum().backward()
            masters.step(0.5, masters.norm())
        moved.append({name: value.cpu() for name, value in masters.values().items()})
    for name in SHAPES:
        off = float((moved[0][name] - moved[1][name]).norm() / moved[0][name].norm())
        assert off < 1e-3, (name, off)
