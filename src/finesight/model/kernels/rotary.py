"""Triton kernels of rotary embeddings, also in place on a fused QKV projection (`model.layers`).

Both halves of a head use the same angles: only one half of the cosines and the positive half of the
sines are read.

`norm_rotary` normalizes the heads first and rotates part of them, not in place.

Shapes: T tokens, E columns of the QKV projection, H query heads, K key heads, D head dimension, R
rotated elements of a head, N rows: heads of all tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import (
    MAX_PARTIAL_SUMS,
    Ptr,
    TileConfig,
    jit,
    sum_partials,
    tl,
    triton,
)

MAX_HEADS_PER_PROGRAM = 32
"""Maximum number of heads of a row per program; fastest on an H200."""

NORM_ROTARY_ROWS = 8
"""Heads per program of the norm with partial rotation."""

BACKWARD_TILE = TileConfig(8, 8, 2, 2)
"""Rows and heads per program in the backward pass; fastest on an H200."""


class QkvLayout(NamedTuple):
    """Layout of a fused QKV projection: numbers of query and key heads, head dimension."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_columns(self) -> int:
        """Number of columns of queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@jit
def _rotate_halves(
    x1: tl.tensor, x2: tl.tensor, cos: tl.tensor, sin: tl.tensor, narrow: tl.constexpr,
    round_first: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    cos_term1, cos_term2 = x1 * cos, x2 * cos
    if round_first:
        cos_term1, cos_term2 = cos_term1.to(narrow).to(tl.float32), cos_term2.to(narrow)
        cos_term2 = cos_term2.to(tl.float32)
    return cos_term1 - x2 * sin, cos_term2 + x1 * sin


@jit
def _rotate_kernel(
    x: Ptr, y: Ptr, cos: Ptr, sin: Ptr, x_stride: int, x_head_stride: int, y_stride: int,
    y_head_stride: int, num_heads: int, sign: float, half: tl.constexpr, round_first: tl.constexpr,
    block_h: tl.constexpr, block_f: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    f = tl.arange(0, block_f)
    angle = row * 2 * half + half + f
    cos_1F = tl.load(cos + angle, mask=f < half, other=0.0).to(tl.float32)[None, :]
    sin_1F = tl.load(sin + angle, mask=f < half, other=0.0).to(tl.float32)[None, :] * sign
    mask = (h < num_heads)[:, None] & (f < half)[None, :]
    x_ptrs = x + row * x_stride + h[:, None] * x_head_stride + f[None, :]
    y_ptrs = y + row * y_stride + h[:, None] * y_head_stride + f[None, :]
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    y1, y2 = _rotate_halves(x1, x2, cos_1F, sin_1F, y.dtype.element_ty, round_first)
    tl.store(y_ptrs, y1, mask=mask)
    tl.store(y_ptrs + half, y2, mask=mask)


def apply_rotary(
    x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float, y_THD: Tensor | None = None
) -> Tensor:
    """Apply rotary embeddings, x cos + sign swap(x) sin, in fp32.

    Tokens and heads may be strided. The result is written to `y_THD`, which may be the input.
    """
    rows, num_heads, head_dim = x_THD.shape
    x_THD = x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
    y_THD = x_THD.new_empty(x_THD.shape) if y_THD is None else y_THD
    block_h = min(MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    _rotate_kernel[(rows, triton.cdiv(num_heads, block_h))](
        x_THD, y_THD, cos_T1D, sin_T1D, x_THD.stride(0), x_THD.stride(1), y_THD.stride(0),
        y_THD.stride(1), num_heads, sign, half=head_dim // 2,
        round_first=cos_T1D.dtype == x_THD.dtype, block_h=block_h,
        block_f=triton.next_power_of_2(head_dim // 2), num_warps=max(1, block_h // 4),
    )  # fmt: skip
    return y_THD


def rotate_qk(qkv_TE: Tensor, layout: QkvLayout, cos_T1D: Tensor, sin_T1D: Tensor) -> None:
    """Apply rotary embeddings to queries and keys of a fused QKV projection, in place."""
    num_rotated = layout.num_heads + layout.num_kv_heads
    qk_THD = qkv_TE.view(len(qkv_TE), -1, layout.head_dim)[:, :num_rotated]
    apply_rotary(qk_THD, cos_T1D, sin_T1D, 1.0, qk_THD)


@jit(do_not_specialize=["rows"])
def _rotate_qk_backward_kernel(
    source: Ptr, cos: Ptr, sin: Ptr, dqkv: Ptr, rows: int, num_heads: int, first_column: int,
    columns: int, half: tl.constexpr, is_rotated: tl.constexpr, round_first: tl.constexpr,
    block_m: tl.constexpr, block_h: tl.constexpr, block_f: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    row_M = m.to(tl.int64)
    mask = (m < rows)[:, None] & (f < half)[None, :]
    cos_MF = tl.zeros((block_m, block_f), tl.float32)
    sin_MF = cos_MF
    if is_rotated:
        angle = row_M[:, None] * 2 * half + half + f[None, :]
        cos_MF = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        sin_MF = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    first_head = tl.program_id(1) * block_h
    for head in range(first_head, tl.minimum(num_heads, first_head + block_h)):
        in_ptrs = source + row_M[:, None] * num_heads * 2 * half + (head * 2 * half + f)[None, :]
        d1 = tl.load(in_ptrs, mask=mask, other=0.0).to(tl.float32)
        d2 = tl.load(in_ptrs + half, mask=mask, other=0.0).to(tl.float32)
        if is_rotated:
            d1, d2 = _rotate_halves(d1, d2, cos_MF, -sin_MF, source.dtype.element_ty, round_first)
        out_ptrs = dqkv + row_M[:, None] * columns + (first_column + head * 2 * half + f)[None, :]
        tl.store(out_ptrs, d1, mask=mask)
        tl.store(out_ptrs + half, d2, mask=mask)


def rotate_qk_backward(
    grads: tuple[Tensor, Tensor, Tensor], layout: QkvLayout, cos_T1D: Tensor, sin_T1D: Tensor
) -> Tensor:
    """Compute the gradient of a fused QKV projection [T, E] after rotary embeddings."""
    rows, half = len(grads[0]), layout.head_dim // 2
    dqkv_TE = grads[0].new_empty(rows, layout.num_columns)
    head_counts = layout.num_heads, layout.num_kv_heads, layout.num_kv_heads
    first_column = 0
    for grad, head_count in zip(grads, head_counts, strict=True):
        row_tiles = triton.cdiv(rows, BACKWARD_TILE.block_m)
        head_tiles = triton.cdiv(head_count, BACKWARD_TILE.block_n)
        _rotate_qk_backward_kernel[(row_tiles, head_tiles)](
            grad.contiguous(), cos_T1D, sin_T1D, dqkv_TE, rows, head_count, first_column,
            layout.num_columns, half=half,
            is_rotated=first_column < (layout.num_heads + layout.num_kv_heads) * layout.head_dim,
            round_first=cos_T1D.dtype == grad.dtype, block_m=BACKWARD_TILE.block_m,
            block_h=BACKWARD_TILE.block_n, block_f=triton.next_power_of_2(half),
            num_warps=BACKWARD_TILE.num_warps,
        )  # fmt: skip
        first_column += head_count * layout.head_dim
    return dqkv_TE


@jit
def _rotation(
    cos: Ptr, sin: Ptr, t_M: tl.tensor, d: tl.tensor, mask: tl.tensor, rotary_dim: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Load cosines and signed sines, and the element that each element is rotated with."""
    half: tl.constexpr = rotary_dim // 2
    is_rotated = d < rotary_dim
    partner_D = tl.where(is_rotated, tl.where(d < half, d + half, d - half), d)
    offsets = t_M.to(tl.int64)[:, None] * rotary_dim + d[None, :]
    mask = mask & is_rotated[None, :]
    cos_MD = tl.load(cos + offsets, mask=mask, other=0.0).to(tl.float32)
    sin_MD = tl.load(sin + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_rotated[None, :], cos_MD, 1.0), sin_MD, partner_D


