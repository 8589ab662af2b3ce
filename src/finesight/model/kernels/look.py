"""A Triton kernel of attention without a way back, in which every row of a segment sees all of it:
that of frozen towers (FlashAttention-2, Dao 2023, arXiv:2307.08691).

Heads of towers have 72 or 80 numbers. General kernels fill them up to 96 or 128, and segments to
tiles of 128 rows; here a head is two pieces, of as many numbers as a power of two has and of what
is left, filled up to another one, and the last keys of a segment come in small tiles. Sums are
fp32. Shapes: T rows, H query heads, K key heads, D numbers of a head, M queries and N keys of a
tile, C numbers of a piece.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.attention import Bounds, grid, own_tile, scale_of
from finesight.model.kernels.programs import Ptr
from finesight.model.kernels.sizes import Blocks

LOOK, LAST = Blocks(64, 64, 4, 3), 16
"""Queries and keys of a tile, and keys of those at a segment's end: the quickest of twelve on an
H200 for segments of 64, 400 and 2116 rows."""


@triton.jit
def _piece(x: Ptr, at: tl.tensor, first: tl.tensor, length: tl.tensor, stride: int,
           width: tl.constexpr, block: tl.constexpr, is_whole: tl.constexpr,
           ) -> tl.tensor:  # fmt: skip
    """Numbers of a head from rows `at` of a segment that begins at `first`: [M, C]."""
    c = tl.arange(0, block)
    place = x + (first + at).to(tl.int64)[:, None] * stride + c[None, :]
    if is_whole and block == width:
        return tl.load(place)
    return tl.load(place, mask=(at < length)[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def _seen(q1: tl.tensor, q2: tl.tensor, o1: tl.tensor, o2: tl.tensor, most: tl.tensor,
          sums: tl.tensor, k: Ptr, v: Ptr, n: tl.tensor, first: tl.tensor, length: tl.tensor,
          k_stride: int, v_stride: int, by: float, wide: tl.constexpr, left: tl.constexpr,
          block_w: tl.constexpr, block_l: tl.constexpr, is_whole: tl.constexpr,
          ) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Both pieces of the output, the highest scores and the sums after the keys `n`."""
    k1_NC = _piece(k, n, first, length, k_stride, wide, block_w, is_whole)
    s_MN = tl.dot(q1, tl.trans(k1_NC))
    if left:
        k2_NC = _piece(k + wide, n, first, length, k_stride, left, block_l, is_whole)
        s_MN = tl.dot(q2, tl.trans(k2_NC), s_MN)
    if not is_whole:
        s_MN = tl.where((n < length)[None, :], s_MN, -float("inf"))
    # A tile holds one key at least, which every query sees.
    higher_M = tl.maximum(most, tl.max(s_MN, 1) * by)
    p_MN = tl.exp2(s_MN * by - higher_M[:, None])
    fade_M = tl.exp2(most - higher_M)
    sums = sums * fade_M + tl.sum(p_MN, 1)
    v1_NC = _piece(v, n, first, length, v_stride, wide, block_w, is_whole)
    p_MN = p_MN.to(v1_NC.dtype)
    o1 = tl.dot(p_MN, v1_NC, o1 * fade_M[:, None])
    if left:
        v2_NC = _piece(v + wide, n, first, length, v_stride, left, block_l, is_whole)
        o2 = tl.dot(p_MN, v2_NC, o2 * fade_M[:, None])
    return o1, o2, higher_M, sums


@triton.jit
def _look(q: Ptr, k: Ptr, v: Ptr, o: Ptr, bounds: Ptr, q_stride: int, k_stride: int, v_stride: int,
          heads: int, group: int, by: float, width: tl.constexpr, wide: tl.constexpr,
          block_w: tl.constexpr, block_l: tl.constexpr, block_m: tl.constexpr,
          block_n: tl.constexpr, last: tl.constexpr) -> None:  # fmt: skip
    left: tl.constexpr = width - wide
    first, length, start_m, head = own_tile(bounds, block_m)
    if start_m >= length:
        return
    m = start_m + tl.arange(0, block_m)
    q, k, v = q + head * width, k + head // group * width, v + head // group * width
    q1_MC = _piece(q, m, first, length, q_stride, wide, block_w, False)
    q2_MC = q1_MC
    if left:
        q2_MC = _piece(q + wide, m, first, length, q_stride, left, block_l, False)
    o1_MC = tl.zeros((block_m, block_w), tl.float32)
    o2_MC = tl.zeros((block_m, block_l), tl.float32)
    most_M = tl.full((block_m,), -float("inf"), tl.float32)
    sums_M = tl.zeros((block_m,), tl.float32)
    end = length // block_n * block_n
    for start in range(0, end, block_n):
        o1_MC, o2_MC, most_M, sums_M = _seen(
            q1_MC, q2_MC, o1_MC, o2_MC, most_M, sums_M, k, v, start + tl.arange(0, block_n), first,
            length, k_stride, v_stride, by, wide, left, block_w, block_l, True,
        )  # fmt: skip
    for start in range(end, length, last):
        o1_MC, o2_MC, most_M, sums_M = _seen(
            q1_MC, q2_MC, o1_MC, o2_MC, most_M, sums_M, k, v, start + tl.arange(0, last), first,
            length, k_stride, v_stride, by, wide, left, block_w, block_l, False,
        )  # fmt: skip
    inside_M = (m < length)[:, None]
    place = o + ((first + m).to(tl.int64)[:, None] * heads + head) * width
    c1, c2 = tl.arange(0, block_w), tl.arange(0, block_l)
    tl.store(place + c1[None, :], o1_MC / sums_M[:, None], mask=inside_M & (c1 < wide)[None, :])
    if left:
        to_MC = place + wide + c2[None, :]
        tl.store(to_MC, o2_MC / sums_M[:, None], mask=inside_M & (c2 < left)[None, :])


def look(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: Bounds) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment, [T, H, D]. The heads of a row lie one after
    the other in memory."""
    rows, heads, width = q_THD.shape
    o_THD = q_THD.new_empty(rows, heads, width)
    wide = 1 << (width.bit_length() - 1)
    _look[grid(bounds, LOOK.rows, heads)](
        q_THD, k_TKD, v_TKD, o_THD, bounds.bounds_S1, q_THD.stride(0), k_TKD.stride(0),
        v_TKD.stride(0), heads, heads // k_TKD.shape[1], scale_of(width) / math.log(2), width=width,
        wide=wide, block_w=max(16, wide), block_l=max(16, triton.next_power_of_2(width - wide)),
        block_m=LOOK.rows, block_n=LOOK.columns, last=LAST,
        num_warps=LOOK.warps, num_stages=LOOK.stages,
    )  # fmt: skip
    return o_THD
