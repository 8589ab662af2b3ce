"""Triton kernels of norms, fused with residual addition, dropout and FP8 quantization.

Accumulation is fp32. Shapes: N or T rows, D width; heads of Gated DeltaNet: H heads, V width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.kernels.fp8_quantize import fp8_factor_and_scale
from finesight.model.kernels.runtime import (
    MAX_PARTIAL_SUMS,
    Ptr,
    SeededDropout,
    TileConfig,
    jit,
    keep_mask,
    sum_partials,
    tl,
    triton,
)
from finesight.model.quant.base import Fp8Rows
from finesight.model.quant.fp8 import FP8_MAX, MIN_AMAX, empty_fp8_rows

RMS_NORM_TILE = TileConfig(4, 0, 8, 1)
"""Tile of the RMS norm kernel, whose programs process complete rows; fastest on an H200."""

GATED_NORM_BLOCK = 16
"""Rows per program of the gated RMS norm."""


@jit(do_not_specialize=["rows"])
def _add_norm_kernel(
    x: Ptr, y: Ptr, w: Ptr, b: Ptr, residual: Ptr, n: Ptr, scales: Ptr, rows: int, width: int,
    eps: float, max_code: float, min_amax: float, is_layer_norm: tl.constexpr,
    has_bias: tl.constexpr, is_fp8: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block_d)
    mask = d < width
    offsets = row * width + d
    x_D = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    x_D += tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    rounded_D = x_D.to(residual.dtype.element_ty)
    tl.store(residual + offsets, rounded_D, mask=mask)
    # Normalize the rounded sum, as stored.
    x_D = rounded_D.to(tl.float32)
    if is_layer_norm:
        x_D = tl.where(mask, x_D - tl.sum(x_D, 0) / width, 0.0)
    n_D = x_D / tl.sqrt(tl.sum(x_D * x_D, 0) / width + eps)
    n_D *= tl.load(w + d, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        n_D += tl.load(b + d, mask=mask, other=0.0).to(tl.float32)
    if is_fp8:
        # Quantize the rounded norm, as it would be stored.
        n_D = n_D.to(x.dtype.element_ty).to(tl.float32)
        factor, scale = fp8_factor_and_scale(tl.max(tl.abs(n_D), 0), max_code, min_amax)
        n_D *= factor
        tl.store(scales + row, scale)
    tl.store(n + offsets, n_D.to(n.dtype.element_ty), mask=mask)


def add_norm(
    x_ND: Tensor,
    y_ND: Tensor,
    w_D: Tensor,
    b_D: Tensor | None,
    eps: float,
    *,
    is_layer_norm: bool,
    to_fp8: bool,
) -> tuple[Tensor, Tensor | Fp8Rows]:
    """Add two tensors and apply layer norm or RMS norm to the sum."""
    rows, width = x_ND.shape
    residual_ND = torch.empty_like(x_ND)
    normed = empty_fp8_rows(x_ND) if to_fp8 else torch.empty_like(x_ND)
    out_ND, scales = normed if isinstance(normed, Fp8Rows) else (normed, normed)
    _add_norm_kernel[(rows,)](
        x_ND, y_ND, w_D, w_D if b_D is None else b_D, residual_ND, out_ND, scales, rows, width, eps,
        FP8_MAX, MIN_AMAX, is_layer_norm=is_layer_norm, has_bias=b_D is not None, is_fp8=to_fp8,
        block_d=triton.next_power_of_2(width), num_warps=2,
    )  # fmt: skip
    return residual_ND, normed


@jit(do_not_specialize=["rows", "salt", "threshold"])
def _rms_norm_kernel(
    x: Ptr, w: Ptr, n: Ptr, dropped: Ptr, codes: Ptr, fp8_scales: Ptr, rstd: Ptr, rows: int,
    width: int, n_stride: int, eps: float, w_offset: float, max_code: float, min_amax: float,
    seed: Ptr, salt: int, threshold: int, is_normed: tl.constexpr, is_fp8: tl.constexpr,
    is_dropped: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    d = tl.arange(0, block_d)
    row_M = m.to(tl.int64)
    mask = (m < rows)[:, None] & (d < width)[None, :]
    offsets = row_M[:, None] * width + d[None, :]
    x_MD = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    rstd_M = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / width + eps)
    w_D = tl.load(w + d, mask=d < width, other=0.0).to(tl.float32) + w_offset
    n_MD = (x_MD * rstd_M[:, None] * w_D[None, :]).to(x.dtype.element_ty)
    tl.store(rstd + m, rstd_M, mask=m < rows)
    if is_normed:
        tl.store(n + row_M[:, None] * n_stride + d[None, :], n_MD, mask=mask)
    if is_dropped:
        keep_MD = keep_mask(seed, salt, m, d, threshold)
        tl.store(dropped + offsets, tl.where(keep_MD, n_MD, 0.0), mask=mask)
    if is_fp8:
        wide_MD = n_MD.to(tl.float32)
        factor_M, fp8_scale_M = fp8_factor_and_scale(tl.max(tl.abs(wide_MD), 1), max_code, min_amax)
        tl.store(fp8_scales + m, fp8_scale_M, mask=m < rows)
        tl.store(
            codes + offsets, (wide_MD * factor_M[:, None]).to(codes.dtype.element_ty), mask=mask
        )


def rms_norm_dropout(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    n_TD: Tensor | None,
    dropout: SeededDropout,
    fp8_rows: Fp8Rows | None = None,
    w_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute RMS norm with dropout.

    The norm before dropout, x / sqrt(mean(x^2) + eps) * (w + w_offset), is written to `n_TD`, whose
    rows may be strided, or quantized to `fp8_rows`; exactly one of them is given.
    """
    rows, width = x_TD.shape
    assert (n_TD is None) != (fp8_rows is None), "either a 16-bit or an FP8 output is required"
    rstd_T = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    stores_norm = n_TD is not None or not dropout.p
    dropped_TD = torch.empty_like(x_TD) if n_TD is None or dropout.p else n_TD
    n = dropped_TD if n_TD is None else n_TD
    codes, fp8_scales = (rstd_T, rstd_T) if fp8_rows is None else fp8_rows
    _rms_norm_kernel[(triton.cdiv(rows, RMS_NORM_TILE.block_m),)](
        x_TD, w_D, n, dropped_TD, codes, fp8_scales, rstd_T, rows, width, n.stride(0), eps,
        w_offset, FP8_MAX, MIN_AMAX, *dropout.kernel_args(x_TD)[:3], is_normed=stores_norm,
        is_fp8=fp8_rows is not None, is_dropped=dropout.p > 0.0, block_m=RMS_NORM_TILE.block_m,
        block_d=triton.next_power_of_2(width), num_warps=RMS_NORM_TILE.num_warps,
    )  # fmt: skip
    return dropped_TD, rstd_T


