"""Triton kernels of rotary embeddings, in place on the fused QKV projection (see `model.rope`).

Both halves of a head use the same angles: only one half of the cosines and the positive half of the
sines are read.

Shapes: T tokens, E columns of the QKV projection, H query heads, K key heads, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from finesight.model.kernels.launch_config import TileConfig
from finesight.model.kernels.primitives import Ptr
from finesight.model.kernels.runtime import tl, triton

MAX_HEADS_PER_PROGRAM = 32
"""Maximum number of heads of a row per program; fastest on an H200."""

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


@triton.jit
def _rotate_halves(
    x1: tl.tensor, x2: tl.tensor, cos: tl.tensor, sin: tl.tensor, narrow: tl.constexpr,
    round_first: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    cos_term1, cos_term2 = x1 * cos, x2 * cos
    if round_first:
        cos_term1, cos_term2 = cos_term1.to(narrow).to(tl.float32), cos_term2.to(narrow)
        cos_term2 = cos_term2.to(tl.float32)
    return cos_term1 - x2 * sin, cos_term2 + x1 * sin


@triton.jit
def _rotate_qk_kernel(
    qkv: Ptr, cos: Ptr, sin: Ptr, num_rotated: int, columns: int, half: tl.constexpr,
    round_first: tl.constexpr, block_h: tl.constexpr, block_f: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    f = tl.arange(0, block_f)
    angle = row * 2 * half + half + f
    cos_1F = tl.load(cos + angle, mask=f < half, other=0.0).to(tl.float32)[None, :]
    sin_1F = tl.load(sin + angle, mask=f < half, other=0.0).to(tl.float32)[None, :]
    mask = (h < num_rotated)[:, None] & (f < half)[None, :]
    ptrs = qkv + row * columns + h[:, None] * 2 * half + f[None, :]
    x1 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(ptrs + half, mask=mask, other=0.0).to(tl.float32)
    y1, y2 = _rotate_halves(x1, x2, cos_1F, sin_1F, qkv.dtype.element_ty, round_first)
    tl.store(ptrs, y1, mask=mask)
    tl.store(ptrs + half, y2, mask=mask)


def rotate_qk(qkv_TE: Tensor, layout: QkvLayout, cos_T1D: Tensor, sin_T1D: Tensor) -> None:
    """Apply rotary embeddings to queries and keys of a fused QKV projection, in place."""
    rows, half, num_rotated = (
        len(qkv_TE),
        layout.head_dim // 2,
        layout.num_heads + layout.num_kv_heads,
    )
    block_h = min(MAX_HEADS_PER_PROGRAM, triton.next_power_of_2(num_rotated))
    _rotate_qk_kernel[(rows, triton.cdiv(num_rotated, block_h))](
        qkv_TE, cos_T1D, sin_T1D, num_rotated, layout.num_columns, half=half,
        round_first=cos_T1D.dtype == qkv_TE.dtype, block_h=block_h,
        block_f=triton.next_power_of_2(half), num_warps=max(1, block_h // 4),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
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
