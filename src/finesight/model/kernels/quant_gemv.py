"""Triton kernels of matrix-vector products (GEMV) with quantized matrices, and INT4 dequantization.

8-bit matrices (INT8 and FP8): a thread reads 16 bytes of several outputs at once, converts them in
registers and accumulates in fp32; threads exchange only the final sums. Programs that compute the
same outputs for several rows are adjacent in the grid and share the cached codes.

4-bit matrices (INT4 and NF4): a thread reads 32-bit words of eight codes. The inputs of the k-th
code of all words are stored in a separate array, so that a word and its inputs are in the same
thread. A preceding kernel packs the input row in this layout and applies the RMS norm.

Shapes: R rows, O outputs, I inputs, T chunks of 16 bytes, E bytes of a chunk, N = I / 8 words of a
row, J words per block, G groups of inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.kernels.runtime import jit, tl, triton
from finesight.model.quant.base import PackedInput, RmsNormParams


class MatmulTiling(NamedTuple):
    """Tiling of a matmul with a quantized matrix."""

    block_outputs: int
    block_chunks: int
    num_warps: int


def choose_gemv_tiling(out_features: int, row_bytes: int) -> MatmulTiling:
    """Choose the tiling of a GEMV by output count and bytes per output."""
    # With few outputs SMs are idle unless several warps share a row.
    if out_features > 6144:
        warps = 1
    elif row_bytes >= 2048:
        warps = 4
    else:
        warps = 2
    return MatmulTiling(block_outputs=4, block_chunks=32 * warps, num_warps=warps)


@jit
def _store_sums(
    total_OTE, bias, y, first, out_features, has_bias: tl.constexpr, block_o: tl.constexpr
):
    sums_O = tl.sum(tl.sum(total_OTE, axis=2), axis=1)
    o = first + tl.arange(0, block_o)
    if has_bias:
        sums_O += tl.load(bias + o, mask=o < out_features, other=0.0).to(tl.float32)
    out_ptrs = y + tl.program_id(0).to(tl.int64) * out_features + o
    tl.store(out_ptrs, sums_O.to(y.dtype.element_ty), mask=o < out_features)


@jit
def _rowwise_gemv_kernel(
    x, codes, scales, bias, y, out_features, in_features, has_bias: tl.constexpr,
    block_o: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    x += tl.program_id(0).to(tl.int64) * in_features
    first = tl.program_id(1) * block_o
    o, e = tl.arange(0, block_o), tl.arange(0, 16)
    num_chunks = in_features // 16
    codes += first.to(tl.int64) * in_features
    total_OTE = tl.zeros((block_o, block_t, 16), tl.float32)
    for start in range(0, num_chunks, block_t):
        t = start + tl.arange(0, block_t)
        mask_OT = (first + o < out_features)[:, None] & (t < num_chunks)[None, :]
        offsets_OTE = (o * in_features)[:, None, None] + (t * 16)[None, :, None] + e[None, None, :]
        w_OTE = tl.load(codes + offsets_OTE, mask=mask_OT[:, :, None], other=0.0).to(tl.float32)
        offsets_TE = (t * 16)[:, None] + e[None, :]
        x_TE = tl.load(x + offsets_TE, mask=(t < num_chunks)[:, None], other=0.0)
        total_OTE += w_OTE * x_TE.to(tl.float32)[None, :, :]
    scale_O = tl.load(scales + first + o, mask=first + o < out_features, other=0.0)
    _store_sums(total_OTE * scale_O[:, None, None], bias, y, first, out_features, has_bias, block_o)


def rowwise_gemv(
    x_RI: Tensor, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, tiling: MatmulTiling
) -> Tensor:
    """Compute x W^T + bias [R, O] with an 8-bit matrix of `model.quant.int8`."""
    rows, (out_features, in_features) = len(x_RI), codes_OI.shape
    y_RO = x_RI.new_empty(rows, out_features)
    _rowwise_gemv_kernel[(rows, triton.cdiv(out_features, tiling.block_outputs))](
        x_RI, codes_OI, scales_O, x_RI if bias is None else bias, y_RO, out_features, in_features,
        has_bias=bias is not None, block_o=tiling.block_outputs, block_t=tiling.block_chunks,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return y_RO


_WORDS_PER_PROGRAM = 128
"""Number of words per program of the kernel that packs the input row."""


@jit
def _pack_input_kernel(
    x, norm, packed, sums, in_features, eps, is_normed: tl.constexpr, halves: tl.constexpr,
    words_per_group: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    num_words = in_features // 8
    scale = 1.0
    if is_normed:
        square = tl.zeros((1024,), tl.float32)
        for start in range(0, in_features, 1024):
            i = start + tl.arange(0, 1024)
            chunk = tl.load(x + i, mask=i < in_features, other=0.0).to(tl.float32)
            square += chunk * chunk
        scale = 1.0 / tl.sqrt(tl.sum(square, 0) / in_features + eps)
    j = tl.program_id(0) * block_j + tl.arange(0, block_j)
    k = tl.arange(0, 8)
    if halves:
        offsets = (k % 4 + k // 4 * (in_features // 2))[:, None] + 4 * j[None, :]
    else:
        offsets = k[:, None] + 8 * j[None, :]
    mask = (k >= 0)[:, None] & (j < num_words)[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if is_normed:
        value = value * scale * tl.load(norm + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    tl.store(packed + k[:, None] * num_words + j[None, :], value, mask=mask)
    if halves:
        groups: tl.constexpr = block_j // words_per_group
        summed = tl.sum(tl.sum(tl.reshape(value, (2, 4, groups, words_per_group)), 3), 1)
        g, h = tl.program_id(0) * groups + tl.arange(0, groups), tl.arange(0, 2)
        out_ptrs = sums + h[:, None] * (num_words // words_per_group) + g[None, :]
        tl.store(
            out_ptrs, summed, mask=(h >= 0)[:, None] & (g < num_words // words_per_group)[None, :]
        )


def pack_input(x_1I: Tensor, norm: RmsNormParams | None, group_size: int | None) -> PackedInput:
    """Pack an input row for the GEMV kernels, after an optional RMS norm.

    Without `group_size` (NF4), a word holds the codes of eight adjacent inputs. With it (INT4), a
    word holds the codes of four inputs of the first half and four of the second, and the inputs of
    a group share scale and zero point.
    """
    in_features = x_1I.shape[1]
    values_8N = torch.empty(8, in_features // 8, dtype=torch.float32, device=x_1I.device)
    halves = group_size is not None
    group_sums_G = (
        values_8N.new_empty(in_features // group_size) if group_size is not None else values_8N
    )
    _pack_input_kernel[(triton.cdiv(in_features // 8, _WORDS_PER_PROGRAM),)](
        x_1I.contiguous(), x_1I if norm is None else norm.weight_I, values_8N, group_sums_G,
        in_features, 0.0 if norm is None else norm.eps, is_normed=norm is not None, halves=halves,
        words_per_group=1 if group_size is None else group_size // 4, block_j=_WORDS_PER_PROGRAM,
    )  # fmt: skip
    return PackedInput(values_8N, group_sums_G if halves else None)


@jit
def _nibble_plus_128(packed, shift: tl.constexpr):
    """Return 128 plus a 4-bit code in fp32, exactly and without a conversion.

    The four bits of `packed`, `shift` below bit 16, become the last integer bits of the fp32 value
    128.
    """
    if shift > 0:
        packed = packed << shift
    if shift < 0:
        packed = packed >> -shift
    return ((packed & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@jit
def _store_output(
    y_O, bias, residual, y, o, mask_O, has_bias: tl.constexpr, has_residual: tl.constexpr
):
    if has_bias:
        y_O += tl.load(bias + o, mask=mask_O, other=0.0).to(tl.float32)
    if has_residual:
        y_O += tl.load(residual + o, mask=mask_O, other=0.0).to(tl.float32)
    tl.store(y + o, y_O.to(y.dtype.element_ty), mask=mask_O)


@jit
def _int4_gemv_kernel(
    packed, sums, codes, scales, zeros, bias, residual, y, out_features, num_words,
    has_bias: tl.constexpr, has_residual: tl.constexpr, words_per_group: tl.constexpr,
    block_o: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    # The low four bits of a word's bytes are codes of the first half, the high four of the second.
    # The offset of 128 is subtracted together with the zero point of the group.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    mask_O = o < out_features
    groups: tl.constexpr = block_j // words_per_group
    half = num_words // words_per_group
    row = codes + o.to(tl.int64)[:, None] * num_words
    total_OG = tl.zeros((block_o, groups), tl.float32)
    for start in range(0, num_words, block_j):
        j = start + tl.arange(0, block_j)
        word_mask = (j < num_words)[None, :]
        bits = tl.load(row + j[None, :], mask=mask_O[:, None] & word_mask, other=0)
        x = packed + j[None, :]
        low_half = tl.zeros((block_o, block_j), tl.float32)
        for byte in tl.static_range(4):
            low_half += _nibble_plus_128(bits, 16 - 8 * byte) * tl.load(
                x, mask=word_mask, other=0.0
            )
            x += num_words
        high_half = tl.zeros((block_o, block_j), tl.float32)
        for byte in tl.static_range(4):
            high_half += _nibble_plus_128(bits, 12 - 8 * byte) * tl.load(
                x, mask=word_mask, other=0.0
            )
            x += num_words
        g = start // words_per_group + tl.arange(0, groups)
        mask = mask_O[:, None] & (g < half)[None, :]
        offsets = o[:, None] * (2 * half) + g[None, :]
        for half_index in tl.static_range(2):
            half_sums = low_half if half_index == 0 else high_half
            group_sums_OG = tl.sum(tl.reshape(half_sums, (block_o, groups, words_per_group)), 2)
            scale = tl.load(scales + offsets + half_index * half, mask=mask, other=0.0).to(
                tl.float32
            )
            zero = tl.load(zeros + offsets + half_index * half, mask=mask, other=0).to(tl.float32)
            sum_1G = tl.load(
                sums + half_index * half + g[None, :], mask=(g < half)[None, :], other=0.0
            )
            total_OG += (group_sums_OG - (zero + 128.0) * sum_1G) * scale
    _store_output(tl.sum(total_OG, 1), bias, residual, y, o, mask_O, has_bias, has_residual)


def int4_gemv(
    x: PackedInput, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, group_size: int,
    y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None,
) -> None:  # fmt: skip
    """Compute x W^T + bias + residual of a packed row and an INT4 matrix."""
    assert x.group_sums_G is not None, "packed input without group sums"
    out_features, num_words = len(codes), codes.shape[1] // 4
    # Fastest on an H200 (benchmarks/quant_gemv.py).
    block_o, block_j = (8, 128) if out_features >= 65536 else (4, 512)
    _int4_gemv_kernel[(triton.cdiv(out_features, block_o),)](
        x.values_8N, x.group_sums_G, codes.view(torch.int32), scales_OG, zeros_OG,
        y_O if bias_O is None else bias_O, y_O if residual_O is None else residual_O, y_O,
        out_features, num_words, has_bias=bias_O is not None, has_residual=residual_O is not None,
        words_per_group=group_size // 4, block_o=block_o, block_j=block_j, num_warps=block_j // 128,
    )  # fmt: skip


@jit
def load_codebook_lane(codebook, shuffled: tl.constexpr):
    """Load the codebook value of this thread for the warp shuffles of `lookup_codebook`."""
    value = 0.0
    if shuffled:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1
        )
        value = tl.load(codebook + (lane & 15))
    return value


@jit
def lookup_codebook(packed, lane_value, codebook, shift: tl.constexpr, shuffled: tl.constexpr):
    """Look up the codebook values of the four bits that start at `shift`.

    Each thread of a warp holds one of the 16 values and reads the others by warp shuffle; a table
    in memory would need an address per element. The Triton interpreter has no warps and uses the
    table.
    """
    if shuffled:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=r,r,r",
            [lane_value, packed >> shift], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(codebook + ((packed >> shift) & 15))


@jit
def _nf4_gemv_kernel(
    packed, codes, scales, nested_absmax, absmax_mean, scale_codebook, codebook, bias, residual, y,
    out_features, num_words, has_bias: tl.constexpr, has_residual: tl.constexpr,
    shuffled: tl.constexpr, block_o: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    # A byte holds the codes of two adjacent inputs, the first in its high bits; eight words share a
    # scale.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    mask_O = o < out_features
    blocks: tl.constexpr = block_j // 8
    row_blocks = num_words // 8
    offset = tl.load(absmax_mean)
    lane_value = load_codebook_lane(codebook, shuffled)
    row = codes + o.to(tl.int64)[:, None] * num_words
    total_OB = tl.zeros((block_o, blocks), tl.float32)
    for start in range(0, num_words, block_j):
        j = start + tl.arange(0, block_j)
        word_mask = (j < num_words)[None, :]
        bits = tl.load(row + j[None, :], mask=mask_O[:, None] & word_mask, other=0)
        word_sums = tl.zeros((block_o, block_j), tl.float32)
        x = packed + j[None, :]
        for byte in tl.static_range(4):
            even = tl.load(x, mask=word_mask, other=0.0)
            odd = tl.load(x + num_words, mask=word_mask, other=0.0)
            word_sums += lookup_codebook(bits, lane_value, codebook, 8 * byte + 4, shuffled) * even
            word_sums += lookup_codebook(bits, lane_value, codebook, 8 * byte, shuffled) * odd
            x += 2 * num_words
        block_sums_OB = tl.sum(tl.reshape(word_sums, (block_o, blocks, 8)), 2)
        b = start // 8 + tl.arange(0, blocks)
        mask = mask_O[:, None] & (b < row_blocks)[None, :]
        offsets = o[:, None] * row_blocks + b[None, :]
        scale = tl.load(scales + offsets, mask=mask, other=0).to(tl.int32)
        nested_scale = tl.load(nested_absmax + offsets // 256, mask=mask, other=0.0)
        total_OB += block_sums_OB * (tl.load(scale_codebook + scale) * nested_scale + offset)
    _store_output(tl.sum(total_OB, 1), bias, residual, y, o, mask_O, has_bias, has_residual)


def nf4_gemv(
    x: PackedInput, codes: Tensor, absmax_B: Tensor, nested_absmax: Tensor, absmax_mean: Tensor,
    codebooks: tuple[Tensor, Tensor], y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None,
) -> None:  # fmt: skip
    """Compute x W^T + bias + residual of a packed row and an NF4 matrix."""
    out_features, num_words = len(y_O), x.values_8N.shape[1]
    # Fastest on an H200 (benchmarks/quant_gemv.py).
    block_o, block_j, warps = (8, 512, 4) if num_words <= 1024 else (4, 512, 2)
    if out_features >= 65536:
        block_o, block_j, warps = 8, 128, 1
    _nf4_gemv_kernel[(triton.cdiv(out_features, block_o),)](
        x.values_8N, codes.flatten().view(torch.int32), absmax_B, nested_absmax, absmax_mean,
        *codebooks, y_O if bias_O is None else bias_O, y_O if residual_O is None else residual_O,
        y_O, out_features, num_words, has_bias=bias_O is not None,
        has_residual=residual_O is not None, shuffled=y_O.is_cuda, block_o=block_o, block_j=block_j,
        num_warps=warps,
    )  # fmt: skip


_BLOCK = 1024
"""Number of bytes of a row per program."""


@jit
def _dequantize_int4_kernel(
    codes, scales, zeros, permutation, w, half, num_groups, group_size, block: tl.constexpr
):
    o = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * block + tl.arange(0, block)
    mask = offsets < half
    pairs = tl.load(codes + o * half + offsets, mask=mask, other=0).to(tl.int32)
    for half_index in tl.static_range(2):
        i = offsets + half_index * half
        group_offsets = o * num_groups + i // group_size
        scale = tl.load(scales + group_offsets, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group_offsets, mask=mask, other=0).to(tl.int32)
        value = (((pairs >> (4 * half_index)) & 15) - zero).to(tl.float32) * scale
        columns = tl.load(permutation + i, mask=mask, other=0)
        tl.store(w + o * 2 * half + columns, value.to(w.dtype.element_ty), mask=mask)


def dequantize_int4(
    codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, permutation_I: Tensor, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the dequantized matrix [O, I], scale * (code - zero), rounded once."""
    out_features, half = codes.shape
    w_OI = torch.empty(out_features, 2 * half, dtype=dtype, device=codes.device)
    _dequantize_int4_kernel[(out_features, triton.cdiv(half, _BLOCK))](
        codes, scales_OG, zeros_OG, permutation_I, w_OI, half, scales_OG.shape[1], group_size,
        block=_BLOCK,
    )  # fmt: skip
    return w_OI
