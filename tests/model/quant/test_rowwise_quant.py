"""INT8 and FP8 weights: codes, errors and matmuls."""

import pytest
import torch
from each_value import each
from torch import Tensor

from finesight.model.quant import base
from finesight.model.quant.fp8 import Fp8Matrix
from finesight.model.quant.int8 import Int8Matrix, RowwiseMatrix

KINDS = [Int8Matrix, Fp8Matrix]
SHAPES = [(40, 64), (7, 3), (33, 80), (1, 1), (300, 17), (4096, 16)]


def random_values(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantize(kind: type[RowwiseMatrix], values: Tensor) -> RowwiseMatrix:
    matrix = kind(*values.shape)
    matrix.quantize(values)
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@each("shape", SHAPES)
@each("size", [1e-30, 1e-3, 1.0, 1e30])
def test_quantization_error_is_bounded(kind, shape, size):
    """The largest value of a row is exact: beyond the largest FP8 code there is only NaN."""
    values = random_values(shape) * size
    # One output is dominated by a single element, and one is all zeros.
    values[0, 0] *= 100
    values[-1] = 0 if len(values) > 1 else values[-1]
    matrix = quantize(kind, values)
    found, scales = matrix.dequantize(torch.float32), matrix.scales_O[:, None].expand_as(values)
    bound = scales / 2 if kind is Int8Matrix else (values.abs() / 16).maximum(scales * 2**-10)
    assert bool(((found - values).abs() <= bound * (1 + 1e-5)).all())
    assert len(values) == 1 or not found[-1].any()
    largest = values.abs().argmax(1, keepdim=True)
    found_O1, largest_O1 = (x.gather(1, largest) for x in (found, values))
    torch.testing.assert_close(found_O1, largest_O1, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [base.CHUNK_ELEMENTS, 100])
def test_values_are_rounded_once(kind, at_once, monkeypatch):
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    matrix = quantize(kind, random_values((33, 80)))
    exact = matrix.codes_OI.double() * matrix.scales_O[:, None].double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dequantize(dtype), exact.float().to(dtype))
