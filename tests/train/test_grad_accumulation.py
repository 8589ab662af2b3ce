"""Gradients of one micro-batch and of several: the same sums, and no more memory than they need."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from finesight.config import TrainSettings
from finesight.train import optimizer as module
from finesight.train.optimizer import GradientAccumulator, MasterWeightOptimizer, ParamSlice

MATRIX, VISION = "model.layers.0.mlp.down_proj.weight", "visual.blocks.0.attn.qkv.weight"
SHAPES = {VISION: (8, 12), MATRIX: (33, 50), "model.layers.1.mlp.down_proj.weight": (5, 7)}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def masters_of(named: dict[str, nn.Parameter], **changes: object) -> MasterWeightOptimizer:
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return MasterWeightOptimizer(named, TrainSettings.model_validate(given))


def backward(named: dict[str, nn.Parameter], seed: int, without: str = "") -> dict[str, Tensor]:
    """Gradients as returned come to all parameters but one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in named.items()}
    drawn.pop(without, None)
    torch.stack([(named[n] * g).sum() for n, g in drawn.items()]).sum().backward()
    return drawn


def sums(masters: MasterWeightOptimizer) -> dict[str, Tensor | None]:
    return {
        piece.name: found
        for group in masters.param_groups
        for piece, found in zip(group.param_slices, group.gradients.per_parameter(), strict=True)
    }


def has_accumulator(masters: MasterWeightOptimizer) -> bool:
    """Whether there is memory for sums."""
    return any(own is not None for group in masters.param_groups for own in group.gradients.sums)


def test_optimizer_memory_is_released_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in a long-lived process, such as a notebook, frees its memory."""
    monkeypatch.setattr(module, "LARGE_PARAM_ELEMENTS", 1)
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    backward(named, 1)
    alive = [weakref.ref(parameter) for parameter in named.values()]
    del masters, named
    gc.collect()
    assert [one() for one in alive] == [None] * len(alive)


def test_single_micro_batch_needs_no_accumulation() -> None:
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    drawn = backward(named, 1, without=VISION)
    for name, found in sums(masters).items():
        assert found is named[name].grad
        assert (found is None) == (name == VISION)
        assert found is None or torch.equal(found, drawn[name])
    assert not has_accumulator(masters)
    masters.step(1.0, masters.grad_norm())
    assert all(parameter.grad is None for parameter in named.values())
    assert not has_accumulator(masters)


@pytest.mark.parametrize("large", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradients_are_accumulated_in_fp32(
    dtype: torch.dtype, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come at once and those that come later, to all parameters or not, step by step."""
    monkeypatch.setattr(module, "LARGE_PARAM_ELEMENTS", large)
    named = parameters(dtype)
    masters = masters_of(named)
    for step in range(3):
        expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for micro, without in enumerate(("", VISION, MATRIX, VISION)):
            if micro:
                masters.accumulate_gradients()
                assert all(parameter.grad is None for parameter in named.values())
            for name, drawn in backward(named, 10 * step + micro, without).items():
                expected[name] += drawn.float()
        found = sums(masters)
        assert all(torch.equal(found[name], total) for name, total in expected.items())
        length = torch.cat([total.flatten() for total in expected.values()]).norm()
        torch.testing.assert_close(masters.grad_norm(), length)
        masters.step(1.0, masters.grad_norm())
        assert masters.grad_norm() == 0


def test_large_gradients_are_accumulated_during_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LARGE_PARAM_ELEMENTS", 1000)
    named = parameters(torch.bfloat16)
    masters = masters_of(named)
    backward(named, 1)
    assert named[MATRIX].grad is not None
    masters.accumulate_gradients()
    # From here on, also of the first micro-batch of a step.
    for seed in (2, 3):
        backward(named, seed)
        assert named[MATRIX].grad is None
        assert named[VISION].grad is not None
        masters.step(1.0, masters.grad_norm())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_accumulated_single_gradient_gives_equal_step(dtype: torch.dtype, optimizer: str) -> None:
    changed = []
    for always in (False, True):
        named = parameters(dtype)
        masters = masters_of(named, optimizer=optimizer)
        for seed in range(4):
            backward(named, seed, without=VISION if seed == 2 else "")
            if always:
                masters.accumulate_gradients()
            masters.step(1.0, masters.grad_norm())
        changed.append({**masters.master_weights(), **masters.optimizer_state()})
    assert all(torch.equal(value, changed[1][name]) for name, value in changed[0].items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_dropped_gradients_leave_no_state(dtype: torch.dtype, optimizer: str) -> None:
    named, again = parameters(dtype), parameters(dtype)
    masters, others = masters_of(named, optimizer=optimizer), masters_of(again, optimizer=optimizer)
    backward(named, 7)
    masters.accumulate_gradients()
    backward(named, 8)
    masters.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())
    if optimizer == "adamw":
        assert not has_accumulator(masters)
    assert masters.grad_norm() == 0
    for one, model in ((masters, named), (others, again)):
        for seed in (1, 2):
            backward(model, seed)
            one.accumulate_gradients()
        backward(model, 3)
        one.step(1.0, one.grad_norm())
    assert all(
        torch.equal(value, others.master_weights()[n])
        for n, value in masters.master_weights().items()
    )


def test_gradient_slices_cross_parameter_boundaries() -> None:
    pieces = []
    for number, start in enumerate((0, 64, 192)):
        values = nn.Parameter(torch.zeros(50 + number))
        values.grad = None if number == 1 else torch.arange(1.0, 51 + number)
        pieces.append(ParamSlice(str(number), values, slice(start, start + len(values))))
    full_E = torch.zeros(256)
    for piece in (pieces[0], pieces[2]):
        assert piece.parameter.grad is not None
        full_E[piece.flat_slice] = piece.parameter.grad
    own = GradientAccumulator(pieces, 256)
    for location in (slice(0, 256), slice(10, 20), slice(55, 60), slice(40, 200), slice(200, 256)):
        assert torch.equal(own.read_slice(location), full_E[location])
    own.accumulate()
    assert torch.equal(own.read_slice(slice(40, 200)), full_E[40:200])
