"""INT8 and FP8 weights: codes, errors and matmuls."""

import pytest
import torch
from each_value import each
from torch import Tensor

from finesight.model.quant import base
from finesight.model.quant.fp8 import Fp8Matrix
from finesight.model.quant.int8 import Int8Matrix, RowwiseMatrix

KINDS = [Int8Matrix, Fp8Matrix]
SHAPES = [(40, 64), (7, 3), (33, 80), (1, 1), (300, 17)]


def random_values(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantize(kind: type[RowwiseMatrix], values: Tensor) -> RowwiseMatrix:
    matrix = kind(*values.shape)
    matrix.quantize(values)
    return matrix


def max_error(matrix: RowwiseMatrix, values: Tensor) -> Tensor:
    """Return the error bound of each element, plus half a unit of fp32 rounding."""
    scales = matrix.scales_O[:, None].expand_as(values)
    if isinstance(matrix, Int8Matrix):
        return scales / 2 * (1 + 1e-5)
    return torch.maximum(values.abs() / 16, scales * 2**-10) * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@each("shape", SHAPES)
@each("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantization_error_is_bounded(kind, shape, size):
    values = random_values(shape) * size
    # One output is dominated by a single element, and one is all zeros.
    values[0, 0] *= 100
    values[-1] = 0 if len(values) > 1 else values[-1]
    matrix = quantize(kind, values)
    off = matrix.dequantize(torch.float32) - values
    assert bool((off.abs() <= max_error(matrix, values)).all())
    assert len(values) == 1 or not matrix.dequantize(torch.float32)[-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_row_maximum_is_exact(kind: type[RowwiseMatrix]) -> None:
    """Includes quotients rounded up: beyond the largest FP8 code there is only NaN."""
    values = random_values((4096, 16))
    found = quantize(kind, values).dequantize(torch.float32)
    largest = values.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(
        found.gather(1, largest), values.gather(1, largest), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [base.CHUNK_ELEMENTS, 100])
def test_values_are_rounded_once(kind, at_once, monkeypatch):
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    matrix = quantize(kind, random_values((33, 80)))
    exact = matrix.codes_OI.double() * matrix.scales_O[:, None].double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dequantize(dtype), exact.float().to(dtype))
