"""Triton kernels of SwiGLU fused with the LoRA down-projection of the next linear layer.

The forward and the backward pass read each large tensor once. Accumulation is fp32.

Shapes: T tokens, F intermediate size, R ranks, J input columns including the LoRA padding, C
chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import (
    SWIGLU_BACKWARD_TILE,
    SWIGLU_TILE,
    Ptr,
    SeededDropout,
    align_layouts,
    columns_per_chunk,
    jit,
    keep_mask,
    rank_block_size,
    rows_per_chunk,
    sum_partials,
    times_sigmoid,
    tl,
    triton,
)

FIXED_ROWS = 256
"""Number of rows for which the order of sums is chosen if it must not depend on them."""


@jit(do_not_specialize=["rows", "salt", "threshold"])
def _swiglu_lora_kernel(
    gate_up: Ptr, a: Ptr, h: Ptr, partial: Ptr, rows: int, width: int, ranks: int, h_stride: int,
    per_chunk: int, seed: Ptr, salt: int, threshold: int, scale: float, has_lora: tl.constexpr,
    is_dropped: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
    range_stages: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    mask_M, mask_R, row_M = m < rows, r < ranks, m.to(tl.int64)
    low_MR = tl.zeros((block_m, block_r), tl.float32)
    last = tl.minimum(width, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_n, num_stages=range_stages):
        c = start + tl.arange(0, block_n)
        mask_N = c < width
        mask = mask_M[:, None] & mask_N[None, :]
        in_ptrs_MN = gate_up + row_M[:, None] * 2 * width + c[None, :]
        gate_MN = tl.load(in_ptrs_MN, mask=mask, other=0.0).to(tl.float32)
        up_MN = tl.load(in_ptrs_MN + width, mask=mask, other=0.0).to(tl.float32)
        silu_MN = times_sigmoid(gate_MN, gate_MN * -1.4426950408889634)
        h_MN = (silu_MN * up_MN).to(h.dtype.element_ty)
        tl.store(h + row_M[:, None] * h_stride + c[None, :], h_MN, mask=mask)
        if has_lora:
            if is_dropped:
                mask &= keep_mask(seed, salt, m, c, threshold)
            # Masked elements are zero anyway; without a mask the compiler recomputes the operand
            # from `gate_up` in each warp that reads it.
            h_MN = tl.where(mask, h_MN, 0.0)
            mask_RN = mask_R[:, None] & mask_N[None, :]
            a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=mask_RN, other=0.0)
            low_MR += tl.dot(h_MN, tl.trans(a_RN))
    if has_lora:
        out_ptrs_MR = partial + (chunk * rows + row_M)[:, None] * ranks + r[None, :]
        tl.store(out_ptrs_MR, low_MR * scale, mask=mask_M[:, None] & mask_R[None, :])


def swiglu_lora(
    gate_up_TF2: Tensor,
    lora_A_RF: Tensor | None,
    dropout: SeededDropout,
    padding: int,
    is_independent: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute SwiGLU, h = silu(gate) * up, and the LoRA activations of h.

    With `is_independent`, the order of sums does not depend on the number of rows.

    Returns:
        A tensor [T, J] with h in the first F columns, then the activations and zeros in the
        `padding` columns; and the activations, scale * dropout(h) A^T, [T, R], or None without
        an adapter.
    """
    rows, width = len(gate_up_TF2), gate_up_TF2.shape[1] // 2
    h_TJ = gate_up_TF2.new_empty(rows, width + padding)
    ranks, tile = 1 if lora_A_RF is None else len(lora_A_RF), SWIGLU_TILE
    row_tiles = triton.cdiv(rows, tile.block_m)
    per_chunk = columns_per_chunk(FIXED_ROWS if is_independent else rows, width, tile)
    chunks = triton.cdiv(width, per_chunk)
    partial_CTR = h_TJ.new_empty(chunks, rows, ranks, dtype=torch.float32)
    _swiglu_lora_kernel[(row_tiles, chunks)](
        gate_up_TF2, h_TJ if lora_A_RF is None else lora_A_RF, h_TJ, partial_CTR, rows, width,
        ranks, h_TJ.stride(0), per_chunk, *dropout.kernel_args(gate_up_TF2),
        has_lora=lora_A_RF is not None, is_dropped=dropout.p > 0.0, block_m=tile.block_m,
        block_n=tile.block_n, block_r=rank_block_size(ranks), num_warps=tile.num_warps,
        range_stages=tile.num_stages,
    )  # fmt: skip
    if lora_A_RF is None:
        h_TJ[:, width:].zero_()
        return h_TJ, None
    low_TR = sum_partials(partial_CTR, h_TJ.dtype, is_sequential=is_independent)
    if padding:
        h_TJ[:, width : width + ranks].copy_(low_TR)
        h_TJ[:, width + ranks :].zero_()
    return h_TJ, low_TR


