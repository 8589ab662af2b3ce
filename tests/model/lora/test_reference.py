"""Fused matmuls, multi-LoRA and decode kernels against `LoraLinear` on random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.lora.fused import FusedWeightSync, LoraMatmul, is_lora_fusible
from finesight.model.lora.multi import (
    LoraRouting,
    MultiLoraLinear,
    detach_adapter,
    install_lora_routing,
)
from finesight.model.quant.int8 import Int8Matrix

Configs = dict[str, LoraConfig]
SIZES = st.integers(1, 40)
CONFIGS = st.builds(LoraConfig, st.integers(1, 9), st.floats(0.5, 16.0))
FEW = settings(max_examples=40, deadline=None, derandomize=True)


def make_linear(
    widths: list[int], inputs: int, bias: bool = True, dtype: torch.dtype = torch.float64
) -> FusedLinear:
    torch.manual_seed(len(widths) + inputs)
    sizes = {f"layer_{index}": width for index, width in enumerate(widths)}
    linear = FusedLinear(inputs, sizes, bias=bias).to(dtype)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    return linear.requires_grad_(False)


def install_adapter(linear: FusedLinear, configs: Configs) -> LoraLinear:
    linear.adapter = adapter = LoraLinear(linear, configs, 0.0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


@FEW
@given(st.lists(SIZES, min_size=1, max_size=4), SIZES, SIZES, CONFIGS, st.booleans(), st.booleans())
def test_fused_matmul_matches_lora_linear(widths, inputs, rows, config, bias, is_sharded):
    """Outputs and all gradients, with the adapter in the weight's matrix and separately."""
    linear = make_linear(widths, inputs, bias)
    adapter = install_adapter(linear, dict.fromkeys(linear.output_sizes, config))
    linear.is_sharded = is_sharded
    x_TI = torch.randn(rows, inputs, dtype=torch.float64, requires_grad=True)
    expected_TO = torch.cat(linear(x_TI), 1)
    dy_TO = torch.randn_like(expected_TO)
    expected_grads = torch.autograd.grad(
        expected_TO, [x_TI, adapter.lora_A, *adapter.lora_B.values()], dy_TO
    )
    with torch.no_grad():
        matmul = LoraMatmul.from_linear(linear)
        assert matmul.lora_A_SI is adapter.lora_A
        assert is_lora_fusible(linear) is not is_sharded
        low_TS = matmul.dropout.scale * x_TI @ matmul.lora_A_SI.T
        padding = x_TI.new_zeros(rows, max(0, matmul.padding - low_TS.shape[1]))
        x_TJ = torch.cat([x_TI, low_TS, padding], 1) if matmul.padding else x_TI
        residual_TO = torch.randn_like(expected_TO)
        torch.testing.assert_close(matmul.forward(x_TJ, low_TS), expected_TO)
        torch.testing.assert_close(
            matmul.forward_add(residual_TO, x_TJ, low_TS), residual_TO + expected_TO
        )
        dx_TI, dlow_TS = matmul.backward(dy_TO)
        dlow_TS = matmul.dropout.scale * dlow_TS
        da_SI, dbs_OR = dlow_TS.T @ x_TI, matmul.lora_B_grads(dy_TO, low_TS)
        grads = [dx_TI + dlow_TS @ matmul.lora_A_SI, da_SI, *dbs_OR]
        torch.testing.assert_close(grads, list(expected_grads))
        torch.testing.assert_close(matmul.lora_backward(dy_TO), matmul.backward(dy_TO)[1])


def test_replaced_up_projections_are_fused_again():
    linear = make_linear([5, 3], 6)
    config = dict.fromkeys(linear.output_sizes, LoraConfig(2, 4.0))
    install_adapter(linear, config)
    first = LoraMatmul.from_linear(linear).fused_weight_OJ
    assert LoraMatmul.from_linear(linear).fused_weight_OJ is first
    install_adapter(linear, config)
    assert LoraMatmul.from_linear(linear).fused_weight_OJ is not first