@jit(do_not_specialize=["rows", "per_program"])
def _rms_norm_backward_kernel(
    x: Ptr, w: Ptr, rstds: Ptr, dn: Ptr, residual_grad: Ptr, dx: Ptr, dw: Ptr, rows: int,
    per_program: int, width: int, needs_weight_grad: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    d = tl.arange(0, block_d)
    mask = d < width
    w_D = tl.load(w + d, mask=mask, other=0.0).to(tl.float32)
    dw_D = tl.zeros((block_d,), tl.float32)
    first = tl.program_id(0) * per_program
    for row in range(first, tl.minimum(rows, first + per_program)):
        offsets = tl.cast(row, tl.int64) * width + d
        rstd = tl.load(rstds + row)
        x_D = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * rstd
        dn_D = tl.load(dn + offsets, mask=mask, other=0.0).to(tl.float32)
        if needs_weight_grad:
            dw_D += dn_D * x_D
        dn_D *= w_D
        dx_D = (dn_D - x_D * (tl.sum(dn_D * x_D, 0) / width)) * rstd
        dx_D += tl.load(residual_grad + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, dx_D, mask=mask)
    if needs_weight_grad:
        tl.store(dw + tl.program_id(0).to(tl.int64) * width + d, dw_D, mask=mask)


def rms_norm_backward(
    x_TD: Tensor,
    w_D: Tensor,
    rstd_T: Tensor,
    dn_TD: Tensor,
    residual_grad_TD: Tensor,
    *,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute the input gradient of RMS norm and add `residual_grad_TD`.

    The sum overwrites `dn_TD`. The second result is the weight gradient, or None without
    `needs_weight_grad`.
    """
    rows, width = x_TD.shape
    # For the weight gradient, a program processes several rows. A second kernel reduces the
    # partial sums.
    per_program = triton.cdiv(rows, MAX_PARTIAL_SUMS) if needs_weight_grad else 1
    programs = triton.cdiv(rows, max(1, per_program))
    dw_PD = torch.empty(
        programs if needs_weight_grad else 0, width, dtype=torch.float32, device=x_TD.device
    )
    _rms_norm_backward_kernel[(programs,)](
        x_TD, w_D, rstd_T, dn_TD, residual_grad_TD, dn_TD, dw_PD, rows, per_program, width,
        needs_weight_grad=needs_weight_grad, block_d=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return dn_TD, sum_partials(dw_PD, w_D.dtype) if needs_weight_grad else None


@jit
def _gate_offsets(
    m: tl.tensor, d: tl.tensor, stride: tl.tensor, heads: tl.constexpr, width: tl.constexpr
) -> tl.tensor:
    """Compute the offsets of rows `m` of a gate [T, H, width] whose tokens may be strided."""
    return (m // heads).to(tl.int64)[:, None] * stride + ((m % heads) * width)[:, None] + d[None, :]


@jit(do_not_specialize=["rows"])
def _gated_norm_kernel(
    x: Ptr, z: Ptr, weight: Ptr, y: Ptr, rows: int, z_stride: int, eps: float,
    heads: tl.constexpr, width: tl.constexpr, block_m: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    d = tl.arange(0, width)
    mask = (m < rows)[:, None]
    offsets = m.to(tl.int64)[:, None] * width + d[None, :]
    x_MD = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    z_MD = tl.load(z + _gate_offsets(m, d, z_stride, heads, width), mask=mask, other=0.0)
    z_MD = z_MD.to(tl.float32)
    weight_D = tl.load(weight + d).to(tl.float32)
    rstd_M = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / width + eps)
    y_MD = x_MD * rstd_M[:, None] * weight_D[None, :] * (z_MD * tl.sigmoid(z_MD))
    tl.store(y + offsets, y_MD.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows", "per_program"])
def _gated_norm_backward_kernel(
    x: Ptr, z: Ptr, weight: Ptr, dy: Ptr, dx: Ptr, dz: Ptr, dweight: Ptr, rows: int,
    per_program: int, z_stride: int, eps: float, heads: tl.constexpr, width: tl.constexpr,
    needs_weight_grad: tl.constexpr, block_m: tl.constexpr,
) -> None:  # fmt: skip
    d = tl.arange(0, width)
    weight_D = tl.load(weight + d).to(tl.float32)
    dweight_D = tl.zeros((width,), tl.float32)
    first = tl.program_id(0) * per_program
    for begin in range(first, first + per_program, block_m):
        m = begin + tl.arange(0, block_m)
        mask = (m < rows)[:, None]
        offsets = m.to(tl.int64)[:, None] * width + d[None, :]
        x_MD = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        z_MD = tl.load(z + _gate_offsets(m, d, z_stride, heads, width), mask=mask, other=0.0)
        z_MD = z_MD.to(tl.float32)
        dy_MD = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd_M = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / width + eps)
        n_MD = x_MD * rstd_M[:, None]
        sigmoid_MD = tl.sigmoid(z_MD)
        silu_MD = z_MD * sigmoid_MD
        dz_MD = dy_MD * n_MD * weight_D[None, :] * (sigmoid_MD + silu_MD * (1.0 - sigmoid_MD))
        dn_MD = dy_MD * silu_MD
        if needs_weight_grad:
            dweight_D += tl.sum(dn_MD * n_MD, 0)
        dn_MD *= weight_D[None, :]
        mean_M = tl.sum(dn_MD * n_MD, 1) / width
        dx_MD = (dn_MD - n_MD * mean_M[:, None]) * rstd_M[:, None]
        tl.store(dx + offsets, dx_MD.to(dx.dtype.element_ty), mask=mask)
        tl.store(dz + offsets, dz_MD.to(dz.dtype.element_ty), mask=mask)
    if needs_weight_grad:
        tl.store(dweight + tl.program_id(0).to(tl.int64) * width + d, dweight_D)


def gated_rms_norm(x_THV: Tensor, z_THV: Tensor, weight_V: Tensor, eps: float) -> Tensor:
    """Compute RMS norm of the last dimension, times weight and SiLU of the gate.

    The tokens of the gate may be strided.
    """
    num_tokens, heads, width = x_THV.shape
    y_THV = torch.empty_like(x_THV)
    _gated_norm_kernel[(triton.cdiv(num_tokens * heads, GATED_NORM_BLOCK),)](
        x_THV, z_THV, weight_V, y_THV, num_tokens * heads, z_THV.stride(0), eps, heads=heads,
        width=width, block_m=GATED_NORM_BLOCK, num_warps=4,
    )  # fmt: skip
    return y_THV


def gated_rms_norm_backward(
    x_THV: Tensor, z_THV: Tensor, weight_V: Tensor, eps: float, dy_THV: Tensor, *,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of input, gate and weight."""
    num_tokens, heads, width = x_THV.shape
    blocks = triton.cdiv(num_tokens * heads, GATED_NORM_BLOCK)
    blocks_per_program = triton.cdiv(blocks, MAX_PARTIAL_SUMS) if needs_weight_grad else 1
    programs = triton.cdiv(blocks, blocks_per_program)
    dweight = torch.empty(
        programs if needs_weight_grad else 0, width, dtype=torch.float32, device=x_THV.device
    )
    dx, dz = torch.empty_like(x_THV), torch.empty_like(x_THV, dtype=z_THV.dtype)
    _gated_norm_backward_kernel[(programs,)](
        x_THV, z_THV, weight_V, dy_THV, dx, dz, dweight, num_tokens * heads,
        blocks_per_program * GATED_NORM_BLOCK, z_THV.stride(0), eps, heads=heads, width=width,
        needs_weight_grad=needs_weight_grad, block_m=GATED_NORM_BLOCK, num_warps=4,
    )  # fmt: skip
    return dx, dz, sum_partials(dweight, weight_V.dtype) if needs_weight_grad else None
