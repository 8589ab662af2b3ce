"""Products and a GELU of their outputs: as exact as one kernel after the other, or more so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import config, distance
from torch import Tensor

from finesight.model.epilogue import QUICK, TANH, Gelu
from finesight.model.frozen import KERNELS
from finesight.model.linear import GroupedLinear, only
from finesight.model.weights import random_model

if KERNELS:
    from finesight.model.kernels import product as kernels

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GELUS = {"quick": QUICK, "tanh": TANH}
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(300, 80, 264), (128, 64, 256), (1, 8, 16), (777, 1288, 1000)]
"""Rows, inputs and outputs: none, some and all at the edge of a tile."""

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
    group, x_ND = layer(6, 4).requires_grad_(learns), torch.randn(5, 6)
    expected = only(group(x_ND))
    assert torch.equal(QUICK.of(group, x_ND), QUICK.alone(expected))


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
        x, bias = numbers(rows, inputs, dtype=dtype), numbers(outputs, dtype=dtype, seed=2)
        w = numbers(outputs, inputs + 64, dtype=dtype, scale=0.1)[:, :inputs]
        exact = gelu.alone(torch.nn.functional.linear(x.double(), w.double(), bias.double()))
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
        full = programs * kernels.TILE.rows
        assert kernels.fills(full, kernels.TILE.columns, card)
        assert not kernels.fills(full // 2, kernels.TILE.columns, card)
        assert not kernels.fills(full + 1, kernels.TILE.columns, card)
        assert kernels.fills(12 * full + 1, kernels.TILE.columns, card)
        assert not kernels.fills(full, kernels.TILE.columns // 2, card)
        assert not kernels.fills(0, kernels.TILE.columns, card)

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
