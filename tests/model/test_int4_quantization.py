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


def expand_scales(matrix: RtnInt4Matrix, of_groups: Tensor) -> Tensor:
    return of_groups.float().repeat_interleave(DEFAULT_GROUP_SIZE, 1)[:, : matrix.in_features]


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
    """Includes groups with one sign, and a smaller last group."""
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    values = (random_values(shape) + shift) * size
    matrix = quantize(values)
    off = (matrix.dequantize(torch.float32) - values).abs()
    # An fp16 scale is off by 2^-11, 15 codes by 15 times that.
    assert bool((off <= expand_scales(matrix, matrix.scales_OG) * (0.5 + 15 * 2**-11)).all())


@each("size", [0.0, 1e-9, 1e-6])
def test_tiny_values_have_small_error(size: float) -> None:
    values = random_values((4, 128)) * size
    found = quantize(values).dequantize(torch.float32)
    assert bool(found.isfinite().all())
    assert float((found - values).abs().max()) <= 2**-24 * 16


def test_zero_stays_zero() -> None:
    """Padding and pruned weights remain zero."""
    values = random_values((16, 256)) + 1
    values[:, ::3] = 0
    assert not quantize(values).dequantize(torch.float32)[:, ::3].any()


def test_columns_are_not_permuted() -> None:
    """Codes of the two halves of a row share bytes."""
    values = torch.zeros(2, 128)
    values[0, 5], values[1, 100] = 3.0, -2.0
    found = quantize(values).dequantize(torch.float32)
    torch.testing.assert_close(found, values, rtol=1e-3, atol=0)


def test_quantization_error_is_about_ten_percent() -> None:
    """Normally distributed values are off by about a tenth of their size, as in NF4."""
    values = random_values((512, 512))
    off = quantize(values).dequantize(torch.float32) - values
    assert 0.07 < float(off.norm() / values.norm()) < 0.11


def test_memory_per_weight_is_below_4_5_bits() -> None:
    matrix = quantize(random_values((1024, 1024)))
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    # 24 bits of scale and zero point per 64 elements, and the column permutation.
    assert 8 * taken / matrix.num_elements == pytest.approx(4 + 24 / 64 + 32 / 1024)
