"""What is done number by number: values, gradients, and kernels beside their eager twins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.fused import (
    RmsNormed,
    drop,
    dropped_product,
    gated,
    quick_gelu,
    rms_norm,
    turn,
)

SHAPES = [(5, 3, 16), (1, 1, 80), (260, 12, 128), (77, 32, 80), (3, 5, 6)]


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def angles(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = numbers(tokens, 1, width // 2, seed=1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turn_is_the_product_with_a_complex_number(shape: tuple[int, int, int]) -> None:
    x, (cos, sin) = numbers(*shape), angles(shape[0], shape[2])
    half = shape[2] // 2
    as_complex = torch.complex(x[..., :half], x[..., half:])
    expected = as_complex * torch.complex(cos[..., :half], sin[..., half:])
    torch.testing.assert_close(turn(x, cos, sin), torch.cat([expected.real, expected.imag], -1))


def test_values_are_those_of_torch() -> None:
    x, y = numbers(7, 9), numbers(7, 9, seed=2)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(gated(x, y), F.silu(x) * y)


def test_gradients_equal_finite_differences() -> None:
    x, y = numbers(4, 3, 6).requires_grad_(), numbers(4, 3, 6, seed=2).requires_grad_()
    cos, sin = angles(4, 6)
    assert torch.autograd.gradcheck(lambda x: turn(x, cos, sin), (x,))
    assert torch.autograd.gradcheck(quick_gelu, (x,))
    assert torch.autograd.gradcheck(gated, (x, y))
    weight = numbers(6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: RmsNormed.apply(x, w, 1e-6), (x, weight))


def test_the_norm_is_that_of_torch_and_in_16_bits_rounded_once() -> None:
    x, weight = numbers(7, 64), numbers(64, seed=3)
    expected = F.rms_norm(x, (64,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)
    torch.testing.assert_close(RmsNormed.apply(x, weight, 1e-6), expected)
    narrow = x.bfloat16(), weight.bfloat16()
    exact = F.rms_norm(narrow[0].double(), (64,), narrow[1].double(), 1e-6)
    found = rms_norm(*narrow, 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_that_was_asked_for_is_dropped_and_the_rest_scaled_up(
    share: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = numbers(301, 333, dtype=dtype) + 10
    dropped, places = drop(x, share)
    gone = dropped == 0
    # Six deviations of a binomial share.
    assert abs(gone.double().mean() - share) < 6 * (share * (1 - share) / x.numel()) ** 0.5
    torch.testing.assert_close(dropped[~gone], x[~gone] / (1 - share))
    alike = dropped_product(x, torch.eye(333, dtype=dtype), places, share)
    assert torch.equal(alike == 0, gone)
    torch.testing.assert_close(alike, dropped)
    # Neighbours have nothing in common, though they come from the same draw: six deviations again,
    # of a mean product of independent numbers.
    centred = gone.double().flatten() - share
    for lag in (1, 2, 3):
        together = (centred[lag:] * centred[:-lag]).mean()
        assert abs(together) < 6 * share * (1 - share) / (x.numel() - lag) ** 0.5
    assert not torch.equal(drop(x, share)[0], dropped)


def test_slices_of_a_wider_tensor_are_read_where_they_lie() -> None:
    wide, (cos, sin) = numbers(6, 9, 8), angles(6, 8)
    torch.testing.assert_close(turn(wide[:, 2:5], cos, sin), turn(wide[:, 2:5].clone(), cos, sin))


def both(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients on the card in 16 bits, and those of the eager twin in fp64."""
    found = _with_gradients(function, [x.detach().requires_grad_(x.requires_grad) for x in inputs])
    exact = [x.detach().double().cpu().requires_grad_(x.requires_grad) for x in inputs]
    return found, _with_gradients(function, exact)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    weight = numbers(*y.shape, seed=3).to(y)
    learned = [x for x in inputs if x.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), learned)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_round_as_the_eager_twins_do(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Against fp64: within a few roundings of 16 bits, on tensors in one piece and on slices."""
    tokens, heads, width = shape
    x = numbers(tokens, heads + 2, width, dtype=dtype).cuda()[:, 1:-1].requires_grad_()
    y = numbers(*shape, dtype=dtype, seed=2).cuda().requires_grad_()
    step = torch.finfo(dtype).eps
    for kind in (torch.float32, dtype):
        cos, sin = (a.cuda() for a in angles(tokens, width, kind))
        for found, exact in zip(*both(turn, x, cos, sin), strict=True):
            assert float((found.double().cpu() - exact).abs().max()) < 2 * step * 6
    for function, inputs in ((quick_gelu, (x,)), (gated, (x, y))):
        for found, exact in zip(*both(function, *inputs), strict=True):
            error = (found.double().cpu() - exact).abs()
            assert float((error - 4 * step * exact.abs()).max()) < 4 * step
    assert both(gated, x, y)[0][0].dtype == dtype


def test_next_to_nothing_is_dropped() -> None:
    x = torch.ones(100, 60)
    dropped, places = drop(x, 1e-300)
    assert len(places) == 0
    assert torch.equal(dropped, x)
