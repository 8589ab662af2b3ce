"""Triton kernels that multiply up to 64 rows with a matrix in few bits by tensor cores, each bit
read once, and one that makes a matrix of bytes in full.

Numbers are rounded to the type of the rows, as in the matrix in full, or are exact in it. Shapes:
R rows, O outputs, G groups of inputs, B bytes of a group in a row, K inputs of a step. Imported
only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.row_kernels import Plan, level, own_level


def plan(outputs: int) -> Plan:
    """For a matrix of so many outputs."""
    return Plan(outputs=16 if outputs <= 6144 else 32, pieces=2, warps=4)


@triton.jit
def _store(total_RO, bias, y, o, rows, outputs, biased: tl.constexpr, block_r: tl.constexpr):
    r = tl.arange(0, block_r)
    if biased:
        total_RO += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    inside_RO = (r < rows)[:, None] & (o < outputs)[None, :]
    tl.store(y + r[:, None] * outputs + o[None, :], total_RO.to(y.dtype.element_ty), mask=inside_RO)


@triton.jit(do_not_specialize=["rows"])
def _nf4(x, codes, scales, coarse, mean, scale_levels, values, bias, y, rows, outputs, inputs,
         biased: tl.constexpr, shuffled: tl.constexpr, block_r: tl.constexpr,
         block_o: tl.constexpr, block_g: tl.constexpr):  # fmt: skip
    # A byte holds two neighbours, the first in its high bits.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    r, k, b = tl.arange(0, block_r), tl.arange(0, 32 * block_g), tl.arange(0, 32)
    groups, narrow = inputs // 64, x.dtype.element_ty
    offset = tl.load(mean)
    value = own_level(values, shuffled)
    total_RO = tl.zeros((block_r, block_o), tl.float32)
    for start in range(0, groups, block_g):
        g = start + tl.arange(0, block_g)
        inside_OG = (o < outputs)[:, None] & (g < groups)[None, :]
        place_OG = (o * groups)[:, None] + g[None, :]
        pairs_at = place_OG.to(tl.int64)[:, :, None] * 32 + b[None, None, :]
        pairs = tl.load(codes + pairs_at, mask=inside_OG[:, :, None], other=0).to(tl.int32)
        scale = tl.load(scales + place_OG, mask=inside_OG, other=0).to(tl.int32)
        share = tl.load(coarse + place_OG // 256, mask=inside_OG, other=0.0)
        scale_OG1 = (tl.load(scale_levels + scale) * share + offset)[:, :, None]
        at_RK = r[:, None] * inputs + (start * 64 + 2 * k)[None, :]
        inside_RK = (r < rows)[:, None] & (start * 32 + k < inputs // 2)[None, :]
        for second in tl.static_range(2):
            w_OGB = (level(pairs, value, values, 4 - 4 * second, shuffled) * scale_OG1).to(narrow)
            x_RK = tl.load(x + at_RK + second, mask=inside_RK, other=0.0)
            w_KO = tl.trans(tl.reshape(w_OGB, (block_o, 32 * block_g)))
            total_RO = tl.dot(x_RK, w_KO, total_RO)
    _store(total_RO, bias, y, o, rows, outputs, biased, block_r)


@triton.jit(do_not_specialize=["rows"])
def _int4(x, codes, scales, zeros, bias, y, rows, outputs, inputs, group: tl.constexpr,
          biased: tl.constexpr, block_r: tl.constexpr, block_o: tl.constexpr,
          block_g: tl.constexpr):  # fmt: skip
    # A byte holds an input of the first half in its low bits, that of the second in its high ones.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    r, k, b = tl.arange(0, block_r), tl.arange(0, group * block_g), tl.arange(0, group)
    groups, half, narrow = inputs // 2 // group, inputs // 2, x.dtype.element_ty
    total_RO = tl.zeros((block_r, block_o), tl.float32)
    for start in range(0, groups, block_g):
        g = start + tl.arange(0, block_g)
        inside_OG = (o < outputs)[:, None] & (g < groups)[None, :]
        pairs_at = (o.to(tl.int64)[:, None] * groups + g[None, :])[:, :, None] * group
        pairs_at += b[None, None, :]
        pairs = tl.load(codes + pairs_at, mask=inside_OG[:, :, None], other=0).to(tl.int32)
        at_RK = r[:, None] * inputs + (start * group + k)[None, :]
        inside_RK = (r < rows)[:, None] & (start * group + k < half)[None, :]
        for second in tl.static_range(2):
            place_OG = (o * 2 * groups)[:, None] + (second * groups + g)[None, :]
            scale = tl.load(scales + place_OG, mask=inside_OG, other=0.0).to(tl.float32)
            zero = tl.load(zeros + place_OG, mask=inside_OG, other=0).to(tl.float32)
            code = (((pairs >> (4 * second)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
            w_OGB = (code - (zero + 8388608.0)[:, :, None]) * scale[:, :, None]
            x_RK = tl.load(x + at_RK + second * half, mask=inside_RK, other=0.0)
            w_KO = tl.trans(tl.reshape(w_OGB.to(narrow), (block_o, group * block_g)))
            total_RO = tl.dot(x_RK, w_KO, total_RO)
    _store(total_RO, bias, y, o, rows, outputs, biased, block_r)


@triton.jit(do_not_specialize=["rows"])
def _bytes(x, codes, scales, bias, y, rows, outputs, inputs, biased: tl.constexpr,
           block_r: tl.constexpr, block_o: tl.constexpr, block_k: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    r, i = tl.arange(0, block_r), tl.arange(0, block_k)
    codes += o.to(tl.int64)[:, None] * inputs
    total_RO = tl.zeros((block_r, block_o), tl.float32)
    for start in range(0, inputs, block_k):
        k = start + i
        inside_OK = (o < outputs)[:, None] & (k < inputs)[None, :]
        w_OK = tl.load(codes + k[None, :], mask=inside_OK, other=0.0).to(tl.float32)
        inside_RK = (r < rows)[:, None] & (k < inputs)[None, :]
        x_RK = tl.load(x + r[:, None] * inputs + k[None, :], mask=inside_RK, other=0.0)
        total_RO = tl.dot(x_RK, tl.trans(w_OK.to(x.dtype.element_ty)), total_RO)
    scale_O = tl.load(scales + o, mask=o < outputs, other=0.0)
    _store(total_RO * scale_O[None, :], bias, y, o, rows, outputs, biased, block_r)


def nf4_tiles(
    x_RI: Tensor, codes: Tensor, scales_B: Tensor, coarse: Tensor, mean: Tensor,
    levels: tuple[Tensor, Tensor], bias: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """As `row_kernels.nf4_rows`; rows of 16 bits, pieces of 64 inputs."""
    rows, inputs = x_RI.shape
    outputs = 2 * codes.numel() // inputs
    y_RO = x_RI.new_empty(rows, outputs)
    _nf4[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes, scales_B, coarse, mean, *levels, x_RI if bias is None else bias, y_RO,
        rows, outputs, inputs, biased=bias is not None, shuffled=x_RI.is_cuda,
        block_r=_padded(rows), block_o=plan.outputs, block_g=plan.pieces, num_warps=plan.warps,
    )  # fmt: skip
    return y_RO


def int4_tiles(
    x_RI: Tensor, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, bias: Tensor | None,
    group: int, plan: Plan,
) -> Tensor:  # fmt: skip
    """As `row_kernels.int4_rows`; rows of 16 bits, pieces of 64 inputs of each half."""
    rows, inputs = x_RI.shape
    outputs = len(codes)
    y_RO = x_RI.new_empty(rows, outputs)
    _int4[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes, scales_OG, zeros_OG, x_RI if bias is None else bias, y_RO, rows, outputs,
        inputs, group=group, biased=bias is not None, block_r=_padded(rows), block_o=plan.outputs,
        block_g=max(1, 64 * plan.pieces // group), num_warps=plan.warps,
    )  # fmt: skip
    return y_RO


def byte_tiles(
    x_RI: Tensor, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """As `row_kernels.byte_rows`; rows of 16 bits, pieces of 64 inputs."""
    rows, (outputs, inputs) = len(x_RI), codes_OI.shape
    y_RO = x_RI.new_empty(rows, outputs)
    _bytes[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes_OI, scales_O, x_RI if bias is None else bias, y_RO, rows, outputs, inputs,
        biased=bias is not None, block_r=_padded(rows), block_o=plan.outputs,
        block_k=64 * plan.pieces, num_warps=plan.warps,
    )  # fmt: skip
    return y_RO


def _padded(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


@triton.jit
def _whole(codes, scales, w, inputs, block: tl.constexpr):
    o = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    values = tl.load(codes + o * inputs + i, mask=i < inputs, other=0.0).to(tl.float32)
    values *= tl.load(scales + o)
    tl.store(w + o * inputs + i, values.to(w.dtype.element_ty), mask=i < inputs)


def whole_bytes(codes_OI: Tensor, scales_O: Tensor, dtype: torch.dtype) -> Tensor:
    """scale code [O, I], rounded once."""
    outputs, inputs = codes_OI.shape
    w_OI = torch.empty(outputs, inputs, dtype=dtype, device=codes_OI.device)
    grid = (outputs, triton.cdiv(inputs, 2048))
    _whole[grid](codes_OI, scales_O, w_OI, inputs, block=2048)
    return w_OI
