"""A byte a number: what the bytes stand for, how far that is off, and products of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finesight.model import frozen
from finesight.model.rowwise import Fp8Matrix, Int8Matrix, RowwiseMatrix

KINDS = [Int8Matrix, Fp8Matrix]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 64), (7, 3), (33, 80), (1, 1), (300, 17)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(kind: type[RowwiseMatrix], values: Tensor) -> RowwiseMatrix:
    matrix = kind(*values.shape).to(values.device)
    matrix.fill(values)
    return matrix


def bound(matrix: RowwiseMatrix, values: Tensor) -> Tensor:
    """How far each number may be off, as the kinds state it, and half a rounding of fp32."""
    scales = matrix.scales_O[:, None].expand_as(values)
    if isinstance(matrix, Int8Matrix):
        return scales / 2 * (1 + 1e-5)
    return torch.maximum(values.abs() / 16, scales * 2**-10) * (1 + 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_no_number_is_off_by_more_than_stated(
    kind: type[RowwiseMatrix], shape: tuple[int, int], size: float
) -> None:
    values = numbers(shape) * size
    # An output that one number rules, and one of zeros.
    values[0, 0] *= 100
    values[-1] = 0 if len(values) > 1 else values[-1]
    matrix = quantised(kind, values)
    off = matrix.dense(torch.float32) - values
    assert bool((off.abs() <= bound(matrix, values)).all())
    assert len(values) == 1 or not matrix.dense(torch.float32)[-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_number_of_an_output_stays(kind: type[RowwiseMatrix]) -> None:
    """Also where a division rounds it up: beyond the largest code of FP8 there is only NaN."""
    values = numbers((4096, 16))
    found = quantised(kind, values).dense(torch.float32)
    largest = values.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(
        found.gather(1, largest), values.gather(1, largest), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [frozen.AT_ONCE, 100])
def test_each_number_is_rounded_once(
    kind: type[RowwiseMatrix], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece or all at once."""
    monkeypatch.setattr(frozen, "AT_ONCE", at_once)
    matrix = quantised(kind, numbers((33, 80)))
    exact = matrix.codes_OI.double() * matrix.scales_O[:, None].double()
    for dtype in TYPES:
        assert torch.equal(matrix.dense(dtype), exact.float().to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_eight_bits(kind: type[RowwiseMatrix]) -> None:
    """Of normal numbers less than 1 % in int8 and less than 3 % in FP8, of the whole."""
    values = numbers((512, 512))
    off = quantised(kind, values).dense(torch.float32) - values
    share = float(off.norm() / values.norm())
    assert share < (0.01 if kind is Int8Matrix else 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_takes_a_byte(kind: type[RowwiseMatrix]) -> None:
    matrix = quantised(kind, numbers((256, 1024), torch.bfloat16))
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    assert taken == matrix.numbers + 4 * 256


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_numbers(
    kind: type[RowwiseMatrix], dtype: torch.dtype
) -> None:
    matrix = quantised(kind, numbers((24, 48)))
    bias, x = numbers((24,), dtype, 1), numbers((5, 48), dtype, 2).requires_grad_()
    y = matrix(x, bias)
    y.float().square().sum().backward()
    dense = matrix.dense(dtype)
    assert torch.equal(y, torch.nn.functional.linear(x, dense, bias))
    assert x.grad is not None
    assert torch.equal(x.grad, (2 * y.detach().float()).to(dtype) @ dense)


def test_a_matrix_of_another_shape_is_none_of_it() -> None:
    with pytest.raises(AssertionError, match=r"\(3, 5\), not \(5, 3\)"):
        Int8Matrix(5, 3).fill(numbers((3, 5)))
