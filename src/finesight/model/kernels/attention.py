"""Triton kernels of attention within short segments of a pack (FlashAttention-2, Dao 2023,
arXiv:2307.08691): the general kernels are made for segments of thousands of tokens, and leave most
of their tiles empty where a picture and its caption are 140.

Grouped key heads are read, and their gradients summed, as they are. Sums are fp32. Segments may
branch off the first one, which each of them reads before its own rows. Shapes: T rows, H query
heads, K key heads, D numbers of a head, S segments, P rows of the first one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.programs import Ptr, folded
from finesight.model.kernels.sizes import Blocks

FORTH = Blocks(64, 32, 4, 3)
BACK_Q = Blocks(64, 32, 4, 3)
BACK_K = Blocks(32, 64, 4, 2)
"""Queries and keys of a tile. What was quickest on an H200 for heads of 128 numbers."""


class Bounds(NamedTuple):
    """Running sum of the segments' lengths from 0 (int32) on the device, and the longest with what
    stands before it: `trunk` rows, those of the first segment, where the others branch off it."""

    bounds_S1: Tensor
    longest: int
    trunk: int = 0


@triton.jit
def own_tile(bounds: Ptr, block: tl.constexpr,
             ) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a program: where its segment begins and how long it is, its tile's first row there, and
    its head."""
    segment = tl.program_id(0)
    first = tl.load(bounds + segment)
    length = tl.load(bounds + segment + 1) - first
    return first, length, tl.program_id(1) * block, tl.program_id(2)


@triton.jit
def _before(trunk: tl.tensor, branched: tl.constexpr) -> tl.tensor:
    """Rows of the first segment that a program's segment reads before its own."""
    return tl.where(tl.program_id(0) > 0, trunk, 0) if branched else 0


