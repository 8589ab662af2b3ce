"""Rounded to four bits while loading: how far numbers are off, and where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finesight.model import int4
from finesight.model.int4 import ROUNDED_GROUP, RoundedInt4Matrix

SHAPES = [(40, 64), (8, 256), (24, 96), (5, 200), (3, 2)]


def numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(values: Tensor) -> RoundedInt4Matrix:
    matrix = RoundedInt4Matrix(*values.shape)
    matrix.fill(values)
    return matrix


def spread(matrix: RoundedInt4Matrix, of_groups: Tensor) -> Tensor:
    return of_groups.float().repeat_interleave(ROUNDED_GROUP, 1)[:, : matrix.inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("at_once", [int4.AT_ONCE, 300])
def test_no_number_is_off_by_more_than_half_a_scale(
    shape: tuple[int, int],
    shift: float,
    size: float,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where all numbers of a group have one sign, and where the last group is smaller."""
    monkeypatch.setattr(int4, "AT_ONCE", at_once)
    values = (numbers(shape) + shift) * size
    matrix = rounded(values)
    off = (matrix.dense(torch.float32) - values).abs()
    # A scale in fp16 is off by 2^-11, 15 codes by 15 times that.
    assert bool((off <= spread(matrix, matrix.scales_OG) * (0.5 + 15 * 2**-11)).all())


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6])
def test_what_fp16_has_no_scale_for_is_off_by_little(size: float) -> None:
    values = numbers((4, 128)) * size
    found = rounded(values).dense(torch.float32)
    assert bool(found.isfinite().all())
    assert float((found - values).abs().max()) <= 2**-24 * 16


def test_zero_stays_zero() -> None:
    """Padding and pruned numbers do not become something."""
    values = numbers((16, 256)) + 1
    values[:, ::3] = 0
    assert not rounded(values).dense(torch.float32)[:, ::3].any()


def test_a_column_is_where_it_was() -> None:
    """Codes of the two halves of a row share bytes."""
    values = torch.zeros(2, 128)
    values[0, 5], values[1, 100] = 3.0, -2.0
    found = rounded(values).dense(torch.float32)
    torch.testing.assert_close(found, values, rtol=1e-3, atol=0)


def test_errors_are_those_of_four_bits() -> None:
    """Of normal numbers about a tenth of their size, as NF4's."""
    values = numbers((512, 512))
    off = rounded(values).dense(torch.float32) - values
    assert 0.07 < float(off.norm() / values.norm()) < 0.11


def test_a_number_takes_less_than_four_and_a_half_bits() -> None:
    matrix = rounded(numbers((1024, 1024)))
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    # 24 bits of scale and zero for 64 numbers, and where each column belongs.
    assert 8 * taken / matrix.numbers == pytest.approx(4 + 24 / 64 + 32 / 1024)
