"""INT4 rounding while loading: errors and column order."""

from __future__ import annotations

import pytest
import torch
from each_value import each
from torch import Tensor

from finesight.model.quant import base
from finesight.model.quant.int4 import DEFAULT_GROUP_SIZE, RtnInt4Matrix

SHAPES = [(40, 64), (8, 256), (24, 96), (5, 200), (3, 2)]


def random_values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantize(values: Tensor) -> RtnInt4Matrix:
    matrix = RtnInt4Matrix(*values.shape)
    matrix.quantize(values)
    return matrix


@each("shape", SHAPES)
@each("shift", [-3.0, 0.0, 0.4, 3.0])
@each("size", [1e-2, 1.0, 1e3])
@each("at_once", [base.CHUNK_ELEMENTS, 300])
def test_quantization_error_is_at_most_half_a_scale(
    shape: tuple[int, int],
    shift: float,
    size: float,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Includes groups with one sign, a smaller last group, and zeros, which stay zero."""
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    values = (random_values(shape) + shift) * size
    values[:, ::3] = 0
    matrix = quantize(values)
    found = matrix.dequantize(torch.float32)
    scales_OI = matrix.scales_OG.float().repeat_interleave(DEFAULT_GROUP_SIZE, 1)[:, : shape[1]]
    # An fp16 scale is off by 2^-11, 15 codes by 15 times that.
    assert bool(((found - values).abs() <= scales_OI * (0.5 + 15 * 2**-11)).all())
    assert not found[:, ::3].any()


@each("size", [0.0, 1e-9, 1e-6])
def test_tiny_values_have_small_error(size: float) -> None:
    values = random_values((4, 128)) * size
    found = quantize(values).dequantize(torch.float32)
    assert bool(found.isfinite().all())
    assert float((found - values).abs().max()) <= 2**-24 * 16


def test_columns_are_not_permuted() -> None:
    """Codes of the two halves of a row share bytes."""
    values = torch.zeros(2, 128)
    values[0, 5], values[1, 100] = 3.0, -2.0
    found = quantize(values).dequantize(torch.float32)
    torch.testing.assert_close(found, values, rtol=1e-3, atol=0)