@jit(do_not_specialize=["rows"])
def _norm_rotary_kernel(
    x: Ptr, w: Ptr, cos: Ptr, sin: Ptr, y: Ptr, rstds: Ptr, rows: int, x_stride: int,
    head_stride: int, eps: float, w_offset: float, heads: tl.constexpr, head_dim: tl.constexpr,
    rotary_dim: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    d = tl.arange(0, block_d)
    mask = (m < rows)[:, None] & (d < head_dim)[None, :]
    base_M1 = ((m // heads).to(tl.int64) * x_stride + (m % heads) * head_stride)[:, None]
    cos_MD, sin_MD, partner_D = _rotation(cos, sin, m // heads, d, mask, rotary_dim)
    x_MD = tl.load(x + base_M1 + d[None, :], mask=mask, other=0.0).to(tl.float32)
    partner_MD = tl.load(x + base_M1 + partner_D[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd_M = 1.0 / tl.sqrt(tl.sum(x_MD * x_MD, 1) / head_dim + eps)
    w_D = tl.load(w + d, mask=d < head_dim, other=0.0).to(tl.float32) + w_offset
    w_partner_D = tl.load(w + partner_D, mask=d < head_dim, other=0.0).to(tl.float32) + w_offset
    y_MD = x_MD * w_D[None, :] * cos_MD + partner_MD * w_partner_D[None, :] * sin_MD
    offsets = m.to(tl.int64)[:, None] * head_dim + d[None, :]
    tl.store(y + offsets, y_MD * rstd_M[:, None], mask=mask)
    tl.store(rstds + m, rstd_M, mask=m < rows)


@jit(do_not_specialize=["rows", "per_program"])
def _norm_rotary_backward_kernel(
    x: Ptr, w: Ptr, cos: Ptr, sin: Ptr, dy: Ptr, rstds: Ptr, dx: Ptr, dw: Ptr, rows: int,
    per_program: int, x_stride: int, head_stride: int, w_offset: float, heads: tl.constexpr,
    head_dim: tl.constexpr, rotary_dim: tl.constexpr, needs_weight_grad: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    d = tl.arange(0, block_d)
    w_D = tl.load(w + d, mask=d < head_dim, other=0.0).to(tl.float32) + w_offset
    dw_D = tl.zeros((block_d,), tl.float32)
    first = tl.program_id(0) * per_program
    for begin in range(first, first + per_program, block_m):
        m = begin + tl.arange(0, block_m)
        mask = (m < rows)[:, None] & (d < head_dim)[None, :]
        base_M1 = ((m // heads).to(tl.int64) * x_stride + (m % heads) * head_stride)[:, None]
        cos_MD, sin_MD, partner_D = _rotation(cos, sin, m // heads, d, mask, rotary_dim)
        offsets_M1 = (m.to(tl.int64) * head_dim)[:, None]
        dy_MD = tl.load(dy + offsets_M1 + d[None, :], mask=mask, other=0.0).to(tl.float32)
        partner_MD = tl.load(dy + offsets_M1 + partner_D[None, :], mask=mask, other=0.0)
        # The sines of both elements of a pair have opposite signs.
        dn_MD = dy_MD * cos_MD - partner_MD.to(tl.float32) * sin_MD
        rstd_M1 = tl.load(rstds + m, mask=m < rows, other=0.0)[:, None]
        n_MD = tl.load(x + base_M1 + d[None, :], mask=mask, other=0.0).to(tl.float32) * rstd_M1
        if needs_weight_grad:
            dw_D += tl.sum(dn_MD * n_MD, 0)
        dn_MD *= w_D[None, :]
        mean_M = tl.sum(dn_MD * n_MD, 1) / head_dim
        dx_MD = (dn_MD - n_MD * mean_M[:, None]) * rstd_M1
        tl.store(dx + offsets_M1 + d[None, :], dx_MD, mask=mask)
    if needs_weight_grad:
        tl.store(dw + tl.program_id(0).to(tl.int64) * head_dim + d, dw_D, mask=d < head_dim)


def norm_rotary(
    x_THD: Tensor, w_D: Tensor, eps: float, w_offset: float, cos_T1R: Tensor, sin_T1R: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply RMS norm with weight w + w_offset, and rotate the leading R elements of each head.

    Tokens and heads of the input may be strided. The second result is 1 / sqrt(mean(x^2) + eps).
    """
    num_tokens, heads, head_dim = x_THD.shape
    rows = num_tokens * heads
    y_THD = x_THD.new_empty(x_THD.shape)
    rstd_N = x_THD.new_empty(rows, dtype=torch.float32)
    _norm_rotary_kernel[(triton.cdiv(rows, NORM_ROTARY_ROWS),)](
        x_THD, w_D, cos_T1R, sin_T1R, y_THD, rstd_N, rows, x_THD.stride(0), x_THD.stride(1), eps,
        w_offset, heads=heads, head_dim=head_dim, rotary_dim=cos_T1R.shape[-1],
        block_m=NORM_ROTARY_ROWS, block_d=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return y_THD, rstd_N


def norm_rotary_backward(
    x_THD: Tensor, w_D: Tensor, w_offset: float, cos_T1R: Tensor, sin_T1R: Tensor, rstd_N: Tensor,
    dy_THD: Tensor, *, needs_weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of input and weight; the gradient of the result is contiguous."""
    num_tokens, heads, head_dim = x_THD.shape
    rows = num_tokens * heads
    blocks = triton.cdiv(rows, NORM_ROTARY_ROWS)
    blocks_per_program = triton.cdiv(blocks, MAX_PARTIAL_SUMS) if needs_weight_grad else 1
    programs = triton.cdiv(blocks, blocks_per_program)
    dx_THD = x_THD.new_empty(x_THD.shape)
    dw = torch.empty(
        programs if needs_weight_grad else 0, head_dim, dtype=torch.float32, device=x_THD.device
    )
    _norm_rotary_backward_kernel[(programs,)](
        x_THD, w_D, cos_T1R, sin_T1R, dy_THD, rstd_N, dx_THD, dw, rows,
        blocks_per_program * NORM_ROTARY_ROWS, x_THD.stride(0), x_THD.stride(1), w_offset,
        heads=heads, head_dim=head_dim, rotary_dim=cos_T1R.shape[-1],
        needs_weight_grad=needs_weight_grad, block_m=NORM_ROTARY_ROWS,
        block_d=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return dx_THD, sum_partials(dw, w_D.dtype) if needs_weight_grad else None
