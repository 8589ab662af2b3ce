"""Triton attention kernels for packed segments (FlashAttention-2, Dao 2023, arXiv:2307.08691).

General kernels are tuned for segments of thousands of tokens; with segments of 140 tokens, such as
an image and its caption, most of their tiles are empty. Here attention is causal. Grouped key heads
are read, and their gradients summed, without expansion. Accumulation is fp32. Segments may share a
prefix: the first segment, which every other segment attends to.

`vision_attention` is full attention, forward only, for frozen vision encoders, whose heads have 72
or 80 elements; general kernels pad them to 96 or 128, and segments to tiles of 128 rows. It splits
a head into a power-of-two part and a padded tail, and uses small tiles for the last keys.

Shapes: T tokens, H query heads, K key heads, D head dimension, S segments, P prefix tokens, M
queries and N keys of a tile, C elements of a head part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import Ptr, TileConfig, jit, sum_partials, tl, triton

FORWARD_TILE = TileConfig(64, 32, 4, 3)

BACKWARD_DQ_TILE = TileConfig(64, 32, 4, 3)

BACKWARD_DKV_TILE = TileConfig(32, 64, 4, 2)
"""Queries and keys per tile; fastest on an H200 for head dimension 128."""


class CuSeqlens(NamedTuple):
    """Boundaries of packed segments, as arguments of the attention kernels."""

    cu_seqlens_S1: Tensor
    max_seqlen: int
    prefix_length: int = 0


@jit
def locate_tile(
    cu_seqlens: Ptr, block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Return segment start, segment length, first row of the tile and head of a program."""
    segment = tl.program_id(0)
    segment_start = tl.load(cu_seqlens + segment)
    length = tl.load(cu_seqlens + segment + 1) - segment_start
    return segment_start, length, tl.program_id(1) * block, tl.program_id(2)


@jit
def _prefix_rows(prefix_length: tl.tensor, has_prefix: tl.constexpr) -> tl.tensor:
    """Return the number of shared prefix rows before the segment of a program."""
    return tl.where(tl.program_id(0) > 0, prefix_length, 0) if has_prefix else 0


