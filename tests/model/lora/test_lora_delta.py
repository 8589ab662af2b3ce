"""Small LoRA deltas survive rounding when added to base products."""

from typing import Any

import pytest
import torch
from lora_fixtures import make_group, quantize_linear
from torch import Tensor, nn

from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear, RowRange, add_lora_delta
from finesight.model.lora.fused import LoraMatmul, multiply
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight
from finesight.model.quant.int8 import Int8Matrix

WIDTHS = {"gate_proj": 320, "up_proj": 192}
INT8, FP8 = (Int8Matrix,), (Fp8Matrix, Fp8Weight)
Kind = tuple[type[Any], ...] | None
RANK = 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NARROW = [torch.bfloat16, torch.float16]
SMALL = {torch.bfloat16: 2.0**-12, torch.float16: 2.0**-15}
"""Delta relative to the base product, near the precision of each dtype."""


def make_adapted_layer(
    names: list[str], bias: bool, kind: Kind, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[FusedLinear, Tensor]:
    """Return a fused linear with small deltas in the named layers, and an input."""
    if kind is FP8 and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("a card that does not multiply in FP8")
    group = make_group(WIDTHS, 256, dtype)
    if not bias:
        group.bias = None
    if kind is not None:
        quantize_linear(group, *kind)
    low = dict.fromkeys(names, LoraConfig(RANK, float(RANK)))
    adapter = LoraLinear(group, low, 0.0, dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)
    for b_OR in adapter.lora_B.values():
        b_OR.data.mul_(SMALL[dtype] * RANK**-0.5)
    group.adapter = adapter
    x_TI = torch.randn(400, 256, generator=generator).to(dtype)
    return group.train().to(device), x_TI.to(device)


def preserved_fraction(group: FusedLinear, x_TI: Tensor, found: list[Tensor]) -> float:
    """Return the preserved fraction of all deltas, 1 without rounding loss."""
    adapter = group.adapter
    assert isinstance(adapter, LoraLinear)
    group.adapter = None
    bare = dict(zip(group.output_sizes, group(x_TI), strict=True))
    mine = dict(zip(group.output_sizes, found, strict=True))
    along = full = 0.0
    for name, (a_RI, b_OR) in adapter.factors().items():
        delta_TO = (x_TI @ a_RI.T).double() @ b_OR.double().T
        assert delta_TO.abs().mean() < 2**-8 * bare[name].abs().mean(), "the delta is too large"
        along += float(((mine[name].double() - bare[name].double()) * delta_TO).sum())
        full += float((delta_TO * delta_TO).sum())
    return along / full


@torch.no_grad()
@pytest.mark.parametrize("names", [["gate_proj", "up_proj"], ["up_proj"]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, INT8, FP8])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("device", DEVICES)
def test_small_lora_delta_is_not_lost_to_rounding(names, bias, kind, dtype, device):
    group, x_TI = make_adapted_layer(names, bias, kind, device, dtype)
    found = group(x_TI)
    assert preserved_fraction(group, x_TI, list(found)) == pytest.approx(1.0, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, INT8])
@pytest.mark.parametrize("device", DEVICES)
def test_multi_lora_delta_is_not_lost_to_rounding(bias, kind, device):
    group, x_TI = make_adapted_layer(list(WIDTHS), bias, kind, device)
    trained, model = group.adapter, nn.ModuleDict({"gate_up_proj": group.eval()})
    routing = install_lora_routing(model, [detach_adapter(model)])
    assert routing is not None
    routing.set_mask(routing.build_mask(0))
    found = list(group(x_TI))
    routing.set_mask(routing.build_mask(None))
    base = list(group(x_TI))
    group.adapter = trained
    assert preserved_fraction(group, x_TI, found) == pytest.approx(1.0, abs=0.1)
    # A CPU rounds the sum with a bias again.
    if device == "cuda" or not bias:
        assert all(map(torch.equal, base, group(x_TI)))


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", [None, INT8, FP8])
@pytest.mark.parametrize("device", [DEVICES[1]])
def test_fused_layer_delta_is_not_lost_to_rounding(apart, kind, device):
    group, x_TI = make_adapted_layer(list(WIDTHS), True, kind, device)
    group.is_sharded = apart
    adapter = group.adapter
    assert isinstance(adapter, LoraLinear)
    wide, low_TS = LoraMatmul.from_linear(group), x_TI @ adapter.lora_A.T
    x_TJ = torch.nn.functional.pad(
        torch.cat([x_TI, low_TS], 1), (0, wide.padding - low_TS.shape[1])
    )
    y_TO = wide.forward(x_TJ if wide.padding else x_TI, low_TS)
    found = list(y_TO.split(list(WIDTHS.values()), 1))
    assert preserved_fraction(group, x_TI, found) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("device", [DEVICES[1]])
def test_stochastic_rounding_depends_on_value_and_column(dtype, device):
    """Rows are independent of the batch; non-finite values and zero deltas are unchanged."""
    generator = torch.Generator(device).manual_seed(2)
    y_TO, low_TR, b_OR = (
        torch.randn(*shape, device=device, generator=generator).to(dtype)
        for shape in ((200, 300), (200, 24), (300, 24))
    )
    y_TO[:3, 0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    alone_TO = torch.cat(
        [add_lora_delta(y_TO[t : t + 1].clone(), low_TR[t : t + 1], b_OR, 0.5) for t in range(200)]
    )
    # Slices of wider tensors, as in a fused linear.
    wide_TO, wide_TR, wide_OR = (torch.cat([part] * 2, 1) for part in (y_TO, low_TR, b_OR))
    found_TO = add_lora_delta(wide_TO[:, :300], wide_TR[:, 24:], wide_OR[:, 24:], 0.5)
    torch.testing.assert_close(found_TO, alone_TO, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide_TO[:, 300:], y_TO, rtol=0, atol=0, equal_nan=True)
    assert not alone_TO[:3, 0].isfinite().any()
    assert alone_TO[:, 1:].isfinite().all()
    empty_TR = torch.zeros_like(low_TR[1:])
    assert torch.equal(add_lora_delta(y_TO[1:, 1:].clone(), empty_TR, b_OR[1:]), y_TO[1:, 1:])


@pytest.mark.parametrize("rows", [3, 8, 16, 40])
@pytest.mark.parametrize("added", ["nothing", "bias", "residual"])
def test_products_in_blocks_of_rows_equal_whole_products(rows, added):
    x_TJ, weight_OJ = torch.randn(rows, 24), torch.randn(12, 24)
    bias = torch.randn(12) if added == "bias" else None
    residual_TO = torch.randn(rows, 12) if added == "residual" else None
    operands = x_TJ, weight_OJ, bias, residual_TO
    torch.testing.assert_close(multiply(*operands, RowRange(8, 16)), multiply(*operands, None))
