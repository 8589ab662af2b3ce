"""Triton kernels of norms, with what is added before or after them.

Sums are fp32. Shapes: N or T rows, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.fp8 import LEAST, MOST, Rows, room_for
from finesight.model.kernels.drop import Drop, kept
from finesight.model.kernels.fp8 import factor_and_scale
from finesight.model.kernels.programs import Ptr, folded
from finesight.model.kernels.sizes import SUMS, Blocks

RMS = Blocks(4, 0, 8, 1)
"""What was quickest on an H200; a program takes whole rows."""


@triton.jit(do_not_specialize=["rows"])
def _added_norm(x: Ptr, y: Ptr, w: Ptr, b: Ptr, total: Ptr, n: Ptr, scales: Ptr, rows: int,
                width: int, eps: float, most: float, least: float, is_centred: tl.constexpr,
                is_biased: tl.constexpr, is_coded: tl.constexpr,
                block_d: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, block_d)
    inside = d < width
    at = row * width + d
    x_D = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    x_D += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    narrow_D = x_D.to(total.dtype.element_ty)
    tl.store(total + at, narrow_D, mask=inside)
    # The norm is of the sum as it is kept.
    x_D = narrow_D.to(tl.float32)
    if is_centred:
        x_D = tl.where(inside, x_D - tl.sum(x_D, 0) / width, 0.0)
    n_D = x_D / tl.sqrt(tl.sum(x_D * x_D, 0) / width + eps)
    n_D *= tl.load(w + d, mask=inside, other=0.0).to(tl.float32)
    if is_biased:
        n_D += tl.load(b + d, mask=inside, other=0.0).to(tl.float32)
    if is_coded:
        # The codes are those of the norm as it would be kept.
        n_D = n_D.to(x.dtype.element_ty).to(tl.float32)
        factor, scale = factor_and_scale(tl.max(tl.abs(n_D), 0), most, least)
        n_D *= factor
        tl.store(scales + row, scale)
    tl.store(n + at, n_D.to(n.dtype.element_ty), mask=inside)


def added_norm(
    x_ND: Tensor,
    y_ND: Tensor,
    w_D: Tensor,
    b_D: Tensor | None,
    eps: float,
    *,
    centred: bool,
    coded: bool,
) -> tuple[Tensor, Tensor | Rows]:
    """x + y, and its layer norm (`centred`) or RMS norm, in FP8 if it is wanted `coded`."""
    rows, width = x_ND.shape
    total_ND = torch.empty_like(x_ND)
    n = room_for(x_ND) if coded else torch.empty_like(x_ND)
    to_ND, scales = n if isinstance(n, Rows) else (n, n)
    _added_norm[(rows,)](
        x_ND, y_ND, w_D, w_D if b_D is None else b_D, total_ND, to_ND, scales, rows, width, eps,
        MOST, LEAST, is_centred=centred, is_biased=b_D is not None, is_coded=coded,
        block_d=triton.next_power_of_2(width), num_warps=2,
    )  # fmt: skip
    return total_ND, n


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _rms(x: Ptr, w: Ptr, n: Ptr, dropped: Ptr, codes: Ptr, sizes: Ptr, scales: Ptr, rows: int,
         width: int, n_stride: int, eps: float, most: float, least: float, seed: Ptr, salt: int,
         threshold: int, is_normed: tl.constexpr, is_coded: tl.constexpr, is_dropped: tl.constexpr,
         block_m: tl.constexpr, block_d: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    d = tl.arange(0, block_d)
    at_M = m.to(tl.int64)
    inside = (m < rows)[:, None] & (d < width)[None, :]
    at = at_M[:, None] * width + d[None, :]
    x_MD = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale_M = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / width + eps)
    w_D = tl.load(w + d, mask=d < width, other=0.0).to(tl.float32)
    n_MD = (x_MD * scale_M[:, None] * w_D[None, :]).to(x.dtype.element_ty)
    tl.store(scales + m, scale_M, mask=m < rows)
    if is_normed:
        tl.store(n + at_M[:, None] * n_stride + d[None, :], n_MD, mask=inside)
    if is_dropped:
        kept_MD = kept(seed, salt, m, d, threshold)
        tl.store(dropped + at, tl.where(kept_MD, n_MD, 0.0), mask=inside)
    if is_coded:
        wide_MD = n_MD.to(tl.float32)
        factor_M, size_M = factor_and_scale(tl.max(tl.abs(wide_MD), 1), most, least)
        tl.store(sizes + m, size_M, mask=m < rows)
        tl.store(codes + at, (wide_MD * factor_M[:, None]).to(codes.dtype.element_ty), mask=inside)


def rms_normed(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    n_TD: Tensor | None,
    drop: Drop,
    coded: Rows | None = None,
) -> tuple[Tensor, Tensor]:
    """n = x / sqrt(mean(x^2) + eps) w in `n_TD`, whose rows may lie apart, or in FP8 in `coded`;
    returns n with zeros for what is dropped, and what each row was multiplied by, [T] in fp32."""
    rows, width = x_TD.shape
    assert (n_TD is None) != (coded is None), "a norm in 16 bits or in FP8"
    scale_T = torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    normed = n_TD is not None or not drop.share
    dropped_TD = torch.empty_like(x_TD) if n_TD is None or drop.share else n_TD
    n = dropped_TD if n_TD is None else n_TD
    codes, sizes = (scale_T, scale_T) if coded is None else coded
    _rms[(triton.cdiv(rows, RMS.rows),)](
        x_TD, w_D, n, dropped_TD, codes, sizes, scale_T, rows, width, n.stride(0), eps, MOST,
        LEAST, *drop.told(x_TD)[:3], is_normed=normed, is_coded=coded is not None,
        is_dropped=drop.share > 0.0, block_m=RMS.rows, block_d=triton.next_power_of_2(width),
        num_warps=RMS.warps,
    )  # fmt: skip
    return dropped_TD, scale_T


@triton.jit(do_not_specialize=["rows", "per_program"])
def _rms_back(x: Ptr, w: Ptr, scales: Ptr, dn: Ptr, added: Ptr, dx: Ptr, dw: Ptr, rows: int,
              per_program: int, width: int, is_learned: tl.constexpr,
              block_d: tl.constexpr) -> None:  # fmt: skip
    d = tl.arange(0, block_d)
    inside = d < width
    w_D = tl.load(w + d, mask=inside, other=0.0).to(tl.float32)
    dw_D = tl.zeros((block_d,), tl.float32)
    first = tl.program_id(0) * per_program
    for row in range(first, tl.minimum(rows, first + per_program)):
        at = tl.cast(row, tl.int64) * width + d
        scale = tl.load(scales + row)
        x_D = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        dn_D = tl.load(dn + at, mask=inside, other=0.0).to(tl.float32)
        if is_learned:
            dw_D += dn_D * x_D
        dn_D *= w_D
        dx_D = (dn_D - x_D * (tl.sum(dn_D * x_D, 0) / width)) * scale
        dx_D += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, dx_D, mask=inside)
    if is_learned:
        tl.store(dw + tl.program_id(0).to(tl.int64) * width + d, dw_D, mask=inside)


def rms_back(
    x_TD: Tensor, w_D: Tensor, scale_T: Tensor, dn_TD: Tensor, added_TD: Tensor, *, learned: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient by `x` of `rms_normed` and `added_TD`, which comes to `x` from elsewhere, in
    place of `dn_TD`; where the weight is `learned`, its gradient, too."""
    rows, width = x_TD.shape
    # A program that sums up for the weight takes several rows: their sums have to be summed again.
    per_program = triton.cdiv(rows, SUMS) if learned else 1
    programs = triton.cdiv(rows, max(1, per_program))
    dw_PD = torch.empty(programs if learned else 0, width, dtype=torch.float32, device=x_TD.device)
    _rms_back[(programs,)](
        x_TD, w_D, scale_T, dn_TD, added_TD, dn_TD, dw_PD, rows, per_program, width,
        is_learned=learned, block_d=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return dn_TD, folded(dw_PD, w_D.dtype) if learned else None
