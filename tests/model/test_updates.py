"""What adapters add to a product is not lost in its last digit, however small it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_lora import make_group
from torch import Tensor, nn

from finesight.model.bank import Bank
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import FrozenWeight
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.rowwise import Fp8Matrix, Int8Matrix
from finesight.model.updates import add_update
from finesight.model.wide import Wide

WIDTHS = {"gate_proj": 320, "up_proj": 192}
Kind = Callable[[GroupedLinear], None] | None
RANK = 16
ON_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CARD)]
NARROW = [torch.bfloat16, torch.float16]
SMALL = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15}
"""Of an update beside the product that it is added to: these have eight and eleven digits."""


def few_bits(group: GroupedLinear) -> None:
    values_OI = group.weight.data.split(list(WIDTHS.values()))
    group.freeze_as(Int8Matrix)
    fill(group, values_OI)


def in_fp8(group: GroupedLinear) -> None:
    values_OI = group.weight.data.split(list(WIDTHS.values()))
    group.freeze_as(Fp8Matrix, Fp8Weight)
    fill(group, values_OI)


def fill(group: GroupedLinear, values_OI: tuple[Tensor, ...]) -> None:
    assert isinstance(group.weight, FrozenWeight)
    for matrix, some in zip(group.weight.matrices, values_OI, strict=True):
        matrix.pieces()[0].fill(some)


def adapted(
    names: list[str], bias: bool, kind: Kind, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[GroupedLinear, Tensor]:
    """A group of layers, of which these carry an adapter whose updates are small, and an input."""
    if kind is in_fp8 and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a card that does not multiply in FP8")
    group = make_group(WIDTHS, 256, dtype)
    if not bias:
        group.bias = None
    if kind is not None:
        kind(group)
    low = dict.fromkeys(names, LowRank(RANK, float(RANK)))
    adapter = LoraGroup(group, low, 0.0, dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)
    for b_OR in adapter.b.values():
        b_OR.data.mul_(SMALL[dtype] * RANK**-0.5)
    group.adapter = adapter
    x_TI = torch.randn(400, 256, generator=generator).to(dtype)
    return group.train().to(device), x_TI.to(device)


def share_kept(group: GroupedLinear, x_TI: Tensor, found: list[Tensor]) -> float:
    """Of all updates: 1 where what a product with them has more than one without is what they say,
    0 where nothing of them is there."""
    adapter = group.adapter
    assert isinstance(adapter, LoraGroup)
    group.adapter = None
    bare = dict(zip(group.outputs, group(x_TI), strict=True))
    mine = dict(zip(group.outputs, found, strict=True))
    along = whole = 0.0
    for name, (a_RI, b_OR) in adapter.factors().items():
        update_TO = (x_TI @ a_RI.T).double() @ b_OR.double().T
        assert update_TO.abs().mean() < 2**-8 * bare[name].abs().mean(), "no small update"
        along += float(((mine[name].double() - bare[name].double()) * update_TO).sum())
        whole += float((update_TO * update_TO).sum())
    return along / whole


@torch.no_grad()
@pytest.mark.parametrize("names", [["gate_proj", "up_proj"], ["up_proj"]], ids=len)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, few_bits, in_fp8])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_a_small_update_is_lost(
    names: list[str], bias: bool, kind: Kind, dtype: torch.dtype, device: str
) -> None:
    group, x_TI = adapted(names, bias, kind, device, dtype)
    found = group(x_TI)
    assert share_kept(group, x_TI, list(found)) == pytest.approx(1.0, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, few_bits, in_fp8])
@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_without_an_adapter_gives_what_it_gave(kind: Kind, device: str) -> None:
    group, x_TI = adapted(["up_proj"], True, kind, device)
    gate_TO, _ = group(x_TI)
    group.adapter = None
    assert torch.equal(gate_TO, group(x_TI)[0])


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, few_bits])
@pytest.mark.parametrize("device", DEVICES)
def test_nor_where_it_is_one_of_several_to_answer_with(bias: bool, kind: Kind, device: str) -> None:
    group, x_TI = adapted(list(WIDTHS), bias, kind, device)
    trained, bank = group.adapter, Bank(nn.ModuleDict({"gate_up_proj": group.eval()}))
    bank.take()
    readers = bank.install()
    assert readers is not None
    readers.choose(readers.mask(0))
    found = list(group(x_TI))
    readers.choose(readers.mask(None))
    base = list(group(x_TI))
    group.adapter = trained
    assert share_kept(group, x_TI, found) == pytest.approx(1.0, abs=0.1)
    # A processor rounds the sum with a bias again.
    if device == "cuda" or not bias:
        assert all(map(torch.equal, base, group(x_TI)))


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", [None, few_bits, in_fp8])
@pytest.mark.parametrize("device", [DEVICES[1]])
def test_nor_where_layers_lie_side_by_side(apart: bool, kind: Kind, device: str) -> None:
    group, x_TI = adapted(list(WIDTHS), True, kind, device)
    group.apart = apart
    adapter = group.adapter
    assert isinstance(adapter, LoraGroup)
    wide, low_TS = Wide.of(group), x_TI @ adapter.a.T
    x_TJ = torch.nn.functional.pad(torch.cat([x_TI, low_TS], 1), (0, wide.room - low_TS.shape[1]))
    y_TO = wide.forth(x_TJ if wide.room else x_TI, low_TS)
    found = list(y_TO.split(list(WIDTHS.values()), 1))
    assert share_kept(group, x_TI, found) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("device", [DEVICES[1]])
def test_chance_hangs_on_a_number_and_its_column_alone(dtype: torch.dtype, device: str) -> None:
    """Rows give what they give alone; what is not finite stays so, and what gets nothing."""
    generator = torch.Generator(device).manual_seed(2)
    y_TO, low_TR, b_OR = (
        torch.randn(*shape, device=device, generator=generator).to(dtype)
        for shape in ((200, 300), (200, 24), (300, 24))
    )
    y_TO[:3, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    alone_TO = torch.cat(
        [add_update(y_TO[t : t + 1].clone(), low_TR[t : t + 1], b_OR, 0.5) for t in range(200)]
    )
    # Parts of wider tensors, as a group's layers and ranks are.
    wide_TO, wide_TR, wide_OR = (torch.cat([part] * 2, 1) for part in (y_TO, low_TR, b_OR))
    found_TO = add_update(wide_TO[:, :300], wide_TR[:, 24:], wide_OR[:, 24:], 0.5)
    torch.testing.assert_close(found_TO, alone_TO, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide_TO[:, 300:], y_TO, rtol=0, atol=0, equal_nan=True)
    assert not alone_TO[:3, 0].isfinite().any()
    assert alone_TO[:, 1:].isfinite().all()
    nothing_TR = torch.zeros_like(low_TR[1:])
    assert torch.equal(add_update(y_TO[1:, 1:].clone(), nothing_TR, b_OR[1:]), y_TO[1:, 1:])
