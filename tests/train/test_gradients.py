"""Gradients of one micro-batch and of several: the same sums, and no more memory than they need."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from finesight.config import Train
from finesight.train import gradients
from finesight.train.gradients import Gradients, Piece
from finesight.train.optimizer import Masters

MATRIX, VISION = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
SHAPES = {VISION: (8, 12), MATRIX: (33, 50), "model.layers.1.mlp.down_proj.weight": (5, 7)}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def masters_of(named: dict[str, nn.Parameter], **changes: object) -> Masters:
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return Masters(named, Train.model_validate(given))


def backward(named: dict[str, nn.Parameter], seed: int, without: str = "") -> dict[str, Tensor]:
    """Gradients as returned come to all parameters but one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in named.items()}
    drawn.pop(without, None)
    torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum().backward()
    return drawn


def sums(masters: Masters) -> dict[str, Tensor | None]:
    return {
        piece.name: found
        for group in masters.groups
        for piece, found in zip(group.pieces, group.gradients.of_each(), strict=True)
    }


def summed(masters: Masters) -> bool:
    """Whether there is memory for sums."""
    return any(own is not None for group in masters.groups for own in group.gradients._sums)


def test_what_learned_is_gone_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in a process that goes on, as a notebook's, gives its memory back."""
    monkeypatch.setattr(gradients, "LARGE", 1)
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    backward(named, 1)
    alive = [weakref.ref(parameter) for parameter in named.values()]
    del masters, named
    gc.collect()
    assert [one() for one in alive] == [None] * len(alive)


def test_one_micro_batch_stays_where_it_is() -> None:
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    drawn = backward(named, 1, without=VISION)
    for name, found in sums(masters).items():
        assert found is named[name].grad
        assert (found is None) == (name == VISION)
        assert found is None or torch.equal(found, drawn[name])
    assert not summed(masters)
    masters.step(1.0, masters.norm())
    assert all(parameter.grad is None for parameter in named.values())
    assert not summed(masters)


@pytest.mark.parametrize("large", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_several_are_summed_in_fp32(
    dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come at once and those that come later, to all parameters or not, step by step."""
    monkeypatch.setattr(gradients, "LARGE", large)
    named = parameters(dtype)
    masters = masters_of(named)
    for step in range(3):
        expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for micro, without in enumerate(("", VISION, MATRIX, VISION)):
            if micro:
                masters.add_up()
                assert all(parameter.grad is None for parameter in named.values())
            for name, drawn in backward(named, 10 * step + micro, without).items():
                expected[name] += drawn.float()
        found = sums(masters)
        assert all(torch.equal(found[name], total) for name, total in expected.items())
        length = torch.cat([total.flatten() for total in expected.values()]).norm()
        torch.testing.assert_close(masters.norm(), length)
        masters.step(1.0, masters.norm())
        assert masters.norm() == 0


def test_large_gradients_do_not_wait_for_the_end_of_the_way_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "LARGE", 1000)
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    backward(named, 1)
    assert named[MATRIX].grad is not None
    masters.add_up()
    # From here on, also of the first micro-batch of a step.
    for seed in (2, 3):
        backward(named, seed)
        assert named[MATRIX].grad is None
        assert named[VISION].grad is not None
        masters.step(1.0, masters.norm())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_sum_of_one_moves_everything_as_the_one_does(dtype: torch.dtype, optimizer: str) -> None:
    moved = []
    for always in (False, True):
        named = parameters(dtype)
        masters = masters_of(named, optimizer=optimizer)
        for seed in range(4):
            backward(named, seed, without=VISION if seed == 2 else "")
            if always:
                masters.add_up()
            masters.step(1.0, masters.norm())
        moved.append({**masters.values(), **masters.moments()})
    assert all(torch.equal(value, moved[1][name]) for name, value in moved[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_what_is_forgotten_leaves_neither_numbers_nor_memory(
    dtype: torch.dtype, optimizer: str
) -> None:
    named, again = parameters(dtype), parameters(dtype)
    masters, others = masters_of(named, optimizer=optimizer), masters_of(again, optimizer=optimizer)
    backward(named, 7)
    masters.add_up()
    backward(named, 8)
    masters.forget_gradients()
    assert all(parameter.grad is None for parameter in named.values())
    if optimizer == "adamw":
        assert not summed(masters)
    assert masters.norm() == 0
    for one, model in ((masters, named), (others, again)):
        for seed in (1, 2):
            backward(model, seed)
            one.add_up()
        backward(model, 3)
        one.step(1.0, one.norm())
    assert all(torch.equal(value, others.values()[n]) for n, value in masters.values().items())


def test_a_stretch_begins_and_ends_within_parameters_or_between_them() -> None:
    pieces = []
    for number, start in enumerate((0, 64, 192)):
        values = nn.Parameter(torch.zeros(50 + number))
        values.grad = None if number == 1 else torch.arange(1.0, 51 + number)
        pieces.append(Piece(str(number), values, slice(start, start + len(values))))
    whole_E = torch.zeros(256)
    for piece in (pieces[0], pieces[2]):
        assert piece.parameter.grad is not None
        whole_E[piece.place] = piece.parameter.grad
    own = Gradients(pieces, 256)
    for place in (slice(0, 256), slice(10, 20), slice(55, 60), slice(40, 200), slice(200, 256)):
        assert torch.equal(own.stretch(place), whole_E[place])
    own.add_up()
    assert torch.equal(own.stretch(slice(40, 200)), whole_E[40:200])
