"""Matmuls fused with GELU: at least as accurate as separate kernels."""

import pytest
import torch
from hf_reference import max_relative_error
from torch import Tensor

from finesight.model import layers
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.layers import QUICK_GELU, TANH_GELU
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.quant.fp8 import Fp8Matrix, Fp8Weight, quantize_fp8

if HAS_TRITON:
    from finesight.model.kernels import gemm_gelu as gemm_gelu_kernels

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
GELUS = {"quick": QUICK_GELU, "tanh": TANH_GELU}
HALF = [torch.bfloat16, torch.float16]
SHAPES = [(300, 80, 264), (128, 64, 256), (1, 8, 16), (777, 1288, 1000), (4200, 72, 1288)]
"""Rows, inputs and outputs: none, some and all unaligned to a tile, and more tiles than programs.
"""

on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="no card of compute capability 9.0"),
]


def random_values(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to("cuda", dtype)


def layer(width: int, outputs: int) -> FusedLinear:
    group = FusedLinear(width, {"fc": outputs}, bias=True).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in group.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return group


@pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
def test_gelu_coefficients_match_reference(gelu):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    expected = x * torch.sigmoid(gelu.linear * x + gelu.cubic * x**3)
    torch.testing.assert_close(gelu.eager(x), expected, rtol=1e-9, atol=1e-12)


class SaturatedDevice:
    """Stub of the kernels' module for a GPU that any matmul saturates."""

    def saturates_device(self, *sizes: object) -> bool:
        return True


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (lambda group, x: (group, x), True),
        (lambda group, x: (with_adapter(group), x), False),
        (lambda group, x: (to_fp8(group), x), False),
        (lambda group, x: (group, quantize_fp8(x)), False),
        (lambda group, x: (group, misaligned(x)), False),
        (lambda group, x: (layer(16, 12).bfloat16(), x), False),
        (lambda group, x: (layer(12, 16).bfloat16(), x[:, :12].contiguous()), False),
    ],
    ids=["plain", "adapter", "fp8", "rows in fp8", "misaligned", "12 outputs", "12 inputs"],
)
def test_kernel_is_used_only_for_supported_inputs(change, taken, monkeypatch):
    monkeypatch.setattr(layers, "has_kernels", lambda x: True)
    monkeypatch.setattr(layers, "is_hopper", lambda device: True)
    monkeypatch.setattr(layers, "gemm_gelu_kernels", SaturatedDevice(), raising=False)
    with torch.no_grad():
        given = change(layer(16, 16).bfloat16(), torch.ones(32, 16, dtype=torch.bfloat16))
        assert (layers.gemm_gelu_operands(*given) is not None) == taken
    assert layers.gemm_gelu_operands(*given) is None, "gradients required"


def with_adapter(group: FusedLinear) -> FusedLinear:
    group.adapter = LoraLinear(group, {"fc": LoraConfig(4, 8.0)}, 0.0)
    return group


def to_fp8(group: FusedLinear) -> FusedLinear:
    group.set_quantized_weight(Fp8Matrix, Fp8Weight)
    return group


class TestKernel:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
    def test_fused_gelu_error_is_not_larger(self, gelu, shape, dtype):
        """Includes strided rows."""
        rows, inputs, outputs = shape
        x = random_values(rows, inputs + 8, dtype=dtype)[:, :inputs]
        bias = None if rows == 128 else random_values(outputs, dtype=dtype, seed=2)
        w = random_values(outputs, inputs + 64, dtype=dtype, scale=0.1)[:, :inputs]
        wide = None if bias is None else bias.double()
        exact = gelu.eager(torch.nn.functional.linear(x.double(), w.double(), wide))
        steps = gelu.eager(torch.nn.functional.linear(x, w, bias))
        found = gemm_gelu_kernels.gemm_gelu(x, w, bias, linear=gelu.linear, cubic=gelu.cubic)
        assert found.shape == exact.shape
        assert max_relative_error(found, exact) <= max_relative_error(steps, exact) + 1e-4

    @pytest.mark.parametrize("gelu", GELUS.values(), ids=GELUS)
    def test_large_values_saturate_correctly(self, gelu):
        x, w = torch.eye(16, device="cuda", dtype=HALF[0]), torch.eye(16, device="cuda")
        sizes = torch.tensor([0.0, 1, 10, 50, 52, 60, 1e2, 1e4]).repeat(2)
        sizes[8:] *= -1
        given = (sizes.to("cuda")[:, None] * w).to(HALF[0])
        found = gemm_gelu_kernels.gemm_gelu(
            given, x, x[0] * 0, linear=gelu.linear, cubic=gelu.cubic
        )
        exact = gelu.eager(given.double())
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-30)
