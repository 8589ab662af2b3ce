"""Triton kernels of the fused decoding step.

Two groups of operations are fused: a matrix-vector product with the RMSNorm before it and the
SwiGLU gate or residual addition after it, and RoPE of new queries and keys with the write to the KV
cache. The matrix-vector kernel is used for a batch of one row. For larger batches, the matrix
products of torch are equally fast. Paged attention splits long sequences (split-K).

Sums are computed in fp32. Intermediate results that eager layers round to 16 bits are rounded once
less. Import this module only if Triton is available.

Shapes: R rows, I inputs, O outputs, S LoRA rank or tokens per block, P blocks, B blocks of one
sequence, H query heads, K key and value heads, G = H / K, D head_dim, X splits of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import jit, supports_pdl, tl, triton, wait_for_previous_kernel

_TARGET_PROGRAMS = 512
"""Number of Triton programs that saturates a GPU; sequences are split to reach it."""

_MAX_SPLITS = 64


@jit
def _gemv_kernel(
    x, norm, w, bias, lora_low, lora_b, output_scale, residual, y, in_features, out_features,
    num_ranks, eps, norm_offset, has_norm: tl.constexpr, has_bias: tl.constexpr,
    has_lora: tl.constexpr, is_gated: tl.constexpr, has_output_scale: tl.constexpr,
    has_residual: tl.constexpr, use_pdl: tl.constexpr, block_o: tl.constexpr,
    block_i: tl.constexpr, block_s: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    offsets = tl.arange(0, block_i)
    mask_O = o < out_features
    w_ptrs = w + o.to(tl.int64)[:, None] * in_features + offsets[None, :]
    up_ptrs = w_ptrs + out_features.to(tl.int64) * in_features
    acc_OI = tl.zeros((block_o, block_i), tl.float32)
    up_acc_OI = tl.zeros((block_o, block_i), tl.float32)
    square_sum_I = tl.zeros((block_i,), tl.float32)
    # Weights do not depend on the previous kernel: the first block is read while it ends.
    mask = mask_O[:, None] & (offsets < in_features)[None, :]
    w_OI = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    up_OI = w_OI
    if is_gated:
        up_OI = tl.load(up_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
    if use_pdl:
        wait_for_previous_kernel()
    for start in range(0, in_features, block_i):
        mask_I = start + offsets < in_features
        x_I = tl.load(x + start + offsets, mask=mask_I, other=0.0).to(tl.float32)
        if has_norm:
            square_sum_I += x_I * x_I
            norm_I = tl.load(norm + start + offsets, mask=mask_I, other=0.0).to(tl.float32)
            x_I *= norm_I + norm_offset
        acc_OI += w_OI.to(tl.float32) * x_I[None, :]
        next_start = start + block_i
        mask = mask_O[:, None] & (next_start + offsets < in_features)[None, :]
        w_OI = tl.load(w_ptrs + next_start, mask=mask, other=0.0, eviction_policy="evict_first")
        if is_gated:
            up_acc_OI += up_OI.to(tl.float32) * x_I[None, :]
            up_OI = tl.load(
                up_ptrs + next_start, mask=mask, other=0.0, eviction_policy="evict_first"
            )
    y_O = tl.sum(acc_OI, 1)
    up_O = tl.sum(up_acc_OI, 1)
    if has_norm:
        rstd = 1.0 / tl.sqrt(tl.sum(square_sum_I, 0) / in_features + eps)
        y_O *= rstd
        up_O *= rstd
    if has_bias:
        y_O += tl.load(bias + o, mask=mask_O, other=0.0).to(tl.float32)
    if has_lora:
        s = tl.arange(0, block_s)
        mask = mask_O[:, None] & (s < num_ranks)[None, :]
        lora_ptrs = lora_b + o.to(tl.int64)[:, None] * num_ranks + s[None, :]
        low_S = tl.load(lora_low + s, mask=s < num_ranks, other=0.0).to(tl.float32)
        y_O += tl.sum(tl.load(lora_ptrs, mask=mask, other=0.0).to(tl.float32) * low_S[None, :], 1)
        if is_gated:
            lora_ptrs += out_features.to(tl.int64) * num_ranks
            up_O += tl.sum(
                tl.load(lora_ptrs, mask=mask, other=0.0).to(tl.float32) * low_S[None, :], 1
            )
    if has_output_scale:
        y_O *= tl.load(output_scale + o, mask=mask_O, other=0.0).to(tl.float32)
    if is_gated:
        y_O = y_O * tl.sigmoid(y_O) * up_O
    if has_residual:
        y_O += tl.load(residual + o, mask=mask_O, other=0.0).to(tl.float32)
    tl.store(y + o, y_O, mask=mask_O)


@dataclass(frozen=True)
class GemvTiling:
    """Block sizes and number of warps of the matrix-vector product (GEMV) kernel."""

    block_o: int
    block_i: int
    num_warps: int


def choose_gemv_tiling(
    out_features: int, in_features: int, *, is_gated: bool, has_residual: bool
) -> GemvTiling:
    """Return the fastest GEMV tiling measured on an H200 for shapes of published models."""
    if out_features < 1024:
        # LoRA down-projection: fewer outputs than streaming multiprocessors.
        return GemvTiling(1, 2048, 4)
    if is_gated:
        if in_features < 2560:
            return GemvTiling(16, 256, 8)
        return GemvTiling(4 if out_features >= 12288 else 2, 512, 4)
    if has_residual:
        return GemvTiling(1 if out_features >= 3072 else 2, 1024, 4)
    if out_features >= 65536:
        return GemvTiling(16, 256, 4)
    return GemvTiling(16, 512, 8) if out_features >= 12288 else GemvTiling(8, 512, 4)


class GemvLoraDelta(NamedTuple):
    """Factors of the LoRA delta of one row: `low_1S` (input times A) and `lora_B_OS`."""

    low_1S: Tensor
    lora_B_OS: Tensor


def fused_gemv(
    x_1I: Tensor, w_OI: Tensor, *, norm_I: Tensor | None = None, eps: float = 0.0,
    norm_offset: float = 0.0, bias_O: Tensor | None = None, lora_delta: GemvLoraDelta | None = None,
    output_scale_1O: Tensor | None = None, residual_1O: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:  # fmt: skip
    """Compute norm(x) W^T + bias + LoRA delta for a single row.

    Args:
        norm_I: Weight of an RMSNorm applied to the input.
        norm_offset: Added to this weight: 1 for a zero-centered norm.
        is_gated: Whether the first half of the outputs is the SiLU gate of the second half; the
            result then has half as many outputs.

    Returns:
        Output row [1, O].
    """
    assert len(x_1I) == 1, f"{len(x_1I)} rows"
    out_features = len(w_OI) // 2 if is_gated else len(w_OI)
    tiling = choose_gemv_tiling(
        out_features, x_1I.shape[1], is_gated=is_gated, has_residual=residual_1O is not None
    )
    y_1O = torch.empty(1, out_features, dtype=x_1I.dtype, device=x_1I.device)
    low_1S, lora_B_OS = (None, None) if lora_delta is None else lora_delta
    num_ranks = 1 if low_1S is None else low_1S.shape[1]
    use_pdl = supports_pdl(x_1I.device)
    # Absent operands are never loaded; pass any valid pointer.
    norm, bias, lora_low, lora_b, output_scale, residual = (
        x_1I if x is None else x
        for x in (norm_I, bias_O, low_1S, lora_B_OS, output_scale_1O, residual_1O)
    )
    _gemv_kernel[(triton.cdiv(out_features, tiling.block_o),)](
        x_1I.contiguous(), norm, w_OI, bias, lora_low, lora_b, output_scale, residual, y_1O,
        x_1I.shape[1], out_features, num_ranks, eps, norm_offset, has_norm=norm_I is not None,
        has_bias=bias_O is not None, has_lora=lora_delta is not None, is_gated=is_gated,
        has_output_scale=output_scale_1O is not None, has_residual=residual_1O is not None,
        use_pdl=use_pdl, block_o=tiling.block_o, block_i=tiling.block_i,
        block_s=triton.next_power_of_2(num_ranks), num_warps=tiling.num_warps, num_stages=2,
        launch_pdl=use_pdl,
    )  # fmt: skip
    return y_1O


class QKNorms(NamedTuple):
    """Weights of the query and key norms; `offset` is added to them, 1 for zero-centered norms."""

    q_weight_D: Tensor
    k_weight_D: Tensor
    eps: float
    offset: float = 0.0


@jit
def _rope_cache_kernel(
    q, k, v, q_norm, k_norm, cos, sin, slot_mapping, q_out, keys, values, q_stride, q_head_stride,
    k_stride, v_stride, num_heads, num_kv_heads, head_dim, rotary_dim, eps, norm_offset,
    has_norm: tl.constexpr, round_products: tl.constexpr, use_pdl: tl.constexpr,
    block_d: tl.constexpr,
):  # fmt: skip
    if use_pdl:
        wait_for_previous_kernel()
    seq_index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, block_d)
    mask = d < head_dim
    slot = tl.load(slot_mapping + seq_index)
    if head >= num_heads + num_kv_heads:
        head = head - num_heads - num_kv_heads
        v_D = tl.load(v + seq_index * v_stride + head * head_dim + d, mask=mask)
        tl.store(values + (slot * num_kv_heads + head) * head_dim + d, v_D, mask=mask)
    else:
        if head < num_heads:
            x = q + seq_index * q_stride + head * q_head_stride
            out = q_out + (seq_index * num_heads + head) * head_dim
            norm = q_norm
        else:
            x = k + seq_index * k_stride + (head - num_heads) * head_dim
            out = keys + (slot * num_kv_heads + head - num_heads) * head_dim
            norm = k_norm
        out_dtype = q_out.dtype.element_ty
        # Element d is rotated with its partner in the other half of the leading `rotary_dim`.
        is_rotated = d < rotary_dim
        half = rotary_dim // 2
        partner = tl.where(is_rotated, tl.where(d < half, d + half, d - half), d)
        x_D = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
        partner_D = tl.load(x + partner, mask=mask, other=0.0).to(tl.float32)
        if has_norm:
            rstd = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / head_dim + eps)
            norm_D = tl.load(norm + d, mask=mask, other=0.0).to(tl.float32) + norm_offset
            x_D = (x_D * rstd * norm_D).to(out_dtype).to(tl.float32)
            norm_D = tl.load(norm + partner, mask=mask, other=0.0).to(tl.float32) + norm_offset
            partner_D = (partner_D * rstd * norm_D).to(out_dtype).to(tl.float32)
        angles = seq_index * rotary_dim + d
        cos_D = tl.load(cos + angles, mask=is_rotated, other=1.0).to(tl.float32)
        sin_D = tl.load(sin + angles, mask=is_rotated, other=0.0).to(tl.float32)
        cos_term_D = x_D * cos_D
        if round_products:
            cos_term_D = cos_term_D.to(out_dtype).to(tl.float32)
        tl.store(out + d, cos_term_D + partner_D * sin_D, mask=mask)


def rope_and_cache(
    q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, qk_norms: QKNorms | None, cos_R1D: Tensor,
    sin_R1D: Tensor, slot_mapping_R: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor,
) -> Tensor:  # fmt: skip
    """Apply QK norm and RoPE, and write keys and values to the KV cache.

    RoPE rotates the leading elements of each head, as many as there are angles.

    Returns:
        Rotated queries [R, H, D].
    """
    num_seqs, num_heads, head_dim = q_RHD.shape
    q_norm, k_norm, eps, offset = qk_norms or QKNorms(cos_R1D, cos_R1D, 0.0)
    q_out = torch.empty(num_seqs, num_heads, head_dim, dtype=q_RHD.dtype, device=q_RHD.device)
    num_kv_heads, use_pdl = k_RKD.shape[1], supports_pdl(q_RHD.device)
    _rope_cache_kernel[(num_seqs, num_heads + 2 * num_kv_heads)](
        q_RHD, k_RKD, v_RKD, q_norm, k_norm, cos_R1D, sin_R1D, slot_mapping_R, q_out, keys_PSKD,
        values_PSKD, q_RHD.stride(0), q_RHD.stride(1), k_RKD.stride(0), v_RKD.stride(0), num_heads,
        num_kv_heads, head_dim, cos_R1D.shape[-1], eps, offset, has_norm=qk_norms is not None,
        round_products=cos_R1D.dtype == q_RHD.dtype, use_pdl=use_pdl,
        block_d=triton.next_power_of_2(head_dim), num_warps=1, launch_pdl=use_pdl,
    )  # fmt: skip
    return q_out


@jit
def _swiglu_kernel(gate_up, y, half, block: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    mask = offsets < half
    gate = tl.load(gate_up + row * 2 * half + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * half + half + offsets, mask=mask, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * half + offsets, silu * up, mask=mask)


def swiglu(gate_up_RX: Tensor) -> Tensor:
    """Compute SwiGLU for each row: silu(first half) * second half."""
    num_rows, half = gate_up_RX.shape[0], gate_up_RX.shape[1] // 2
    y_RI = torch.empty(num_rows, half, dtype=gate_up_RX.dtype, device=gate_up_RX.device)
    _swiglu_kernel[(triton.cdiv(half, 1024), num_rows)](gate_up_RX, y_RI, half, block=1024)
    return y_RI


@jit
def _paged_attention_kernel(
    q, keys, values, block_table, seq_lens, partial_out, softmax_stats, scale, q_stride,
    block_table_stride, num_heads, num_kv_heads, head_dim, num_kv_groups: tl.constexpr,
    block_size: tl.constexpr, num_splits: tl.constexpr, use_pdl: tl.constexpr,
    block_g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    if use_pdl:
        wait_for_previous_kernel()
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


@jit
def _combine_splits_kernel(
    partial_out, softmax_stats, o, head_dim, num_splits: tl.constexpr, use_pdl: tl.constexpr,
    block_x: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    if use_pdl:
        wait_for_previous_kernel()
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


@jit
def _multiply(x, y):
    """Multiply without contraction to a fused multiply-add."""
    return tl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def _flash_decode_kernel(
    q, keys, values, block_table, seq_lens, out, qk_scale, q_stride, block_table_stride, num_heads,
    num_kv_heads, head_dim, num_kv_groups: tl.constexpr, block_size: tl.constexpr,
    use_pdl: tl.constexpr, block_n: tl.constexpr, block_g: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    if use_pdl:
        wait_for_previous_kernel()
    seq_index, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq_len = tl.load(seq_lens + seq_index)
    g, d, n = tl.arange(0, block_g), tl.arange(0, block_d), tl.arange(0, block_n)
    mask_GD = (g < num_kv_groups)[:, None] & (d < head_dim)[None, :]
    heads_GD = (kv_head * num_kv_groups + g)[:, None] * head_dim + d[None, :]
    q_GD = tl.load(q + seq_index * q_stride + heads_GD, mask=mask_GD, other=0.0)
    max_G = tl.full((block_g,), -float("inf"), tl.float32)
    scale_G = tl.full((block_g,), 1.0, tl.float32) * qk_scale
    # Threads of a warp add every fourth pair of weights, in the order of the keys.
    sum_G4 = tl.zeros((block_g, 4), tl.float32)
    is_first_C = tl.arange(0, block_n // 4) == 0
    o_GD = tl.zeros((block_g, block_d), tl.float32)
    num_tiles = (seq_len + block_n - 1) // block_n
    for tile in range(0, num_tiles):
        key_N = (num_tiles - 1 - tile) * block_n + n
        mask_N = key_N < seq_len
        block_ids = block_table + seq_index * block_table_stride + key_N // block_size
        slot_N = tl.load(block_ids, mask=mask_N, other=0).to(tl.int64) * block_size
        offsets_ND = ((slot_N + key_N % block_size)[:, None] * num_kv_heads + kv_head) * head_dim
        offsets_ND += d[None, :]
        mask_ND = mask_N[:, None] & (d < head_dim)[None, :]
        k_ND = tl.load(keys + offsets_ND, mask=mask_ND, other=0.0)
        v_ND = tl.load(values + offsets_ND, mask=mask_ND, other=0.0)
        scores_GN = tl.where(mask_N[None, :], tl.dot(q_GD, tl.trans(k_ND)), -float("inf"))
        new_max_G = tl.maximum(max_G, tl.max(scores_GN, 1))
        scaled_max_GN = tl.broadcast_to(_multiply(new_max_G, scale_G)[:, None], scores_GN.shape)
        scale_GN = tl.broadcast_to(scale_G[:, None], scores_GN.shape)
        weights_GN = tl.exp2(_multiply(scores_GN, scale_GN) - scaled_max_GN)
        alpha_G = tl.exp2((max_G - new_max_G) * qk_scale)
        pairs_G842 = tl.reshape(weights_GN, (block_g, block_n // 8, 4, 2))
        terms_G4C = tl.reshape(tl.permute(pairs_G842, (0, 2, 1, 3)), (block_g, 4, block_n // 4))
        first_G4C = tl.fma(
            tl.broadcast_to(sum_G4[:, :, None], terms_G4C.shape),
            tl.broadcast_to(alpha_G[:, None, None], terms_G4C.shape),
            terms_G4C,
        )
        sum_G4 = tl.sum(tl.where(is_first_C[None, None, :], first_G4C, terms_G4C), 2)
        o_GD = tl.dot(weights_GN.to(v_ND.dtype), v_ND, o_GD * alpha_G[:, None])
        max_G = new_max_G
    sum_G = tl.sum(tl.sum(tl.reshape(sum_G4, (block_g, 2, 2)), 1), 1)
    o_GD *= tl.div_rn(tl.full((block_g,), 1.0, tl.float32), sum_G)[:, None]
    tl.store(out + seq_index * num_heads * head_dim + heads_GD, o_GD, mask=mask_GD)


def flash_decode(
    q_RHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    block_table_RB: Tensor,
    seq_lens_R: Tensor,
) -> Tensor:
    """Compute the same as `paged_attention`, with each bit as torch's FlashAttention-2 does.

    Tiles of keys, their order from last to first, the order of sums and the roundings are those of
    its forward kernel, which rounds weights relative to the maximum of the tiles so far. The sums
    of one warp are sums of its threads, so `num_warps` is 1.
    """
    num_seqs, num_heads, head_dim = q_RHD.shape
    _, block_size, num_kv_heads, _ = keys_PSKD.shape
    num_kv_groups = num_heads // num_kv_heads
    q_RHD = q_RHD if q_RHD.stride()[1:] == (head_dim, 1) else q_RHD.contiguous()
    o_RHD = q_RHD.new_empty(num_seqs, num_heads, head_dim)
    use_pdl = supports_pdl(q_RHD.device)
    _flash_decode_kernel[(num_seqs, num_kv_heads)](
        q_RHD, keys_PSKD, values_PSKD, block_table_RB, seq_lens_R, o_RHD,
        head_dim**-0.5 * math.log2(math.e), q_RHD.stride(0), block_table_RB.stride(0), num_heads,
        num_kv_heads, head_dim, num_kv_groups=num_kv_groups, block_size=block_size,
        use_pdl=use_pdl, block_n=128 if head_dim <= 64 else 64,
        block_g=max(16, triton.next_power_of_2(num_kv_groups)),
        block_d=max(16, triton.next_power_of_2(head_dim)), num_warps=1, num_stages=2,
        launch_pdl=use_pdl,
    )  # fmt: skip
    return o_RHD


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
    use_pdl = supports_pdl(q_RHD.device)
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
        use_pdl=use_pdl, block_g=max(16, triton.next_power_of_2(num_kv_groups)), block_d=block_d,
        launch_pdl=use_pdl,
    )  # fmt: skip
    if num_splits > 1:
        _combine_splits_kernel[(num_seqs * num_heads,)](
            partial_out, softmax_stats, o_RHD, head_dim, num_splits=num_splits, use_pdl=use_pdl,
            block_x=triton.next_power_of_2(num_splits), block_d=block_d, launch_pdl=use_pdl,
        )  # fmt: skip
    return o_RHD