@jit
def _locate_rows(
    x: tl.tensor, segment_start: tl.tensor, rows: tl.tensor, stride: tl.tensor, head: tl.tensor,
    head_dim: tl.tensor, length: tl.tensor, d: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return pointers to `rows` [M] of one head of a segment, and their mask: [M, D]."""
    mask = (rows < length)[:, None] & (d < head_dim)[None, :]
    ptrs = x + (segment_start + rows).to(tl.int64)[:, None] * stride + head * head_dim + d[None, :]
    return ptrs, mask


@jit
def _load_rows(
    x: tl.tensor, segment_start: tl.tensor, rows: tl.tensor, stride: tl.tensor, head: tl.tensor,
    head_dim: tl.tensor, length: tl.tensor, d: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Load rows of one head of a segment, [M, D], with zeros beyond its end."""
    ptrs, mask = _locate_rows(x, segment_start, rows, stride, head, head_dim, length, d)
    return tl.load(ptrs, mask=mask, other=0.0)


@jit
def _load_keys(
    x: tl.tensor, segment_start: tl.tensor, n: tl.tensor, stride: tl.tensor, head: tl.tensor,
    head_dim: tl.tensor, length: tl.tensor, d: tl.tensor, prefix: tl.tensor,
    has_prefix: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load the keys or values at positions `n` [N] of a segment.

    Positions start with those of the shared prefix.
    """
    if has_prefix:
        # Positions include the prefix: shift the segment start back by its length.
        segment_start = tl.where(n < prefix, 0, segment_start - prefix)
    return _load_rows(x, segment_start, n, stride, head, head_dim, prefix + length, d)


@jit(do_not_specialize=["prefix_length"])
def _attention_fwd(
    q: Ptr, k: Ptr, v: Ptr, o: Ptr, lse: Ptr, cu_seqlens: Ptr, q_stride: int, k_stride: int,
    v_stride: int, num_heads: int, num_kv_groups: int, rows: int, head_dim: int, qk_scale: float,
    prefix_length: int, has_prefix: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:  # fmt: skip
    segment_start, length, start_m, head = locate_tile(cu_seqlens, block_m)
    key_head = head // num_kv_groups
    prefix = _prefix_rows(prefix_length, has_prefix)
    if start_m >= length:
        return
    m, d = start_m + tl.arange(0, block_m), tl.arange(0, block_d)
    q_MD = _load_rows(q, segment_start, m, q_stride, head, head_dim, length, d)
    max_M = tl.full((block_m,), -float("inf"), tl.float32)
    sum_M = tl.zeros((block_m,), tl.float32)
    o_MD = tl.zeros((block_m, block_d), tl.float32)
    end = prefix + tl.minimum(length, start_m + block_m)
    for start in range(0, end, block_n):
        n = start + tl.arange(0, block_n)
        k_ND = _load_keys(
            k, segment_start, n, k_stride, key_head, head_dim, length, d, prefix, has_prefix
        )
        s_MN = tl.dot(q_MD, tl.trans(k_ND)) * qk_scale
        mask_MN = (n < prefix + length)[None, :] & (n[None, :] <= prefix + m[:, None])
        s_MN = tl.where(mask_MN, s_MN, -float("inf"))
        # The first tile contains the first key, which every query attends to.
        new_max_M = tl.maximum(max_M, tl.max(s_MN, 1))
        p_MN = tl.exp2(s_MN - new_max_M[:, None])
        alpha_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * alpha_M + tl.sum(p_MN, 1)
        v_ND = _load_keys(
            v, segment_start, n, v_stride, key_head, head_dim, length, d, prefix, has_prefix
        )
        o_MD = o_MD * alpha_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND)
        max_M = new_max_M
    o_ptrs, mask = _locate_rows(
        o, segment_start, m, num_heads * head_dim, head, head_dim, length, d
    )
    tl.store(o_ptrs, o_MD / sum_M[:, None], mask=mask)
    tl.store(lse + head * rows + segment_start + m, max_M + tl.log2(sum_M), mask=m < length)


@jit(do_not_specialize=["prefix_length"])
def _attention_bwd_dq(
    q: Ptr, k: Ptr, v: Ptr, o: Ptr, do: Ptr, lse: Ptr, delta: Ptr, dq: Ptr, cu_seqlens: Ptr,
    q_stride: int, k_stride: int, v_stride: int, num_heads: int, num_kv_groups: int, rows: int,
    head_dim: int, qk_scale: float, scale: float, prefix_length: int, has_prefix: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    segment_start, length, start_m, head = locate_tile(cu_seqlens, block_m)
    key_head = head // num_kv_groups
    prefix = _prefix_rows(prefix_length, has_prefix)
    if start_m >= length:
        return
    m, d = start_m + tl.arange(0, block_m), tl.arange(0, block_d)
    q_MD = _load_rows(q, segment_start, m, q_stride, head, head_dim, length, d)
    o_MD = _load_rows(o, segment_start, m, num_heads * head_dim, head, head_dim, length, d)
    do_MD = _load_rows(do, segment_start, m, num_heads * head_dim, head, head_dim, length, d)
    delta_M = tl.sum(o_MD.to(tl.float32) * do_MD.to(tl.float32), 1)
    tl.store(delta + head * rows + segment_start + m, delta_M, mask=m < length)
    lse_M = tl.load(lse + head * rows + segment_start + m, mask=m < length, other=0.0)
    dq_MD = tl.zeros((block_m, block_d), tl.float32)
    end = prefix + tl.minimum(length, start_m + block_m)
    for start in range(0, end, block_n):
        n = start + tl.arange(0, block_n)
        k_ND = _load_keys(
            k, segment_start, n, k_stride, key_head, head_dim, length, d, prefix, has_prefix
        )
        v_ND = _load_keys(
            v, segment_start, n, v_stride, key_head, head_dim, length, d, prefix, has_prefix
        )
        p_MN = tl.exp2(tl.dot(q_MD, tl.trans(k_ND)) * qk_scale - lse_M[:, None])
        mask_MN = (n < prefix + length)[None, :] & (n[None, :] <= prefix + m[:, None])
        dp_MN = tl.dot(do_MD, tl.trans(v_ND))
        ds_MN = tl.where(mask_MN, p_MN * (dp_MN - delta_M[:, None]), 0.0)
        dq_MD += tl.dot(ds_MN.to(k_ND.dtype), k_ND)
    dq_ptrs, mask = _locate_rows(
        dq, segment_start, m, num_heads * head_dim, head, head_dim, length, d
    )
    tl.store(dq_ptrs, dq_MD * scale, mask=mask)


@jit(do_not_specialize=["prefix_length"])
def _attention_bwd_dkv(
    q: Ptr, k: Ptr, v: Ptr, do: Ptr, lse: Ptr, delta: Ptr, dk: Ptr, dv: Ptr, cu_seqlens: Ptr,
    q_stride: int, k_stride: int, v_stride: int, num_heads: int, num_kv_groups: int, rows: int,
    head_dim: int, qk_scale: float, scale: float, prefix_length: int, partial: Ptr,
    has_prefix: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr,
) -> None:  # fmt: skip
    segment_start, length, start_n, key_head = locate_tile(cu_seqlens, block_n)
    prefix = _prefix_rows(prefix_length, has_prefix)
    if start_n >= prefix + length:
        return
    n, d = start_n + tl.arange(0, block_n), tl.arange(0, block_d)
    k_ND = _load_keys(
        k, segment_start, n, k_stride, key_head, head_dim, length, d, prefix, has_prefix
    )
    v_ND = _load_keys(
        v, segment_start, n, v_stride, key_head, head_dim, length, d, prefix, has_prefix
    )
    dk_ND = tl.zeros((block_n, block_d), tl.float32)
    dv_ND = tl.zeros((block_n, block_d), tl.float32)
    # Earlier queries attend to none of these keys.
    first_query = tl.maximum(start_n - prefix, 0) // block_m * block_m
    for head in range(key_head * num_kv_groups, (key_head + 1) * num_kv_groups):
        for start in range(first_query, length, block_m):
            m = start + tl.arange(0, block_m)
            q_MD = _load_rows(q, segment_start, m, q_stride, head, head_dim, length, d)
            do_MD = _load_rows(
                do, segment_start, m, num_heads * head_dim, head, head_dim, length, d
            )
            lse_M = tl.load(lse + head * rows + segment_start + m, mask=m < length, other=0.0)
            delta_M = tl.load(delta + head * rows + segment_start + m, mask=m < length, other=0.0)
            p_NM = tl.exp2(tl.dot(k_ND, tl.trans(q_MD)) * qk_scale - lse_M[None, :])
            mask_NM = (m < length)[None, :] & (n[:, None] <= prefix + m[None, :])
            p_NM = tl.where(mask_NM, p_NM, 0.0)
            dv_ND += tl.dot(p_NM.to(do_MD.dtype), do_MD)
            dp_NM = tl.dot(v_ND, tl.trans(do_MD))
            ds_NM = p_NM * (dp_NM - delta_M[None, :])
            dk_ND += tl.dot(ds_NM.to(q_MD.dtype), q_MD)
    mask = (n < prefix + length)[:, None] & (d < head_dim)[None, :]
    stride = num_heads // num_kv_groups * head_dim
    column = key_head * head_dim + d[None, :]
    if has_prefix:
        # All segments, including the prefix itself, contribute gradients to the prefix rows.
        offsets = (2 * tl.program_id(0) * prefix_length + n).to(tl.int64)[:, None] * stride + column
        prefix_mask = mask & (n < prefix_length)[:, None]
        tl.store(partial + offsets, dk_ND * scale, mask=prefix_mask)
        tl.store(partial + offsets + prefix_length * stride, dv_ND, mask=prefix_mask)
        mask = mask & (n >= prefix_length)[:, None]
    offsets = (segment_start - prefix + n).to(tl.int64)[:, None] * stride + column
    tl.store(dk + offsets, dk_ND * scale, mask=mask)
    tl.store(dv + offsets, dv_ND, mask=mask)


def attention_forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: CuSeqlens
) -> tuple[Tensor, Tensor]:
    """Compute causal attention, softmax(q k^T / sqrt(D)) v within each segment.

    Returns:
        The output [T, H, D], and the base-2 log-sum-exp of the scores of each query, [H, T].
    """
    rows, num_heads, head_dim = q_THD.shape
    o_THD = q_THD.new_empty(rows, num_heads, head_dim)
    lse_HT = q_THD.new_empty(num_heads, rows, dtype=torch.float32)
    _attention_fwd[launch_grid(cu_seqlens, FORWARD_TILE.block_m, num_heads)](
        q_THD, k_TKD, v_TKD, o_THD, lse_HT, cu_seqlens.cu_seqlens_S1, q_THD.stride(0),
        k_TKD.stride(0), v_TKD.stride(0), num_heads, num_heads // k_TKD.shape[1], rows, head_dim,
        softmax_scale(head_dim) / math.log(2), cu_seqlens.prefix_length,
        has_prefix=cu_seqlens.prefix_length > 0, block_m=FORWARD_TILE.block_m,
        block_n=FORWARD_TILE.block_n, block_d=_head_block_size(head_dim),
        num_warps=FORWARD_TILE.num_warps, num_stages=FORWARD_TILE.num_stages,
    )  # fmt: skip
    return o_THD, lse_HT


def attention_backward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, o_THD: Tensor, do_THD: Tensor, lse_HT: Tensor,
    cu_seqlens: CuSeqlens,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of queries, keys and values, with sums in a deterministic order."""
    rows, num_heads, head_dim = q_THD.shape
    num_kv_groups = num_heads // k_TKD.shape[1]
    num_segments, prefix_length = len(cu_seqlens.cu_seqlens_S1) - 1, cu_seqlens.prefix_length
    delta_HT = torch.empty_like(lse_HT)
    dq_THD, do_THD = torch.empty_like(o_THD), do_THD.contiguous()
    dkv_2TKD = k_TKD.new_empty(2, *k_TKD.shape)
    partial_S2PKD = lse_HT.new_empty(num_segments, 2, prefix_length, *k_TKD.shape[1:])
    strides = q_THD.stride(0), k_TKD.stride(0), v_TKD.stride(0)
    scale = softmax_scale(head_dim)
    sizes = num_heads, num_kv_groups, rows, head_dim, scale / math.log(2), scale, prefix_length
    _attention_bwd_dq[launch_grid(cu_seqlens, BACKWARD_DQ_TILE.block_m, num_heads)](
        q_THD, k_TKD, v_TKD, o_THD, do_THD, lse_HT, delta_HT, dq_THD, cu_seqlens.cu_seqlens_S1,
        *strides, *sizes, has_prefix=prefix_length > 0,
        block_m=BACKWARD_DQ_TILE.block_m, block_n=BACKWARD_DQ_TILE.block_n,
        block_d=_head_block_size(head_dim), num_warps=BACKWARD_DQ_TILE.num_warps,
        num_stages=BACKWARD_DQ_TILE.num_stages,
    )  # fmt: skip
    num_kv_heads = num_heads // num_kv_groups
    _attention_bwd_dkv[launch_grid(cu_seqlens, BACKWARD_DKV_TILE.block_n, num_kv_heads)](
        q_THD, k_TKD, v_TKD, do_THD, lse_HT, delta_HT, *dkv_2TKD, cu_seqlens.cu_seqlens_S1,
        *strides, *sizes, partial_S2PKD, has_prefix=prefix_length > 0,
        block_m=BACKWARD_DKV_TILE.block_m, block_n=BACKWARD_DKV_TILE.block_n,
        block_d=_head_block_size(head_dim), num_warps=BACKWARD_DKV_TILE.num_warps,
        num_stages=BACKWARD_DKV_TILE.num_stages,
    )  # fmt: skip
    if prefix_length:
        dkv_2TKD[:, :prefix_length] = sum_partials(partial_S2PKD, dkv_2TKD.dtype)
    dk_TKD, dv_TKD = dkv_2TKD
    return dq_THD, dk_TKD, dv_TKD


def softmax_scale(head_dim: int) -> float:
    """Return the scale of the attention scores, 1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim)


def _head_block_size(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def launch_grid(cu_seqlens: CuSeqlens, block_rows: int, num_heads: int) -> tuple[int, int, int]:
    """Return the launch grid of one program per segment, row tile and head."""
    num_segments = len(cu_seqlens.cu_seqlens_S1) - 1
    return num_segments, triton.cdiv(cu_seqlens.max_seqlen, block_rows), num_heads


VISION_TILE, TAIL_BLOCK = TileConfig(64, 64, 4, 3), 16
"""Queries and keys of a tile, and keys of the tiles at the end of a segment.

The fastest of twelve configurations on an H200 for segments of 64, 400 and 2,116 rows.
"""


@jit
def _load_head_part(
    x: Ptr, rows: tl.tensor, segment_start: tl.tensor, length: tl.tensor, stride: int,
    width: tl.constexpr, block: tl.constexpr, is_full_tile: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load one part of a head for some rows of a segment, [M, C]."""
    c = tl.arange(0, block)
    ptrs = x + (segment_start + rows).to(tl.int64)[:, None] * stride + c[None, :]
    if is_full_tile and block == width:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(rows < length)[:, None] & (c < width)[None, :], other=0.0)


@jit
def _attend_tile(
    q1: tl.tensor, q2: tl.tensor, o1: tl.tensor, o2: tl.tensor, max_scores: tl.tensor,
    sums: tl.tensor, k: Ptr, v: Ptr, n: tl.tensor, segment_start: tl.tensor, length: tl.tensor,
    k_stride: int, v_stride: int, qk_scale: float, main_dim: tl.constexpr, tail_dim: tl.constexpr,
    block_main: tl.constexpr, block_tail: tl.constexpr, is_full_tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Update the running output, maximum score and softmax sum with one tile of keys."""
    k1_NC = _load_head_part(
        k, n, segment_start, length, k_stride, main_dim, block_main, is_full_tile
    )
    s_MN = tl.dot(q1, tl.trans(k1_NC))
    if tail_dim:
        k2_NC = _load_head_part(
            k + main_dim, n, segment_start, length, k_stride, tail_dim, block_tail, is_full_tile
        )
        s_MN = tl.dot(q2, tl.trans(k2_NC), s_MN)
    if not is_full_tile:
        s_MN = tl.where((n < length)[None, :], s_MN, -float("inf"))
    # A tile has at least one key, which every query attends to.
    new_max_M = tl.maximum(max_scores, tl.max(s_MN, 1) * qk_scale)
    p_MN = tl.exp2(s_MN * qk_scale - new_max_M[:, None])
    alpha_M = tl.exp2(max_scores - new_max_M)
    sums = sums * alpha_M + tl.sum(p_MN, 1)
    v1_NC = _load_head_part(
        v, n, segment_start, length, v_stride, main_dim, block_main, is_full_tile
    )
    p_MN = p_MN.to(v1_NC.dtype)
    o1 = tl.dot(p_MN, v1_NC, o1 * alpha_M[:, None])
    if tail_dim:
        v2_NC = _load_head_part(
            v + main_dim, n, segment_start, length, v_stride, tail_dim, block_tail, is_full_tile
        )
        o2 = tl.dot(p_MN, v2_NC, o2 * alpha_M[:, None])
    return o1, o2, new_max_M, sums


@jit
def _vision_attention_kernel(
    q: Ptr, k: Ptr, v: Ptr, o: Ptr, cu_seqlens: Ptr, q_stride: int, k_stride: int, v_stride: int,
    num_heads: int, num_kv_groups: int, qk_scale: float, head_dim: tl.constexpr,
    main_dim: tl.constexpr, block_main: tl.constexpr, block_tail: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, tail_block: tl.constexpr,
) -> None:  # fmt: skip
    tail_dim: tl.constexpr = head_dim - main_dim
    segment_start, length, start_m, head = locate_tile(cu_seqlens, block_m)
    if start_m >= length:
        return
    m = start_m + tl.arange(0, block_m)
    q += head * head_dim
    k += head // num_kv_groups * head_dim
    v += head // num_kv_groups * head_dim
    q1_MC = _load_head_part(q, m, segment_start, length, q_stride, main_dim, block_main, False)
    q2_MC = q1_MC
    if tail_dim:
        q2_MC = _load_head_part(
            q + main_dim, m, segment_start, length, q_stride, tail_dim, block_tail, False
        )
    o1_MC = tl.zeros((block_m, block_main), tl.float32)
    o2_MC = tl.zeros((block_m, block_tail), tl.float32)
    max_M = tl.full((block_m,), -float("inf"), tl.float32)
    sums_M = tl.zeros((block_m,), tl.float32)
    end = length // block_n * block_n
    for start in range(0, end, block_n):
        o1_MC, o2_MC, max_M, sums_M = _attend_tile(
            q1_MC, q2_MC, o1_MC, o2_MC, max_M, sums_M, k, v, start + tl.arange(0, block_n),
            segment_start, length, k_stride, v_stride, qk_scale, main_dim, tail_dim, block_main,
            block_tail, True,
        )  # fmt: skip
    for start in range(end, length, tail_block):
        o1_MC, o2_MC, max_M, sums_M = _attend_tile(
            q1_MC, q2_MC, o1_MC, o2_MC, max_M, sums_M, k, v, start + tl.arange(0, tail_block),
            segment_start, length, k_stride, v_stride, qk_scale, main_dim, tail_dim, block_main,
            block_tail, False,
        )  # fmt: skip
    mask_M = (m < length)[:, None]
    ptrs = o + ((segment_start + m).to(tl.int64)[:, None] * num_heads + head) * head_dim
    c1, c2 = tl.arange(0, block_main), tl.arange(0, block_tail)
    tl.store(ptrs + c1[None, :], o1_MC / sums_M[:, None], mask=mask_M & (c1 < main_dim)[None, :])
    if tail_dim:
        tail_ptrs_MC = ptrs + main_dim + c2[None, :]
        tl.store(tail_ptrs_MC, o2_MC / sums_M[:, None], mask=mask_M & (c2 < tail_dim)[None, :])


def vision_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: CuSeqlens) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v within each segment, without gradients."""
    rows, num_heads, width = q_THD.shape
    o_THD = q_THD.new_empty(rows, num_heads, width)
    main_dim = 1 << (width.bit_length() - 1)
    _vision_attention_kernel[launch_grid(cu_seqlens, VISION_TILE.block_m, num_heads)](
        q_THD, k_TKD, v_TKD, o_THD, cu_seqlens.cu_seqlens_S1, q_THD.stride(0), k_TKD.stride(0),
        v_TKD.stride(0), num_heads, num_heads // k_TKD.shape[1], softmax_scale(width) / math.log(2),
        head_dim=width, main_dim=main_dim, block_main=max(16, main_dim),
        block_tail=max(16, triton.next_power_of_2(width - main_dim)), block_m=VISION_TILE.block_m,
        block_n=VISION_TILE.block_n, tail_block=TAIL_BLOCK, num_warps=VISION_TILE.num_warps,
        num_stages=VISION_TILE.num_stages,
    )  # fmt: skip
    return o_THD
