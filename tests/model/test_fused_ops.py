"""Elementwise operations: values, gradients, and kernels against eager torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model import fused_ops
from finesight.model.layers import RotaryCosSin, ZeroCenteredRmsNorm, apply_rotary_pos_emb

SHAPES = [(5, 3, 16), (1, 1, 80), (260, 12, 128), (77, 32, 80), (3, 5, 6)]


def random_values(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def angles(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angle = random_values(tokens, 1, width // 2, seed=1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def test_gradients_match_finite_differences():
    x, y = random_values(4, 3, 6).requires_grad_(), random_values(4, 3, 6, seed=2).requires_grad_()
    cos, sin = angles(4, 6)
    assert torch.autograd.gradcheck(lambda x: fused_ops.apply_rotary(x, cos, sin), (x,))
    assert torch.autograd.gradcheck(fused_ops.quick_gelu, (x,))
    assert torch.autograd.gradcheck(fused_ops.swiglu, (x, y))
    weight = random_values(6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: fused_ops.RmsNormFunction.apply(x, w, 1e-6), (x, weight)
    )


def test_rms_norm_matches_torch_and_rounds_once():
    x, weight = random_values(7, 64), random_values(64, seed=3)
    expected = F.rms_norm(x, (64,), weight, 1e-6)
    torch.testing.assert_close(fused_ops.rms_norm(x, weight, 1e-6), expected)
    torch.testing.assert_close(fused_ops.RmsNormFunction.apply(x, weight, 1e-6), expected)
    narrow = x.bfloat16(), weight.bfloat16()
    exact = F.rms_norm(narrow[0].double(), (64,), narrow[1].double(), 1e-6)
    found = fused_ops.rms_norm(*narrow, 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)
    norm = ZeroCenteredRmsNorm(64, eps=1e-6)
    norm.weight.data = narrow[1]
    exact = F.rms_norm(narrow[0].double(), (64,), 1 + narrow[1].double(), 1e-6)
    torch.testing.assert_close(norm(narrow[0]).double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_dropout_rate_and_scaling(share, dtype):
    torch.manual_seed(0)
    x = random_values(301, 333, dtype=dtype) + 10
    dropped, locations = fused_ops.dropout(x, share)
    gone = dropped == 0
    # Six standard deviations of a binomial fraction.
    assert abs(gone.double().mean() - share) < 6 * (share * (1 - share) / x.numel()) ** 0.5
    torch.testing.assert_close(dropped[~gone], x[~gone] / (1 - share))
    equal = fused_ops.dropout_matmul(x, torch.eye(333, dtype=dtype), locations, share)
    assert torch.equal(equal == 0, gone)
    torch.testing.assert_close(equal, dropped)
    # Adjacent elements are uncorrelated although they come from the same draw: six standard
    # deviations of a mean product of independent values.
    centred = gone.double().flatten() - share
    for lag in (1, 2, 3):
        covariance = (centred[lag:] * centred[:-lag]).mean()
        assert abs(covariance) < 6 * share * (1 - share) / (x.numel() - lag) ** 0.5
    assert not torch.equal(fused_ops.dropout(x, share)[0], dropped)
    assert torch.equal(fused_ops.dropout(x, 1e-300)[0], x)


def run_both(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return value and gradients of the 16-bit kernel and of fp64 eager torch."""
    found = _with_gradients(function, [x.detach().requires_grad_(x.requires_grad) for x in inputs])
    exact = [x.detach().double().cpu().requires_grad_(x.requires_grad) for x in inputs]
    return found, _with_gradients(function, exact)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = function(*inputs)
    weight = random_values(*y.shape, seed=3).to(y)
    supervised = [x for x in inputs if x.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), supervised)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_round_like_eager(shape, dtype):
    """Within a few 16-bit roundings of fp64, on contiguous tensors and slices."""
    tokens, heads, width = shape
    x = random_values(tokens, heads + 2, width, dtype=dtype).cuda()[:, 1:-1].requires_grad_()
    y = random_values(*shape, dtype=dtype, seed=2).cuda().requires_grad_()
    step = torch.finfo(dtype).eps
    for kind in (torch.float32, dtype):
        cos, sin = (a.cuda() for a in angles(tokens, width, kind))
        for found, exact in zip(*run_both(fused_ops.apply_rotary, x, cos, sin), strict=True):
            assert float((found.double().cpu() - exact).abs().max()) < 2 * step * 6
    for function, inputs in ((fused_ops.quick_gelu, (x,)), (fused_ops.swiglu, (x, y))):
        for found, exact in zip(*run_both(function, *inputs), strict=True):
            error = (found.double().cpu() - exact).abs()
            assert float((error - 4 * step * exact.abs()).max()) < 4 * step
    assert run_both(fused_ops.swiglu, x, y)[0][0].dtype == dtype


def test_half_precision_is_rotated_in_fp32():
    x_THD = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 6
    half = x_THD.bfloat16()
    fine = apply_rotary_pos_emb(half, RotaryCosSin.from_angles(angles_TF, torch.float32))
    exact = apply_rotary_pos_emb(half.float(), RotaryCosSin.from_angles(angles_TF, torch.float32))
    assert fine.dtype == torch.bfloat16
    assert torch.equal(fine, exact.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(16, 16, 80), (40, 8, 128), (6, 2, 64), (1, 1, 16)])
@pytest.mark.parametrize("fine", [torch.float32, torch.bfloat16])
def test_rotary_kernel_overwrites_its_input(sizes, fine):
    from finesight.model.kernels.rotary import QkvLayout, rotate_qk

    heads, rows = QkvLayout(*sizes), 37
    fused_TE = torch.randn(rows, heads.num_columns, device="cuda", dtype=torch.bfloat16)
    rotation = RotaryCosSin.from_angles(
        torch.rand(rows, heads.head_dim // 2, device="cuda") * 6, fine
    )
    qk_THD, v_THD = (
        fused_TE.clone()
        .view(rows, -1, heads.head_dim)
        .split([heads.num_heads + heads.num_kv_heads, heads.num_kv_heads], 1)
    )
    expected = apply_rotary_pos_emb(qk_THD, rotation)
    rotate_qk(fused_TE, heads, rotation.cos_T1D, rotation.sin_T1D)
    found_THD, same_THD = fused_TE.view(rows, -1, heads.head_dim).split(
        [heads.num_heads + heads.num_kv_heads, heads.num_kv_heads], 1
    )
    torch.testing.assert_close(found_THD, expected, rtol=1e-2, atol=2e-2)
    assert torch.equal(same_THD, v_THD)
