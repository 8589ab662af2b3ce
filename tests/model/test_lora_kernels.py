"""Fused LoRA kernels, forward and backward, against fp64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from each_value import each
from torch import Tensor

if TYPE_CHECKING:
    from finesight.model.kernels.runtime import SeededDropout

pytestmark = pytest.mark.gpu

RANKS = [1, 8, 24, 40, 64, 72, 100, 128, 192, 256, 300, 384]
"""Single ranks, small ones, ranks split into two blocks, and the maximum."""


def random_values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative rounding error of one element."""
    return torch.finfo(dtype).eps / 2


@each("dtype", [torch.bfloat16, torch.float16])
@each("share", [0.0, 0.3])
@each(("rows", "width"), [(1, 64), (77, 176), (90, 99), (300, 1536)])
@each("ranks", [rank for rank in RANKS if rank <= 128])
def test_forward_matches_fp64(ranks, rows, width, share, dtype):
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels
    from finesight.model.kernels.runtime import SeededDropout
    from finesight.model.lora.fused import padding_columns

    x_TI, a_RI = random_values((rows, width), 1, dtype), random_values((ranks, width), 2, dtype)
    drop = SeededDropout(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    behind = padding_columns(width, ranks)
    x_TJ, low_TR = lora_gemm_kernels.lora_down(x_TI, a_RI, drop, behind)
    alone, same_TR = lora_gemm_kernels.lora_down(x_TI, a_RI, drop, 0)
    assert alone is x_TI
    assert relative_error(same_TR, low_TR.double()) < rounding(dtype)
    empty = low_TR.new_zeros(rows, behind - ranks)
    assert torch.equal(x_TJ, torch.cat([x_TI, low_TR, empty], 1))
    exact = 0.7 * apply_dropout(x_TI, drop).double() @ a_RI.double().T
    assert relative_error(low_TR, exact) < rounding(dtype)


@each("dtype", [torch.bfloat16, torch.float16])
@each("share", [0.0, 0.3])
@each("normed", [False, True])
@each(("rows", "width"), [(1, 64), (77, 176), (90, 99), (3000, 1536)])
@each("ranks", RANKS)
def test_backward_matches_fp64(ranks, rows, width, normed, share, dtype):
    """Gradients are slices of wider rows, as in fused matmuls."""
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.runtime import SeededDropout

    x_TI, a_SI = random_values((rows, width), 1, dtype), random_values((ranks, width), 2, dtype)
    dn_TJ = random_values((rows, width + ranks), 5, dtype)
    dn_TI, dlow_TS = dn_TJ[:, :width], dn_TJ[:, width:]
    drop = SeededDropout(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    n_TI, norm = x_TI, None
    if normed:
        w_I, n_TI = random_values((width,), 6, dtype), torch.empty_like(x_TI)
        _, scale_T = norm_kernels.rms_norm_dropout(x_TI, w_I, 1e-6, n_TI, drop)
        norm = lora_gemm_kernels.RmsNormStats(w_I, scale_T)
    stored_TI = apply_dropout(torch.ones_like(x_TI), drop).double()
    dx_TI, da_SI = lora_gemm_kernels.lora_down_backward(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    exact = dn_TI.double() + 0.7 * stored_TI * (dlow_TS.double() @ a_SI.double())
    assert relative_error(dx_TI, exact) < rounding(dtype)
    assert relative_error(da_SI, 0.7 * dlow_TS.double().T @ (stored_TI * n_TI.double())) < rounding(
        dtype
    )
    alone_SI = lora_gemm_kernels.lora_A_grad(x_TI, norm, dlow_TS, a_SI, drop)
    assert relative_error(alone_SI, da_SI.double()) < rounding(dtype)
    again = lora_gemm_kernels.lora_down_backward(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    assert torch.equal(again[1], da_SI)


def apply_dropout(x_TI: Tensor, drop: SeededDropout) -> Tensor:
    """Apply the dropout mask with another kernel, without a matmul."""
    from finesight.model.kernels import norm as norm_kernels

    ones_TI = torch.ones_like(x_TI)
    stored_TI, _ = norm_kernels.rms_norm_dropout(
        ones_TI, ones_TI[0], 0.0, torch.empty_like(x_TI), drop
    )
    return x_TI * stored_TI