@jit(do_not_specialize=["rows", "per_chunk", "salt", "threshold"])
def _swiglu_lora_backward_kernel(
    gate_up: Ptr, a: Ptr, dh: Ptr, dlow: Ptr, partial: Ptr, rows: int, per_chunk: int, width: int,
    ranks: int, dh_stride: int, dlow_stride: int, seed: Ptr, salt: int, threshold: int,
    scale: float, has_lora: tl.constexpr, is_dropped: tl.constexpr, writes_h: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr, range_stages: tl.constexpr,
) -> None:  # fmt: skip
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    mask_N, mask_R = c < width, r < ranks
    mask_RN = mask_R[:, None] & mask_N[None, :]
    narrow = gate_up.dtype.element_ty
    a_RN = tl.zeros((block_r, block_n), narrow)
    if has_lora:
        a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=mask_RN, other=0.0)
    da_RN = tl.zeros((block_r, block_n), tl.float32)
    last = tl.minimum(rows, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_m, num_stages=range_stages):
        m = start + tl.arange(0, block_m)
        mask_M, row_M = m < last, m.to(tl.int64)
        mask = mask_M[:, None] & mask_N[None, :]
        gate_up_ptrs = gate_up + row_M[:, None] * 2 * width + c[None, :]
        h_ptrs = dh + row_M[:, None] * dh_stride + c[None, :]
        g_MN = tl.load(gate_up_ptrs, mask=mask, other=0.0).to(tl.float32)
        u_MN = tl.load(gate_up_ptrs + width, mask=mask, other=0.0).to(tl.float32)
        dh_MN = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        if has_lora:
            dlow_MR = tl.load(dlow + row_M[:, None] * dlow_stride + r[None, :],
                              mask=mask_M[:, None] & mask_R[None, :], other=0.0)  # fmt: skip
            g_MN, lora_grad_MN = align_layouts(g_MN, tl.dot(dlow_MR, a_RN) * scale)
        sig_MN = 1.0 / (1.0 + tl.exp2(g_MN * -1.4426950408889634))
        silu_MN = g_MN * sig_MN
        h_MN = (silu_MN * u_MN).to(narrow)
        if writes_h:
            tl.store(h_ptrs, h_MN, mask=mask)
        if has_lora:
            if is_dropped:
                keep_MN = keep_mask(seed, salt, m, c, threshold)
                lora_grad_MN = tl.where(keep_MN, lora_grad_MN, 0.0)
                h_MN = tl.where(keep_MN, h_MN, 0.0)
            dh_MN += lora_grad_MN
            da_RN += tl.dot(tl.trans(dlow_MR), h_MN)
        dgate_MN = dh_MN * u_MN * sig_MN * (1.0 + g_MN * (1.0 - sig_MN))
        tl.store(gate_up_ptrs, dgate_MN, mask=mask)
        tl.store(gate_up_ptrs + width, dh_MN * silu_MN, mask=mask)
    if has_lora:
        out_ptrs_RN = partial + (chunk * ranks + r).to(tl.int64)[:, None] * width + c[None, :]
        tl.store(out_ptrs_RN, da_RN * scale, mask=mask_RN)


class SwigluGradients(NamedTuple):
    """Gradients of `swiglu_lora`."""

    gate_up_TF2: Tensor
    h_TF: Tensor | None
    lora_A_RF: Tensor | None


def swiglu_lora_backward(
    gate_up_TF2: Tensor, lora_A_RF: Tensor | None, dh_TF: Tensor, dlow_TR: Tensor | None,
    dropout: SeededDropout, *, recompute_h: bool = False,
) -> SwigluGradients:  # fmt: skip
    """Compute the backward pass of `swiglu_lora`, with sums in a deterministic order.

    Overwrites `gate_up_TF2`. With `recompute_h` it also overwrites `dh_TF` with the output h of
    SwiGLU.
    """
    rows, width = dh_TF.shape
    ranks, tile = 1 if lora_A_RF is None else len(lora_A_RF), SWIGLU_BACKWARD_TILE
    column_tiles = triton.cdiv(width, tile.block_n)
    per_chunk = rows_per_chunk(rows, column_tiles)
    chunks = triton.cdiv(rows, per_chunk)
    partial_chunks = chunks if lora_A_RF is not None else 0
    partial_CRF = dh_TF.new_empty(partial_chunks, ranks, width, dtype=torch.float32)
    dlow = dh_TF if dlow_TR is None else dlow_TR
    _swiglu_lora_backward_kernel[(column_tiles, chunks)](
        gate_up_TF2, dh_TF if lora_A_RF is None else lora_A_RF, dh_TF, dlow, partial_CRF, rows,
        per_chunk, width, ranks, dh_TF.stride(0), dlow.stride(0), *dropout.kernel_args(gate_up_TF2),
        has_lora=lora_A_RF is not None, is_dropped=dropout.p > 0.0, writes_h=recompute_h,
        block_m=tile.block_m, block_n=tile.block_n, block_r=rank_block_size(ranks),
        num_warps=tile.num_warps, range_stages=tile.num_stages,
    )  # fmt: skip
    da_RF = None if lora_A_RF is None else sum_partials(partial_CRF, lora_A_RF.dtype)
    return SwigluGradients(gate_up_TF2, dh_TF if recompute_h else None, da_RF)