def test_weights_without_dense_values_are_not_fused():
    linear = make_linear([16], 32)
    FusedWeightSync().copy_up_projections([linear])
    assert linear.fused_lora_weight is None
    linear.set_quantized_weight(Int8Matrix)
    install_adapter(linear, {"layer_0": LoraConfig(2, 4.0)})
    FusedWeightSync().copy_up_projections([linear])
    assert linear.fused_lora_weight is None
    assert LoraMatmul.from_linear(linear).padding == 0


def install_multi_lora(
    linear: FusedLinear, adapters: list[Configs]
) -> tuple[LoraRouting, list[LoraLinear | None]]:
    """Install several adapters at once, and return them for the reference."""
    model = nn.ModuleDict({"linear": linear})
    layers, references = [], []
    for configs in adapters:
        references.append(install_adapter(linear, configs) if configs else None)
        layers.append(detach_adapter(model))
        assert linear.adapter is None
    routing = install_lora_routing(model, layers)
    assert routing is not None
    return routing, references


def expected_rows(linear: FusedLinear, adapters: list[LoraLinear | None], x_TI: Tensor) -> Tensor:
    """Return the outputs of `LoraLinear`, with the adapter of each row."""
    installed, rows = linear.adapter, []
    for row, adapter in enumerate(adapters):
        linear.adapter = adapter
        rows.append(torch.cat(linear(x_TI[row : row + 1]), 1))
    linear.adapter = installed
    return torch.cat(rows)


@FEW
@given(st.data(), st.lists(SIZES, min_size=1, max_size=3), SIZES, st.booleans())
@torch.no_grad()
def test_multi_lora_matches_lora_linear(data, widths, inputs, bias):
    """Adapters of any subset of the layers, with ranks and scales of their own, or none."""
    linear = make_linear(widths, inputs, bias)
    layer_configs = st.dictionaries(st.sampled_from(list(linear.output_sizes)), CONFIGS)
    adapters = data.draw(st.lists(layer_configs, min_size=1, max_size=4).filter(any))
    choices = st.none() | st.integers(0, len(adapters) - 1)
    chosen = data.draw(st.lists(choices, min_size=1, max_size=6))
    routing, references = install_multi_lora(linear, adapters)
    x_TI = torch.randn(len(chosen), inputs, dtype=torch.float64)
    of_rows = [None if index is None else references[index] for index in chosen]
    expected_TO = expected_rows(linear, of_rows, x_TI)
    routing.set_mask(torch.cat([routing.build_mask(index) for index in chosen]))
    # The scales of the ranks are in fp32.
    torch.testing.assert_close(torch.cat(linear(x_TI), 1), expected_TO, rtol=1e-5, atol=1e-4)
    multi = linear.adapter
    assert isinstance(multi, MultiLoraLinear)
    base_TO = nn.functional.linear(x_TI, linear.weight, linear.bias)
    torch.testing.assert_close(multi.add_delta(base_TO, x_TI), expected_TO, rtol=1e-5, atol=1e-4)
    # One mask for all tokens, in batches as in a vision encoder.
    routing.set_mask(routing.build_mask(chosen[0]))
    found = torch.cat(linear(x_TI.unsqueeze(0)), -1)[0]
    expected_TO = expected_rows(linear, of_rows[:1] * len(chosen), x_TI)
    torch.testing.assert_close(found, expected_TO, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_scale_beyond_the_range_of_fp16():
    """An adapter with tiny weights may have a large alpha."""
    linear = make_linear([5], 6, dtype=torch.float16)
    adapter = install_adapter(linear, {"layer_0": LoraConfig(1, 1e6)})
    for parameter in adapter.parameters():
        parameter.fill_(1e-4)
    x_TI = torch.ones(2, 6, dtype=torch.float16)
    (expected,) = linear(x_TI)
    assert expected.isfinite().all()
    model = nn.ModuleDict({"linear": linear})
    layers = detach_adapter(model)
    (base,) = linear(x_TI)
    routing = install_lora_routing(model, [layers])
    assert routing is not None
    for index, output in ((0, expected), (None, base)):
        routing.set_mask(routing.build_mask(index))
        torch.testing.assert_close(linear(x_TI)[0], output)
    assert not torch.allclose(base, expected)
