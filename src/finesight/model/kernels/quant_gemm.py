"""Triton tensor-core matmuls of up to 64 rows with quantized matrices, and rowwise dequantization.

Each code is read once. Each warp of a program processes a slice of the inputs (split-K), because
the outputs alone give too few programs to saturate a GPU. Weights are converted to the dtype of the
input rows, either exactly or rounded as in the dequantized matrix.

Shapes: R rows, O outputs, S slices, P rows and Q outputs of all slices, G groups, B bytes of a
group, K inputs of a slice per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finesight.model.kernels.quant_gemv import MatmulTiling, load_codebook_lane, lookup_codebook
from finesight.model.kernels.runtime import jit, tl, triton


def choose_gemm_tiling(out_features: int, rows: int) -> MatmulTiling:
    """Choose the tiling of a tensor-core matmul by the numbers of outputs and rows."""
    return MatmulTiling(
        block_outputs=16 if out_features <= 6144 or rows > 16 else 32, block_chunks=1, num_warps=4
    )


@jit
def _slice_offsets(slices: tl.constexpr, block: tl.constexpr, step: tl.constexpr):
    """Return row index and input offset of each line when the slices are concatenated."""
    line = tl.arange(0, slices * block)
    return line % block, line // block * step


@jit
def _accumulate(
    total_SRO, x_PK, w_QK, slices: tl.constexpr, block_r: tl.constexpr, block_o: tl.constexpr,
):  # fmt: skip
    x_SRK = tl.reshape(x_PK, (slices, block_r, x_PK.shape[1]))
    w_SOK = tl.reshape(w_QK.to(x_PK.dtype), (slices, block_o, x_PK.shape[1]))
    return tl.dot(x_SRK, tl.trans(w_SOK, (0, 2, 1)), total_SRO)


@jit
def _store(
    total_RO, bias, y, rows, out_features, has_bias: tl.constexpr, block_r: tl.constexpr,
    block_o: tl.constexpr,
):  # fmt: skip
    r, o = tl.arange(0, block_r), tl.program_id(0) * block_o + tl.arange(0, block_o)
    if has_bias:
        total_RO += tl.load(bias + o, mask=o < out_features, other=0.0).to(tl.float32)[None, :]
    mask_RO = (r < rows)[:, None] & (o < out_features)[None, :]
    tl.store(
        y + r[:, None] * out_features + o[None, :], total_RO.to(y.dtype.element_ty), mask=mask_RO
    )


@jit(do_not_specialize=["rows"])
def nf4_gemm_kernel(
    x, codes, scales, nested_absmax, absmax_mean, scale_codebook, codebook, bias, y, rows,
    out_features, in_features, has_bias: tl.constexpr, shuffled: tl.constexpr, slices: tl.constexpr,
    block_r: tl.constexpr, block_o: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    # A byte holds two adjacent inputs, the first in its high bits.
    o, g_of_o = _slice_offsets(slices, block_o, block_g)
    r, g_of_r = _slice_offsets(slices, block_r, block_g)
    o += tl.program_id(0) * block_o
    i, b = tl.arange(0, 64 * block_g), tl.arange(0, 32)
    groups = in_features // 64
    offset = tl.load(absmax_mean)
    lane_value = load_codebook_lane(codebook, shuffled)
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, groups, slices * block_g):
        g_QG = (start + g_of_o)[:, None] + tl.arange(0, block_g)[None, :]
        mask_QG = (o < out_features)[:, None] & (g_QG < groups)
        offsets_QG = (o * groups)[:, None] + g_QG
        packed_offsets = offsets_QG.to(tl.int64)[:, :, None] * 32 + b[None, None, :]
        packed = tl.load(codes + packed_offsets, mask=mask_QG[:, :, None], other=0).to(tl.int32)
        scale = tl.load(scales + offsets_QG, mask=mask_QG, other=0).to(tl.int32)
        nested_scale = tl.load(nested_absmax + offsets_QG // 256, mask=mask_QG, other=0.0)
        scale_QG1 = (tl.load(scale_codebook + scale) * nested_scale + offset)[:, :, None]
        high_QGB = lookup_codebook(packed, lane_value, codebook, 4, shuffled) * scale_QG1
        w_QGB2 = tl.join(
            high_QGB, lookup_codebook(packed, lane_value, codebook, 0, shuffled) * scale_QG1
        )
        k_PK = ((start + g_of_r) * 64)[:, None] + i[None, :]
        mask_PK = (r < rows)[:, None] & (k_PK < in_features)
        x_PK = tl.load(x + (r * in_features)[:, None] + k_PK, mask=mask_PK, other=0.0)
        w_QK = tl.reshape(w_QGB2, (slices * block_o, 64 * block_g))
        total_SRO = _accumulate(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    _store(tl.sum(total_SRO, axis=0), bias, y, rows, out_features, has_bias, block_r, block_o)


@jit(do_not_specialize=["rows"])
def int4_gemm_kernel(
    x, codes, scales, zeros, bias, y, rows, out_features, in_features, group_size: tl.constexpr,
    has_bias: tl.constexpr, slices: tl.constexpr, block_r: tl.constexpr, block_o: tl.constexpr,
    block_g: tl.constexpr,
):  # fmt: skip
    # A byte holds an input of the first half in its low bits, one of the second in its high bits.
    # Here a group is 32 of them, regardless of the size of the groups that share a scale.
    o, g_of_o = _slice_offsets(slices, block_o, block_g)
    r, g_of_r = _slice_offsets(slices, block_r, block_g)
    o += tl.program_id(0) * block_o
    i, b = tl.arange(0, 32 * block_g), tl.arange(0, 32)
    half = in_features // 2
    groups = half // 32
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, groups, slices * block_g):
        g_QG = (start + g_of_o)[:, None] + tl.arange(0, block_g)[None, :]
        mask_QG = (o < out_features)[:, None] & (g_QG < groups)
        packed_offsets = (o.to(tl.int64) * groups)[:, None] + g_QG
        packed_offsets = packed_offsets[:, :, None] * 32 + b[None, None, :]
        packed = tl.load(codes + packed_offsets, mask=mask_QG[:, :, None], other=0).to(tl.int32)
        k_PK = ((start + g_of_r) * 32)[:, None] + i[None, :]
        mask_PK = (r < rows)[:, None] & (k_PK < half)
        for half_index in tl.static_range(2):
            offsets_QG = (o * (in_features // group_size))[:, None] + (
                half_index * half + g_QG * 32
            ) // group_size
            scale = tl.load(scales + offsets_QG, mask=mask_QG, other=0.0).to(tl.float32)
            zero = tl.load(zeros + offsets_QG, mask=mask_QG, other=0).to(tl.float32)
            # The bits of 2^23 + code in fp32 need no conversion; the difference is exact.
            code = (((packed >> (4 * half_index)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
            w_QGB = (code - (zero + 8388608.0)[:, :, None]) * scale[:, :, None]
            x_offsets = (r * in_features + half_index * half)[:, None] + k_PK
            x_PK = tl.load(x + x_offsets, mask=mask_PK, other=0.0)
            w_QK = tl.reshape(w_QGB, (slices * block_o, 32 * block_g))
            total_SRO = _accumulate(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    _store(tl.sum(total_SRO, axis=0), bias, y, rows, out_features, has_bias, block_r, block_o)


@jit(do_not_specialize=["rows"])
def rowwise_gemm_kernel(
    x, codes, scales, bias, y, rows, out_features, in_features, has_bias: tl.constexpr,
    slices: tl.constexpr, block_r: tl.constexpr, block_o: tl.constexpr, block_g: tl.constexpr,
):  # fmt: skip
    block_k: tl.constexpr = 64 * block_g
    o, k_of_o = _slice_offsets(slices, block_o, block_k)
    r, k_of_r = _slice_offsets(slices, block_r, block_k)
    o += tl.program_id(0) * block_o
    i = tl.arange(0, block_k)
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, in_features, slices * block_k):
        k_QK = (start + k_of_o)[:, None] + i[None, :]
        mask_QK = (o < out_features)[:, None] & (k_QK < in_features)
        w_offsets = (o.to(tl.int64) * in_features)[:, None] + k_QK
        w_QK = tl.load(codes + w_offsets, mask=mask_QK, other=0.0).to(tl.float32)
        k_PK = (start + k_of_r)[:, None] + i[None, :]
        mask_PK = (r < rows)[:, None] & (k_PK < in_features)
        x_PK = tl.load(x + (r * in_features)[:, None] + k_PK, mask=mask_PK, other=0.0)
        total_SRO = _accumulate(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    columns = tl.program_id(0) * block_o + tl.arange(0, block_o)
    scale_O = tl.load(scales + columns, mask=columns < out_features, other=0.0)
    total_RO = tl.sum(total_SRO, axis=0) * scale_O[None, :]
    _store(total_RO, bias, y, rows, out_features, has_bias, block_r, block_o)


def gemm(
    kernel: Any, x_RI: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, out_features: int,
    tiling: MatmulTiling | None = None, **constants: int,
) -> Tensor:  # fmt: skip
    """Compute x W^T + bias [R, O] with a kernel of this module and the quantized `weights`."""
    rows, in_features = x_RI.shape
    tiling = tiling or choose_gemm_tiling(out_features, rows)
    y_RO = x_RI.new_empty(rows, out_features)
    kernel[(triton.cdiv(out_features, tiling.block_outputs),)](
        x_RI, *weights, x_RI if bias is None else bias, y_RO, rows, out_features, in_features,
        has_bias=bias is not None, slices=tiling.num_warps,
        block_r=max(16, 1 << (rows - 1).bit_length()), block_o=tiling.block_outputs,
        # The pipeline stages must fit the shared memory of small GPUs.
        num_warps=tiling.num_warps, num_stages=3 if rows <= 16 else 2,
        block_g=tiling.block_chunks, **constants,
    )  # fmt: skip
    return y_RO


@jit
def _dequantize_rowwise_kernel(codes, scales, w, in_features, block: tl.constexpr):
    o = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    values = tl.load(codes + o * in_features + i, mask=i < in_features, other=0.0).to(tl.float32)
    values *= tl.load(scales + o)
    tl.store(w + o * in_features + i, values.to(w.dtype.element_ty), mask=i < in_features)


def dequantize_rowwise(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dequantized matrix [O, I] of an INT8 or FP8 matrix, rounded once."""
    out_features, in_features = codes_OI.shape
    w_OI = torch.empty(out_features, in_features, dtype=dtype, device=codes_OI.device)
    grid = (out_features, triton.cdiv(in_features, 2048))
    _dequantize_rowwise_kernel[grid](codes_OI, scales_O, w_OI, in_features, block=2048)
    return w_OI
