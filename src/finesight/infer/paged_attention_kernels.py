"""Triton kernels of paged attention for decoding (split-K over the cached tokens).

Shapes: R sequences, P blocks, S tokens per block, B blocks of one sequence, H query heads, K key
and value heads, G = H / K, D head_dim, X splits of a sequence. Imported only if Triton is
available.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TARGET_PROGRAMS = 512
"""Number of Triton programs that saturates a GPU; sequences are split to reach it."""

_MAX_SPLITS = 64


@triton.jit
def _paged_attention_kernel(
    q, keys, values, block_table, seq_lens, partial_out, softmax_stats, scale, q_stride,
    block_table_stride, num_heads, num_kv_heads, head_dim, num_kv_groups: tl.constexpr,
    block_size: tl.constexpr, num_splits: tl.constexpr, block_g: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    seq_index, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + seq_index)
    num_blocks = (seq_len + block_size - 1) // block_size
    first_block = num_blocks * split // num_splits
    last_block = num_blocks * (split + 1) // num_splits
    g = tl.arange(0, block_g)
    d = tl.arange(0, block_d)
    s = tl.arange(0, block_size)
    mask_GD = (g < num_kv_groups)[:, None] & (d < head_dim)[None, :]
    mask_SD = (s >= 0)[:, None] & (d < head_dim)[None, :]
    q_ptrs = (
        q
        + seq_index.to(tl.int64) * q_stride
        + (kv_head * num_kv_groups + g)[:, None] * head_dim
        + d[None, :]
    )
    q_GD = tl.load(q_ptrs, mask=mask_GD, other=0.0)
    max_G = tl.full((block_g,), -float("inf"), tl.float32)
    sum_G = tl.zeros((block_g,), tl.float32)
    o_GD = tl.zeros((block_g, block_d), tl.float32)
    for block in range(first_block, last_block):
        block_id = tl.load(block_table + seq_index.to(tl.int64) * block_table_stride + block).to(
            tl.int64
        )
        offsets_SD = ((block_id * block_size + s[:, None]) * num_kv_heads + kv_head) * head_dim + d[
            None, :
        ]
        k_SD = tl.load(keys + offsets_SD, mask=mask_SD, other=0.0)
        # Mask slots after the last token: they may be non-finite, and 0 times NaN is NaN.
        mask_S = block * block_size + s < seq_len
        v_SD = tl.load(values + offsets_SD, mask=mask_SD & mask_S[:, None], other=0.0)
        scores_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * scale
        scores_GS = tl.where(mask_S[None, :], scores_GS, -float("inf"))
        new_max_G = tl.maximum(max_G, tl.max(scores_GS, 1))
        weights_GS = tl.exp(scores_GS - new_max_G[:, None])
        alpha_G = tl.exp(max_G - new_max_G)
        sum_G = sum_G * alpha_G + tl.sum(weights_GS, 1)
        values_GD = tl.dot(weights_GS.to(v_SD.dtype), v_SD, input_precision="ieee")
        o_GD = o_GD * alpha_G[:, None] + values_GD
        max_G = new_max_G
    stat_offsets = (
        seq_index.to(tl.int64) * num_heads + kv_head * num_kv_groups + g
    ) * num_splits + split
    if num_splits == 1:
        out_ptrs = (
            partial_out
            + (seq_index.to(tl.int64) * num_heads + kv_head * num_kv_groups + g)[:, None] * head_dim
            + d[None, :]
        )
        tl.store(out_ptrs, o_GD / sum_G[:, None], mask=mask_GD)
    else:
        tl.store(partial_out + stat_offsets[:, None] * head_dim + d[None, :], o_GD, mask=mask_GD)
        tl.store(softmax_stats + stat_offsets * 2, max_G, mask=g < num_kv_groups)
        tl.store(softmax_stats + stat_offsets * 2 + 1, sum_G, mask=g < num_kv_groups)


@triton.jit
def _combine_splits_kernel(
    partial_out, softmax_stats, o, head_dim, num_splits: tl.constexpr, block_x: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    x, d = tl.arange(0, block_x), tl.arange(0, block_d)
    offsets = head * num_splits + x
    max_X = tl.load(softmax_stats + offsets * 2, mask=x < num_splits, other=-float("inf"))
    sum_X = tl.load(softmax_stats + offsets * 2 + 1, mask=x < num_splits, other=0.0)
    weight_X = tl.exp(max_X - tl.max(max_X, 0))
    mask = (x < num_splits)[:, None] & (d < head_dim)[None, :]
    partial_XD = tl.load(
        partial_out + offsets[:, None] * head_dim + d[None, :], mask=mask, other=0.0
    )
    o_D = tl.sum(partial_XD * weight_X[:, None], 0) / tl.sum(sum_X * weight_X, 0)
    tl.store(o + head * head_dim + d, o_D, mask=d < head_dim)


def paged_attention(
    q_RHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    block_table_RB: Tensor,
    seq_lens_R: Tensor,
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v of one query per sequence over its cached tokens.

    Computed in fp32. An empty sequence gives NaN, which callers ignore.

    Returns:
        Attention outputs [R, H, D].
    """
    num_seqs, num_heads, head_dim = q_RHD.shape
    _, block_size, num_kv_heads, _ = keys_PSKD.shape
    num_kv_groups = num_heads // num_kv_heads
    q_RHD = q_RHD if q_RHD.stride()[1:] == (head_dim, 1) else q_RHD.contiguous()
    num_splits = min(_MAX_SPLITS, max(1, _TARGET_PROGRAMS // (num_seqs * num_kv_heads)))
    block_d = max(16, triton.next_power_of_2(head_dim))
    o_RHD = q_RHD.new_empty(num_seqs, num_heads, head_dim)
    partial_out, softmax_stats = o_RHD, o_RHD
    if num_splits > 1:
        partial_out = torch.empty(
            num_seqs, num_heads, num_splits, head_dim, dtype=torch.float32, device=q_RHD.device
        )
        softmax_stats = torch.empty(
            num_seqs, num_heads, num_splits, 2, dtype=torch.float32, device=q_RHD.device
        )
    _paged_attention_kernel[(num_seqs, num_kv_heads, num_splits)](
        q_RHD, keys_PSKD, values_PSKD, block_table_RB, seq_lens_R, partial_out, softmax_stats,
        head_dim**-0.5, q_RHD.stride(0), block_table_RB.stride(0), num_heads, num_kv_heads,
        head_dim, num_kv_groups=num_kv_groups, block_size=block_size, num_splits=num_splits,
        block_g=max(16, triton.next_power_of_2(num_kv_groups)), block_d=block_d,
    )  # fmt: skip
    if num_splits > 1:
        block_x = triton.next_power_of_2(num_splits)
        _combine_splits_kernel[(num_seqs * num_heads,)](
            partial_out,
            softmax_stats,
            o_RHD,
            head_dim,
            num_splits=num_splits,
            block_x=block_x,
            block_d=block_d,
        )
    return o_RHD
