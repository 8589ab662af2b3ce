"""Triton kernels of LoRA.

They compute the down-projection with dropout and its backward pass, add the up-projection to a
rounded base product, and copy updated up-projections. Accumulation is fp32.

Shapes: T tokens, I inputs, O outputs of a layer, R its rank, S ranks of all layers of a fused
linear, Z of them beyond a power of two, J input columns including the LoRA padding, C chunks of
rows, P matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import (
    CONCURRENT_PROGRAMS,
    LORA_DOWN_BACKWARD_TILE,
    Ptr,
    SeededDropout,
    TileConfig,
    align_layouts,
    hash_u32,
    jit,
    keep_mask,
    rank_block_size,
    rows_per_chunk,
    sum_partials,
    tl,
    triton,
)

DOWN_TILE, UP_TILE = TileConfig(32, 64, 4, 4), TileConfig(64, 64, 4, 2)
"""Tiles of the down-projection and the up-projection; fastest on an H200."""

LARGE_RANK_SUM = 192
"""Sum of LoRA ranks above which the backward kernel uses more warps, for registers, and fewer
pipeline stages."""


@jit(do_not_specialize=["rows", "salt", "threshold"])
def _lora_down_kernel(
    x: Ptr, a: Ptr, copy: Ptr, low: Ptr, rows: int, width: int, stride: int, ranks: int,
    padding: int, seed: Ptr, salt: int, threshold: int, scale: float, is_dropped: tl.constexpr,
    is_copied: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
    range_stages: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    r = tl.arange(0, block_r)
    mask_M, mask_R, row_M = m < rows, r < ranks, m.to(tl.int64)
    row_ptrs_M = copy + row_M * (width + padding)
    low_MR = tl.zeros((block_m, block_r), tl.float32)
    for start in tl.range(0, width, block_n, num_stages=range_stages):
        c = start + tl.arange(0, block_n)
        mask_N = c < width
        mask = mask_M[:, None] & mask_N[None, :]
        x_MN = tl.load(x + row_M[:, None] * stride + c[None, :], mask=mask, other=0.0)
        if is_copied:
            tl.store(row_ptrs_M[:, None] + c[None, :], x_MN, mask=mask)
        if is_dropped:
            x_MN = tl.where(keep_mask(seed, salt, m, c, threshold), x_MN, 0.0)
        mask_RN = mask_R[:, None] & mask_N[None, :]
        a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=mask_RN, other=0.0)
        low_MR += tl.dot(x_MN, tl.trans(a_RN))
    low_MR = (low_MR * scale).to(low.dtype.element_ty)
    out_ptrs_MR = low + row_M[:, None] * ranks + r[None, :]
    tl.store(out_ptrs_MR, low_MR, mask=mask_M[:, None] & mask_R[None, :])
    if is_copied:
        row_ptrs_M += width
        tl.store(
            row_ptrs_M[:, None] + r[None, :], low_MR, mask=mask_M[:, None] & (r < padding)[None, :]
        )
        for start in range(block_r, padding, block_r):
            mask = mask_M[:, None] & (start + r < padding)[None, :]
            tl.store(row_ptrs_M[:, None] + start + r[None, :], 0.0, mask=mask)


def lora_down(
    x_TI: Tensor, lora_A_RI: Tensor, dropout: SeededDropout, padding: int
) -> tuple[Tensor, Tensor]:
    """Compute the LoRA activations, scale * dropout(x) A^T, [T, R].

    Returns:
        With `padding`, a copy of `x_TI` whose additional columns hold the activations and zeros,
        otherwise `x_TI` itself; and the activations.
    """
    (rows, width), ranks, tile = x_TI.shape, len(lora_A_RI), DOWN_TILE
    low_TR = x_TI.new_empty(rows, ranks)
    x_TJ = x_TI.new_empty(rows, width + padding) if padding else x_TI
    _lora_down_kernel[(triton.cdiv(rows, tile.block_m),)](
        x_TI, lora_A_RI, x_TJ, low_TR, rows, width, x_TI.stride(0), ranks, padding,
        *dropout.kernel_args(x_TI), is_dropped=dropout.p > 0.0, is_copied=padding > 0,
        block_m=tile.block_m, block_n=tile.block_n, block_r=rank_block_size(ranks),
        num_warps=tile.num_warps, range_stages=tile.num_stages,
    )  # fmt: skip
    return x_TJ, low_TR


class RmsNormStats(NamedTuple):
    """Weight and reciprocal RMS of the RMS norm before a linear layer."""

    weight_I: Tensor
    rstd_T: Tensor


@jit(do_not_specialize=["rows", "per_chunk", "salt", "threshold"])
def _lora_down_backward_kernel(
    x: Ptr, w: Ptr, scales: Ptr, dn: Ptr, dlow: Ptr, a: Ptr, dx: Ptr, partial: Ptr, rows: int,
    per_chunk: int, width: int, ranks: int, dn_stride: int, dlow_stride: int, seed: Ptr, salt: int,
    threshold: int, scale: float, needs_input_grad: tl.constexpr, is_normed: tl.constexpr,
    is_dropped: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, block_s: tl.constexpr,
    block_z: tl.constexpr, range_stages: tl.constexpr,
) -> None:  # fmt: skip
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    chunk = tl.program_id(1)
    # Use two power-of-two blocks: with one, a quarter or more of the ranks might be padding.
    s = tl.arange(0, block_s)
    mask_N, mask_S = c < width, s < ranks
    mask_SN = mask_S[:, None] & mask_N[None, :]
    a_SN = tl.load(a + s[:, None] * width + c[None, :], mask=mask_SN, other=0.0)
    da_SN = tl.zeros((block_s, block_n), tl.float32)
    if block_z:
        z = block_s + tl.arange(0, block_z)
        mask_Z = z < ranks
        mask_ZN = mask_Z[:, None] & mask_N[None, :]
        a_ZN = tl.load(a + z[:, None] * width + c[None, :], mask=mask_ZN, other=0.0)
        da_ZN = tl.zeros((block_z, block_n), tl.float32)
    if is_normed:
        w_N = tl.load(w + c, mask=mask_N, other=0.0).to(tl.float32)
    last = tl.minimum(rows, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_m, num_stages=range_stages):
        m = start + tl.arange(0, block_m)
        mask_M, row_M = m < last, m.to(tl.int64)
        mask = mask_M[:, None] & mask_N[None, :]
        offsets = row_M[:, None] * width + c[None, :]
        n_MN = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        dlow_ptrs_MS = dlow + row_M[:, None] * dlow_stride + s[None, :]
        dlow_MS = tl.load(dlow_ptrs_MS, mask=mask_M[:, None] & mask_S[None, :], other=0.0)
        if block_z:
            dlow_ptrs_MZ = dlow + row_M[:, None] * dlow_stride + z[None, :]
            dlow_MZ = tl.load(dlow_ptrs_MZ, mask=mask_M[:, None] & mask_Z[None, :], other=0.0)
        if needs_input_grad:
            lora_grad_MN = tl.dot(dlow_MS, a_SN)
            if block_z:
                lora_grad_MN = tl.dot(dlow_MZ, a_ZN, lora_grad_MN)
            n_MN, lora_grad_MN = align_layouts(n_MN, lora_grad_MN * scale)
        if is_normed:
            rstd_M = tl.load(scales + m, mask=mask_M, other=0.0)
            n_MN = n_MN * rstd_M[:, None] * w_N[None, :]
        n_MN = n_MN.to(x.dtype.element_ty)
        # Masked elements are zero anyway; the mask avoids recomputation, see `swiglu`.
        keep_MN = mask
        if is_dropped:
            keep_MN = keep_mask(seed, salt, m, c, threshold)
        n_MN = tl.where(keep_MN, n_MN, 0.0)
        if needs_input_grad:
            dn_ptrs_MN = dn + row_M[:, None] * dn_stride + c[None, :]
            dn_MN = tl.load(dn_ptrs_MN, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx + offsets, dn_MN + tl.where(keep_MN, lora_grad_MN, 0.0), mask=mask)
        da_SN += tl.dot(tl.trans(dlow_MS), n_MN)
        if block_z:
            da_ZN += tl.dot(tl.trans(dlow_MZ), n_MN)
    out_ptrs_SN = partial + (chunk * ranks + s).to(tl.int64)[:, None] * width + c[None, :]
    tl.store(out_ptrs_SN, da_SN * scale, mask=mask_SN)
    if block_z:
        out_ptrs_ZN = partial + (chunk * ranks + z).to(tl.int64)[:, None] * width + c[None, :]
        tl.store(out_ptrs_ZN, da_ZN * scale, mask=mask_ZN)


def lora_down_backward(
    x_TI: Tensor,
    norm_stats: RmsNormStats | None,
    dn_TI: Tensor,
    dlow_TS: Tensor,
    lora_A_SI: Tensor,
    dropout: SeededDropout,
) -> tuple[Tensor, Tensor]:
    """Compute the backward pass of the LoRA down-projection.

    Here n is the input of the adapter: the RMS norm of `x_TI`, which is recomputed from
    `norm_stats`, or `x_TI` itself without a norm.

    Returns:
        The total gradient of n in a new tensor, and the gradient of lora_A, summed in a
        deterministic order.
    """
    dx_TI = torch.empty_like(x_TI)
    return dx_TI, _launch_lora_down_backward(
        x_TI, norm_stats, (dn_TI, dx_TI), dlow_TS, lora_A_SI, dropout
    )


def lora_A_grad(
    x_TI: Tensor,
    norm_stats: RmsNormStats | None,
    dlow_TS: Tensor,
    lora_A_SI: Tensor,
    dropout: SeededDropout,
) -> Tensor:
    """Compute only the gradient of lora_A; see `lora_down_backward` for the arguments."""
    return _launch_lora_down_backward(x_TI, norm_stats, None, dlow_TS, lora_A_SI, dropout)


def _launch_lora_down_backward(
    x_TI: Tensor,
    norm_stats: RmsNormStats | None,
    input_grads: tuple[Tensor, Tensor] | None,
    dlow_TS: Tensor,
    lora_A_SI: Tensor,
    dropout: SeededDropout,
) -> Tensor:
    """Launch the backward kernel of the LoRA down-projection and return the gradient of lora_A."""
    (rows, width), ranks, tile = x_TI.shape, len(lora_A_SI), LORA_DOWN_BACKWARD_TILE
    column_tiles = triton.cdiv(width, tile.block_n)
    per_chunk = rows_per_chunk(rows, column_tiles, CONCURRENT_PROGRAMS)
    chunks = triton.cdiv(rows, per_chunk)
    partial_CSI = x_TI.new_empty(chunks, ranks, width, dtype=torch.float32)
    w, scales = norm_stats or (x_TI, x_TI)
    dn, dx = input_grads or (x_TI, x_TI)
    (block_s, block_z), has_large_ranks = _split_ranks(ranks), ranks > LARGE_RANK_SUM
    _lora_down_backward_kernel[(column_tiles, chunks)](
        x_TI, w, scales, dn, dlow_TS, lora_A_SI, dx, partial_CSI, rows, per_chunk, width, ranks,
        dn.stride(0), dlow_TS.stride(0), *dropout.kernel_args(x_TI),
        needs_input_grad=input_grads is not None, is_normed=norm_stats is not None,
        is_dropped=dropout.p > 0.0, block_m=tile.block_m, block_n=tile.block_n, block_s=block_s,
        block_z=block_z, range_stages=2 if has_large_ranks else tile.num_stages,
        num_warps=2 * tile.num_warps if has_large_ranks else tile.num_warps,
    )  # fmt: skip
    return sum_partials(partial_CSI, lora_A_SI.dtype)


def _split_ranks(ranks: int) -> tuple[int, int]:
    """Split the ranks into two power-of-two blocks."""
    padded_ranks = rank_block_size(ranks)
    is_split_cheaper = padded_ranks >= 64 and 4 * ranks <= 3 * padded_ranks
    return (padded_ranks // 2, padded_ranks // 4) if is_split_cheaper else (padded_ranks, 0)


@jit
def _stochastic_round(
    y_MN: tl.tensor, total_MN: tl.tensor, c: tl.tensor, dropped_bits: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Round fp32 sums stochastically by dropping `dropped_bits` mantissa bits.

    The expected value equals the sum up to fp32 precision (in fp16, above the smallest normal
    value). The random bits are a function of the base product `y_MN` and the column, so that the
    result of a sample is independent of the batch.
    """
    bits_MN = total_MN.to(tl.uint32, bitcast=True)
    y_bits_MN = y_MN.to(tl.uint16, bitcast=True).to(tl.uint32)
    # Multiples of the golden ratio spread adjacent values, with an offset for each column.
    seed_N = hash_u32(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    noise_MN = (y_bits_MN * 0x9E3779B1 + seed_N[None, :]) >> (32 - dropped_bits)
    rounded_MN = (((bits_MN + noise_MN) >> dropped_bits) << dropped_bits).to(
        tl.float32, bitcast=True
    )
    # Non-finite values are unchanged: adding noise could change their bits.
    return tl.where(tl.abs(total_MN) < float("inf"), rounded_MN, total_MN)


@jit(do_not_specialize=["rows"])
def _add_lora_up_kernel(
    y: Ptr, low: Ptr, b: Ptr, rows: int, width: int, ranks: int, y_stride: int, low_stride: int,
    b_stride: int, scale: float, dropped_bits: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_r: tl.constexpr,
) -> None:  # fmt: skip
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    mask_M, mask_N, row_M = m < rows, c < width, m.to(tl.int64)
    ptrs, mask = y + row_M[:, None] * y_stride + c[None, :], mask_M[:, None] & mask_N[None, :]
    y_MN = tl.load(ptrs, mask=mask, other=0.0)
    delta_MN = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, ranks, block_r):
        r = start + tl.arange(0, block_r)
        mask_R = r < ranks
        low_MR = tl.load(low + row_M[:, None] * low_stride + r[None, :],
                         mask=mask_M[:, None] & mask_R[None, :], other=0.0)  # fmt: skip
        b_NR = tl.load(b + c[:, None] * b_stride + r[None, :],
                       mask=mask_N[:, None] & mask_R[None, :], other=0.0)  # fmt: skip
        delta_MN += tl.dot(low_MR, tl.trans(b_NR))
    total_MN = y_MN.to(tl.float32) + delta_MN * scale
    tl.store(ptrs, _stochastic_round(y_MN, total_MN, c, dropped_bits), mask=mask)


