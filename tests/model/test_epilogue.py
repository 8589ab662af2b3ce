"""Products and a GELU of their outputs: as exact as one kernel after the other, or more so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import config, distance
from torch import Tensor

from finesight.model import epilogue
from finesight.model.epilogue import QUICK, TANH, Gelu
from finesight.model.fp8 import Fp8Weight, quantised
from finesight.model.frozen import KERNELS
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.rowwise import Fp8Matrix
from finesight.model.weights import random_model

if KERNELS:
    from finesight.model.kernels import product as kernels

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GELUS = {"quick": QUICK, "tanh": TANH}
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(300, 80, 264), (128, 64, 256), (1, 8, 16), (777, 1288, 1000), (4200, 72, 1288)]
"""Rows, inputs and outputs: none, some and all at the edge of a tile, and more tiles than programs,
in several bands."""

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="no card of compute capability 9.0"),
]


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to("cuda", dtype)


def layer(width: int, outputs: int) -> GroupedLinear:
    """One that does not learn."""
    group = GroupedLinear(width, {"fc": outputs}, bias=True).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in group.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return group


@pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
def test_what_a_kernel_is_told_is_what_is_computed_alone(gelu: Gelu) -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    expected = x * torch.sigmoid(gelu.linear * x + gelu.cubic * x**3)
    torch.testing.assert_close(gelu.alone(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learns", [False, True])
def test_without_a_kernel_it_is_one_after_the_other(learns: bool) -> None:
    x_ND = torch.linspace(-3, 3, 30).view(5, 6)
    group = layer(6, 4).requires_grad_(learns)
    y_NF = x_ND @ group.weight.T + group.bias
    torch.testing.assert_close(QUICK.of(group, x_ND), y_NF * torch.sigmoid(1.702 * y_NF))


class Busy:
    """In place of the kernels' module: a card that any product keeps busy."""

    def fills(self, *sizes: object) -> bool:
        return True


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda group, x: (group, x), True),
        (lambda group, x: (adapted(group), x), False),
        (lambda group, x: (in_fp8(group), x), False),
        (lambda group, x: (group, quantised(x)), False),
        (lambda group, x: (group, misaligned(x)), False),
        (lambda group, x: (layer(16, 12).bfloat16(), x), False),
        (lambda group, x: (layer(12, 16).bfloat16(), x[:, :12].contiguous()), False),
    ],
    ids=["plain", "adapter", "fp8", "rows in fp8", "misaligned", "12 outputs", "12 inputs"],
)
def test_what_the_kernel_cannot_take_it_is_not_given(
    change: Callable[[GroupedLinear, Tensor], tuple[GroupedLinear, Any]],
    taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epilogue, "has_kernels", lambda x: True)
    monkeypatch.setattr(epilogue, "_is_hopper", lambda device: True)
    monkeypatch.setattr(epilogue, "kernels", Busy(), raising=False)
    with torch.no_grad():
        given = change(layer(16, 16).bfloat16(), torch.ones(32, 16, dtype=torch.bfloat16))
        assert (epilogue._operands(*given) is not None) == taken
    assert epilogue._operands(*given) is None, "what goes back"


def adapted(group: GroupedLinear) -> GroupedLinear:
    group.adapter = LoraGroup(group, {"fc": LowRank(4, 8.0)}, 0.0)
    return group


def in_fp8(group: GroupedLinear) -> GroupedLinear:
    group.freeze_as(Fp8Matrix, Fp8Weight)
    return group


class TestKernel:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
    def test_a_gelu_is_nearer_than_in_two_steps(
        self, gelu: Gelu, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        """Of rows that lie apart, too."""
        rows, inputs, outputs = shape
        x = numbers(rows, inputs + 8, dtype=dtype)[:, :inputs]
        bias = None if rows == 128 else numbers(outputs, dtype=dtype, seed=2)
        w = numbers(outputs, inputs + 64, dtype=dtype, scale=0.1)[:, :inputs]
        wide = None if bias is None else bias.double()
        exact = gelu.alone(torch.nn.functional.linear(x.double(), w.double(), wide))
        steps = gelu.alone(torch.nn.functional.linear(x, w, bias))
        found = kernels.activated(x, w, bias, linear=gelu.linear, cubic=gelu.cubic)
        assert found.shape == exact.shape
        assert distance(found, exact) <= distance(steps, exact) + 1e-4

    def test_a_row_is_the_same_in_any_company(self) -> None:
        x, w = numbers(700, 256, dtype=HALF[0]), numbers(512, 256, dtype=HALF[0], scale=0.1)
        bias = numbers(512, dtype=HALF[0])
        factors = {"linear": QUICK.linear, "cubic": QUICK.cubic}
        whole = kernels.activated(x, w, bias, **factors)
        for start, stop in ((0, 1), (100, 300), (699, 700)):
            part = kernels.activated(x[start:stop], w, bias, **factors)
            assert torch.equal(part, whole[start:stop])

    @pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
    def test_large_numbers_stay_or_vanish(self, gelu: Gelu) -> None:
        x, w = torch.eye(16, device="cuda", dtype=HALF[0]), torch.eye(16, device="cuda")
        sizes = torch.tensor([0.0, 1, 10, 50, 52, 60, 1e2, 1e4]).repeat(2)
        sizes[8:] *= -1
        given = (sizes.to("cuda")[:, None] * w).to(HALF[0])
        found = kernels.activated(given, x, x[0] * 0, linear=gelu.linear, cubic=gelu.cubic)
        exact = gelu.alone(given.double())
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-30)

    def test_only_products_that_keep_a_card_busy_are_taken(self) -> None:
        card = torch.device("cuda")
        programs = torch.cuda.get_device_properties(card).multi_processor_count
        full, width = kernels.ROUNDS * programs * kernels.TILE.rows, kernels.TILE.columns
        assert kernels.fills(full, width, card)
        assert not kernels.fills(full // 2, width, card)
        assert not kernels.fills(full + 1, width, card)
        assert kernels.fills(12 * full + 1, width, card)
        assert not kernels.fills(full, width // 2, card)
        assert not kernels.fills(0, width, card)

    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
    def test_a_tower_sees_what_it_saw(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """And learns without: what goes back has kernels of its own."""
        card = torch.device("cuda")
        settings = config(family, vision={"intermediate_size": 64})
        wide = random_model(settings, 0, torch.float32, card)
        grids, seed = ((1, 10, 12), (1, 4, 6)), torch.Generator().manual_seed(0)
        channels = wide.geometry.vision.patch_numbers
        patches = torch.randint(0, 256, (144, channels), generator=seed).to(card, torch.uint8)
        model = copy.deepcopy(wide).to(torch.bfloat16)
        exact = wide.see(patches, grids)
        taken: list[Any] = []
        launch = kernels.activated

        def counted(*given: Any, **factors: float) -> Tensor:
            taken.append(given)
            return launch(*given, **factors)

        monkeypatch.setattr(kernels, "activated", counted)
        with torch.no_grad():
            steps = model.see(patches, grids)
            assert not taken
            monkeypatch.setattr(kernels, "fills", lambda *_: True)
            found = model.see(patches, grids)
        assert taken
        assert distance(found, exact) <= 1.5 * distance(steps, exact)
        taken.clear()
        model.see(patches, grids)
        assert not taken