@triton.jit
def _rows_of(x: tl.tensor, first: tl.tensor, at: tl.tensor, stride: tl.tensor, head: tl.tensor,
             width: tl.tensor, length: tl.tensor, d: tl.tensor) -> tl.tensor:  # fmt: skip
    """Rows `at` [M] of a segment that begins at `first`, of one head: [M, D], zero beyond."""
    inside = (at < length)[:, None] & (d < width)[None, :]
    place = x + (first + at).to(tl.int64)[:, None] * stride + head * width + d[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _keys_of(x: tl.tensor, first: tl.tensor, n: tl.tensor, stride: tl.tensor, head: tl.tensor,
             width: tl.tensor, length: tl.tensor, d: tl.tensor, before: tl.tensor,
             branched: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Rows `n` [N] of what a segment reads, the first `before` those of the first segment."""
    if branched:
        # As if the segment began at 0, or so far before its own rows.
        first = tl.where(n < before, 0, first - before)
    return _rows_of(x, first, n, stride, head, width, before + length, d)


@triton.jit(do_not_specialize=["trunk"])
def _forth(q: Ptr, k: Ptr, v: Ptr, o: Ptr, lse: Ptr, bounds: Ptr, q_stride: int, k_stride: int,
           v_stride: int, heads: int, group: int, rows: int, width: int, by: float, trunk: int,
           causal: tl.constexpr, branched: tl.constexpr, block_m: tl.constexpr,
           block_n: tl.constexpr, block_d: tl.constexpr) -> None:  # fmt: skip
    first, length, start_m, head = own_tile(bounds, block_m)
    before = _before(trunk, branched)
    if start_m >= length:
        return
    m, d = start_m + tl.arange(0, block_m), tl.arange(0, block_d)
    q_MD = _rows_of(q, first, m, q_stride, head, width, length, d)
    most_M = tl.full((block_m,), -float("inf"), tl.float32)
    sum_M = tl.zeros((block_m,), tl.float32)
    o_MD = tl.zeros((block_m, block_d), tl.float32)
    end = before + (tl.minimum(length, start_m + block_m) if causal else length)
    for start in range(0, end, block_n):
        n = start + tl.arange(0, block_n)
        k_ND = _keys_of(k, first, n, k_stride, head // group, width, length, d, before, branched)
        s_MN = tl.dot(q_MD, tl.trans(k_ND)) * by
        seen_MN = (n < before + length)[None, :]
        if causal:
            seen_MN = seen_MN & (n[None, :] <= before + m[:, None])
        s_MN = tl.where(seen_MN, s_MN, -float("inf"))
        # The first tile holds the first key, which every query sees.
        higher_M = tl.maximum(most_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - higher_M[:, None])
        fade_M = tl.exp2(most_M - higher_M)
        sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
        v_ND = _keys_of(v, first, n, v_stride, head // group, width, length, d, before, branched)
        o_MD = o_MD * fade_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND)
        most_M = higher_M
    inside = (m < length)[:, None] & (d < width)[None, :]
    place = o + (first + m).to(tl.int64)[:, None] * heads * width + head * width + d[None, :]
    tl.store(place, o_MD / sum_M[:, None], mask=inside)
    tl.store(lse + head * rows + first + m, most_M + tl.log2(sum_M), mask=m < length)


@triton.jit(do_not_specialize=["trunk"])
def _back_q(q: Ptr, k: Ptr, v: Ptr, o: Ptr, do: Ptr, lse: Ptr, delta: Ptr, dq: Ptr, bounds: Ptr,
            q_stride: int, k_stride: int, v_stride: int, heads: int, group: int, rows: int,
            width: int, by: float, scale: float, trunk: int, causal: tl.constexpr,
            branched: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
            block_d: tl.constexpr) -> None:  # fmt: skip
    first, length, start_m, head = own_tile(bounds, block_m)
    before = _before(trunk, branched)
    if start_m >= length:
        return
    m, d = start_m + tl.arange(0, block_m), tl.arange(0, block_d)
    q_MD = _rows_of(q, first, m, q_stride, head, width, length, d)
    o_MD = _rows_of(o, first, m, heads * width, head, width, length, d)
    do_MD = _rows_of(do, first, m, heads * width, head, width, length, d)
    delta_M = tl.sum(o_MD.to(tl.float32) * do_MD.to(tl.float32), 1)
    tl.store(delta + head * rows + first + m, delta_M, mask=m < length)
    lse_M = tl.load(lse + head * rows + first + m, mask=m < length, other=0.0)
    dq_MD = tl.zeros((block_m, block_d), tl.float32)
    end = before + (tl.minimum(length, start_m + block_m) if causal else length)
    for start in range(0, end, block_n):
        n = start + tl.arange(0, block_n)
        k_ND = _keys_of(k, first, n, k_stride, head // group, width, length, d, before, branched)
        v_ND = _keys_of(v, first, n, v_stride, head // group, width, length, d, before, branched)
        p_MN = tl.exp2(tl.dot(q_MD, tl.trans(k_ND)) * by - lse_M[:, None])
        seen_MN = (n < before + length)[None, :]
        if causal:
            seen_MN = seen_MN & (n[None, :] <= before + m[:, None])
        dp_MN = tl.dot(do_MD, tl.trans(v_ND))
        ds_MN = tl.where(seen_MN, p_MN * (dp_MN - delta_M[:, None]), 0.0)
        dq_MD += tl.dot(ds_MN.to(k_ND.dtype), k_ND)
    inside = (m < length)[:, None] & (d < width)[None, :]
    place = dq + (first + m).to(tl.int64)[:, None] * heads * width + head * width + d[None, :]
    tl.store(place, dq_MD * scale, mask=inside)


@triton.jit(do_not_specialize=["trunk"])
def _back_k(q: Ptr, k: Ptr, v: Ptr, do: Ptr, lse: Ptr, delta: Ptr, dk: Ptr, dv: Ptr, bounds: Ptr,
            q_stride: int, k_stride: int, v_stride: int, heads: int, group: int, rows: int,
            width: int, by: float, scale: float, trunk: int, part: Ptr, causal: tl.constexpr,
            branched: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
            block_d: tl.constexpr) -> None:  # fmt: skip
    first, length, start_n, key_head = own_tile(bounds, block_n)
    before = _before(trunk, branched)
    if start_n >= before + length:
        return
    n, d = start_n + tl.arange(0, block_n), tl.arange(0, block_d)
    k_ND = _keys_of(k, first, n, k_stride, key_head, width, length, d, before, branched)
    v_ND = _keys_of(v, first, n, v_stride, key_head, width, length, d, before, branched)
    dk_ND = tl.zeros((block_n, block_d), tl.float32)
    dv_ND = tl.zeros((block_n, block_d), tl.float32)
    # Earlier queries see none of these keys.
    begin = tl.maximum(start_n - before, 0) // block_m * block_m if causal else 0
    for head in range(key_head * group, (key_head + 1) * group):
        for start in range(begin, length, block_m):
            m = start + tl.arange(0, block_m)
            q_MD = _rows_of(q, first, m, q_stride, head, width, length, d)
            do_MD = _rows_of(do, first, m, heads * width, head, width, length, d)
            lse_M = tl.load(lse + head * rows + first + m, mask=m < length, other=0.0)
            delta_M = tl.load(delta + head * rows + first + m, mask=m < length, other=0.0)
            p_NM = tl.exp2(tl.dot(k_ND, tl.trans(q_MD)) * by - lse_M[None, :])
            seen_NM = (m < length)[None, :]
            if causal:
                seen_NM = seen_NM & (n[:, None] <= before + m[None, :])
            p_NM = tl.where(seen_NM, p_NM, 0.0)
            dv_ND += tl.dot(p_NM.to(do_MD.dtype), do_MD)
            dp_NM = tl.dot(v_ND, tl.trans(do_MD))
            ds_NM = p_NM * (dp_NM - delta_M[None, :])
            dk_ND += tl.dot(ds_NM.to(q_MD.dtype), q_MD)
    inside = (n < before + length)[:, None] & (d < width)[None, :]
    stride = heads // group * width
    column = key_head * width + d[None, :]
    if branched:
        # All segments have gradients for the rows of the first one, itself included.
        at = (2 * tl.program_id(0) * trunk + n).to(tl.int64)[:, None] * stride + column
        theirs = inside & (n < trunk)[:, None]
        tl.store(part + at, dk_ND * scale, mask=theirs)
        tl.store(part + at + trunk * stride, dv_ND, mask=theirs)
        inside = inside & (n >= trunk)[:, None]
    at = (first - before + n).to(tl.int64)[:, None] * stride + column
    tl.store(dk + at, dk_ND * scale, mask=inside)
    tl.store(dv + at, dv_ND, mask=inside)


def forth(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Bounds, causal: bool
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v within each segment, [T, H, D], and the logarithms to base 2 of
    the softmax's sums, [H, T]. Rows of a head lie one after the other in memory."""
    rows, heads, width = q_THD.shape
    o_THD = q_THD.new_empty(rows, heads, width)
    lse_HT = q_THD.new_empty(heads, rows, dtype=torch.float32)
    _forth[grid(bounds, FORTH.rows, heads)](
        q_THD, k_TKD, v_TKD, o_THD, lse_HT, bounds.bounds_S1,
        q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0), heads, heads // k_TKD.shape[1], rows,
        width, scale_of(width) / math.log(2), bounds.trunk, causal=causal,
        branched=bounds.trunk > 0, block_m=FORTH.rows, block_n=FORTH.columns,
        block_d=_head_block(width),
        num_warps=FORTH.warps, num_stages=FORTH.stages,
    )  # fmt: skip
    return o_THD, lse_HT


def back(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, o_THD: Tensor, do_THD: Tensor, lse_HT: Tensor,
    bounds: Bounds, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `forth` by queries, keys and values, always summed in the same order."""
    rows, heads, width = q_THD.shape
    group = heads // k_TKD.shape[1]
    segments, trunk = len(bounds.bounds_S1) - 1, bounds.trunk
    delta_HT = torch.empty_like(lse_HT)
    dq_THD, do_THD = torch.empty_like(o_THD), do_THD.contiguous()
    dkv_2TKD = k_TKD.new_empty(2, *k_TKD.shape)
    parts_S2PKD = lse_HT.new_empty(segments, 2, trunk, *k_TKD.shape[1:])
    strides = q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0)
    sizes = heads, group, rows, width, scale_of(width) / math.log(2), scale_of(width), trunk
    _back_q[grid(bounds, BACK_Q.rows, heads)](
        q_THD, k_TKD, v_TKD, o_THD, do_THD, lse_HT, delta_HT, dq_THD, bounds.bounds_S1,
        *strides, *sizes, causal=causal, branched=trunk > 0, block_m=BACK_Q.rows,
        block_n=BACK_Q.columns, block_d=_head_block(width), num_warps=BACK_Q.warps,
        num_stages=BACK_Q.stages,
    )  # fmt: skip
    _back_k[grid(bounds, BACK_K.columns, heads // group)](
        q_THD, k_TKD, v_TKD, do_THD, lse_HT, delta_HT, *dkv_2TKD, bounds.bounds_S1,
        *strides, *sizes, parts_S2PKD, causal=causal, branched=trunk > 0, block_m=BACK_K.rows,
        block_n=BACK_K.columns, block_d=_head_block(width), num_warps=BACK_K.warps,
        num_stages=BACK_K.stages,
    )  # fmt: skip
    if trunk:
        dkv_2TKD[:, :trunk] = folded(parts_S2PKD, dkv_2TKD.dtype)
    dk_TKD, dv_TKD = dkv_2TKD
    return dq_THD, dk_TKD, dv_TKD


def scale_of(width: int) -> float:
    """Of the products of queries and keys."""
    return 1.0 / math.sqrt(width)


def _head_block(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def grid(bounds: Bounds, tile: int, heads: int) -> tuple[int, int, int]:
    """A program for each segment, tile of so many rows, and head."""
    return len(bounds.bounds_S1) - 1, triton.cdiv(bounds.longest, tile), heads