def add_lora_up(y_TO: Tensor, low_TR: Tensor, lora_B_OR: Tensor, scale: float) -> None:
    """Add the LoRA delta, scale * low B^T, to a 16-bit base product in place."""
    (rows, width), ranks, tile = y_TO.shape, lora_B_OR.shape[1], UP_TILE
    assert low_TR.shape == (rows, ranks), f"{tuple(low_TR.shape)}, not {rows, ranks}"
    assert len(lora_B_OR) == width, f"{len(lora_B_OR)} outputs, not {width}"
    assert all(t.stride(1) == 1 for t in (y_TO, low_TR, lora_B_OR)), "rows must be contiguous"
    _add_lora_up_kernel[(triton.cdiv(width, tile.block_n), triton.cdiv(rows, tile.block_m))](
        y_TO, low_TR, lora_B_OR, rows, width, ranks, y_TO.stride(0), low_TR.stride(0),
        lora_B_OR.stride(0), scale, dropped_bits=16 if y_TO.dtype == torch.bfloat16 else 13,
        block_m=tile.block_m, block_n=tile.block_n, block_r=min(64, rank_block_size(ranks)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@jit
def _copy_matrices_kernel(
    table: Ptr, reference: Ptr, block_m: tl.constexpr, block_n: tl.constexpr
) -> None:
    row = table + tl.program_id(0).to(tl.int64) * 5
    source = tl.load(row).to(reference.dtype)
    target = tl.load(row + 1).to(reference.dtype)
    rows, columns, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    start = tl.program_id(1) * block_m
    if start >= rows:
        return
    m, n = start + tl.arange(0, block_m), tl.arange(0, block_n)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    x_MN = tl.load(source + m[:, None] * columns + n[None, :], mask=mask)
    tl.store(target + m[:, None] * stride + n[None, :], x_MN, mask=mask)


def copy_matrices(table_P5: Tensor, max_rows: int, max_columns: int, reference: Tensor) -> None:
    """Copy contiguous matrices to strided destinations, with one kernel.

    Each row of `table_P5` (int64, on the device) holds source address, destination address, rows,
    columns and destination stride in elements. All matrices have the dtype of `reference`.
    """
    _copy_matrices_kernel[(len(table_P5), triton.cdiv(max_rows, 64))](
        table_P5, reference, block_m=64, block_n=rank_block_size(max_columns), num_warps=8
    )
