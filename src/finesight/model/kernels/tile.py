"""Triton kernels that multiply up to 64 rows with a matrix in few bits by tensor cores, each bit
read once, and one that makes a matrix of bytes in full.

Each warp of a program takes a slice of the inputs of its own: outputs alone are too few to keep a
card busy. Numbers are rounded to the type of the rows, as in the matrix in full, or exact in it.

Shapes: R rows, O outputs, S slices, P rows and Q outputs of all slices end to end, G groups, B
bytes of a group, K inputs of a slice in a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.row import Plan
from finesight.model.kernels.word import level, own_level


def plan(outputs: int, rows: int) -> Plan:
    """For a matrix of so many outputs."""
    return Plan(outputs=16 if outputs <= 6144 or rows > 16 else 32, pieces=1, warps=4)


@triton.jit
def _places(slices: tl.constexpr, block: tl.constexpr, step: tl.constexpr):
    """Of slices end to end: which row each line is of, and where its slice begins in a step."""
    line = tl.arange(0, slices * block)
    return line % block, line // block * step


@triton.jit
def _added(total_SRO, x_PK, w_QK, slices: tl.constexpr, block_r: tl.constexpr,
           block_o: tl.constexpr):  # fmt: skip
    x_SRK = tl.reshape(x_PK, (slices, block_r, x_PK.shape[1]))
    w_SOK = tl.reshape(w_QK.to(x_PK.dtype), (slices, block_o, x_PK.shape[1]))
    return tl.dot(x_SRK, tl.trans(w_SOK, (0, 2, 1)), total_SRO)


@triton.jit
def _store(total_RO, bias, y, rows, outputs, biased: tl.constexpr, block_r: tl.constexpr,
           block_o: tl.constexpr):  # fmt: skip
    r, o = tl.arange(0, block_r), tl.program_id(0) * block_o + tl.arange(0, block_o)
    if biased:
        total_RO += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    inside_RO = (r < rows)[:, None] & (o < outputs)[None, :]
    tl.store(y + r[:, None] * outputs + o[None, :], total_RO.to(y.dtype.element_ty), mask=inside_RO)


@triton.jit(do_not_specialize=["rows"])
def _nf4(x, codes, scales, coarse, mean, scale_levels, values, bias, y, rows, outputs, inputs,
         biased: tl.constexpr, shuffled: tl.constexpr, slices: tl.constexpr,
         block_r: tl.constexpr, block_o: tl.constexpr, block_g: tl.constexpr):  # fmt: skip
    # A byte holds two neighbours, the first in its high bits.
    o, g_of_o = _places(slices, block_o, block_g)
    r, g_of_r = _places(slices, block_r, block_g)
    o += tl.program_id(0) * block_o
    i, b = tl.arange(0, 64 * block_g), tl.arange(0, 32)
    groups = inputs // 64
    offset = tl.load(mean)
    value = own_level(values, shuffled)
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, groups, slices * block_g):
        g_QG = (start + g_of_o)[:, None] + tl.arange(0, block_g)[None, :]
        inside_QG = (o < outputs)[:, None] & (g_QG < groups)
        place_QG = (o * groups)[:, None] + g_QG
        pairs_at = place_QG.to(tl.int64)[:, :, None] * 32 + b[None, None, :]
        pairs = tl.load(codes + pairs_at, mask=inside_QG[:, :, None], other=0).to(tl.int32)
        scale = tl.load(scales + place_QG, mask=inside_QG, other=0).to(tl.int32)
        share = tl.load(coarse + place_QG // 256, mask=inside_QG, other=0.0)
        scale_QG1 = (tl.load(scale_levels + scale) * share + offset)[:, :, None]
        high_QGB = level(pairs, value, values, 4, shuffled) * scale_QG1
        w_QGB2 = tl.join(high_QGB, level(pairs, value, values, 0, shuffled) * scale_QG1)
        k_PK = ((start + g_of_r) * 64)[:, None] + i[None, :]
        inside_PK = (r < rows)[:, None] & (k_PK < inputs)
        x_PK = tl.load(x + (r * inputs)[:, None] + k_PK, mask=inside_PK, other=0.0)
        w_QK = tl.reshape(w_QGB2, (slices * block_o, 64 * block_g))
        total_SRO = _added(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    _store(tl.sum(total_SRO, axis=0), bias, y, rows, outputs, biased, block_r, block_o)


@triton.jit(do_not_specialize=["rows"])
def _int4(x, codes, scales, zeros, bias, y, rows, outputs, inputs, group: tl.constexpr,
          biased: tl.constexpr, slices: tl.constexpr, block_r: tl.constexpr,
          block_o: tl.constexpr, block_g: tl.constexpr):  # fmt: skip
    # A byte holds an input of the first half in its low bits, that of the second in its high ones.
    # Here 32 of them count as a group, of whatever size those are that share a scale.
    o, g_of_o = _places(slices, block_o, block_g)
    r, g_of_r = _places(slices, block_r, block_g)
    o += tl.program_id(0) * block_o
    i, b = tl.arange(0, 32 * block_g), tl.arange(0, 32)
    half = inputs // 2
    groups = half // 32
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, groups, slices * block_g):
        g_QG = (start + g_of_o)[:, None] + tl.arange(0, block_g)[None, :]
        inside_QG = (o < outputs)[:, None] & (g_QG < groups)
        pairs_at = (o.to(tl.int64) * groups)[:, None] + g_QG
        pairs_at = pairs_at[:, :, None] * 32 + b[None, None, :]
        pairs = tl.load(codes + pairs_at, mask=inside_QG[:, :, None], other=0).to(tl.int32)
        k_PK = ((start + g_of_r) * 32)[:, None] + i[None, :]
        inside_PK = (r < rows)[:, None] & (k_PK < half)
        for second in tl.static_range(2):
            place_QG = (o * (inputs // group))[:, None] + (second * half + g_QG * 32) // group
            scale = tl.load(scales + place_QG, mask=inside_QG, other=0.0).to(tl.float32)
            zero = tl.load(zeros + place_QG, mask=inside_QG, other=0).to(tl.float32)
            # The bits of 2^23 + code: a float without a conversion; the difference is exact.
            code = (((pairs >> (4 * second)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
            w_QGB = (code - (zero + 8388608.0)[:, :, None]) * scale[:, :, None]
            x_at = (r * inputs + second * half)[:, None] + k_PK
            x_PK = tl.load(x + x_at, mask=inside_PK, other=0.0)
            w_QK = tl.reshape(w_QGB, (slices * block_o, 32 * block_g))
            total_SRO = _added(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    _store(tl.sum(total_SRO, axis=0), bias, y, rows, outputs, biased, block_r, block_o)


@triton.jit(do_not_specialize=["rows"])
def _bytes(x, codes, scales, bias, y, rows, outputs, inputs, biased: tl.constexpr,
           slices: tl.constexpr, block_r: tl.constexpr, block_o: tl.constexpr,
           block_k: tl.constexpr):  # fmt: skip
    o, k_of_o = _places(slices, block_o, block_k)
    r, k_of_r = _places(slices, block_r, block_k)
    o += tl.program_id(0) * block_o
    i = tl.arange(0, block_k)
    total_SRO = tl.zeros((slices, block_r, block_o), tl.float32)
    for start in range(0, inputs, slices * block_k):
        k_QK = (start + k_of_o)[:, None] + i[None, :]
        inside_QK = (o < outputs)[:, None] & (k_QK < inputs)
        w_at = (o.to(tl.int64) * inputs)[:, None] + k_QK
        w_QK = tl.load(codes + w_at, mask=inside_QK, other=0.0).to(tl.float32)
        k_PK = (start + k_of_r)[:, None] + i[None, :]
        inside_PK = (r < rows)[:, None] & (k_PK < inputs)
        x_PK = tl.load(x + (r * inputs)[:, None] + k_PK, mask=inside_PK, other=0.0)
        total_SRO = _added(total_SRO, x_PK, w_QK, slices, block_r, block_o)
    own = tl.program_id(0) * block_o + tl.arange(0, block_o)
    scale_O = tl.load(scales + own, mask=own < outputs, other=0.0)
    total_RO = tl.sum(total_SRO, axis=0) * scale_O[None, :]
    _store(total_RO, bias, y, rows, outputs, biased, block_r, block_o)


def nf4_tiles(
    x_RI: Tensor, codes: Tensor, scales_B: Tensor, coarse: Tensor, mean: Tensor,
    levels: tuple[Tensor, Tensor], bias: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """x W^T + bias [R, O] for W as in `model.nf4`; rows of 16 bits, pieces of 64 inputs."""
    rows, inputs = x_RI.shape
    outputs = 2 * codes.numel() // inputs
    y_RO = x_RI.new_empty(rows, outputs)
    _nf4[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes, scales_B, coarse, mean, *levels, x_RI if bias is None else bias, y_RO,
        rows, outputs, inputs, biased=bias is not None, shuffled=x_RI.is_cuda,
        slices=plan.warps, block_r=_padded(rows), block_o=plan.outputs, block_g=plan.pieces,
        num_warps=plan.warps, num_stages=_stages(rows),
    )  # fmt: skip
    return y_RO


def int4_tiles(
    x_RI: Tensor, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, bias: Tensor | None,
    group: int, plan: Plan,
) -> Tensor:  # fmt: skip
    """x W^T + bias [R, O] for W as in `model.int4`; rows of 16 bits, pieces of 32 inputs of each
    half."""
    rows, inputs = x_RI.shape
    outputs = len(codes)
    y_RO = x_RI.new_empty(rows, outputs)
    _int4[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes, scales_OG, zeros_OG, x_RI if bias is None else bias, y_RO, rows, outputs,
        inputs, group=group, biased=bias is not None, slices=plan.warps,
        block_r=_padded(rows), block_o=plan.outputs, block_g=plan.pieces,
        num_warps=plan.warps, num_stages=_stages(rows),
    )  # fmt: skip
    return y_RO


def byte_tiles(
    x_RI: Tensor, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """As `kernels.row.byte_rows`; rows of 16 bits, pieces of 64 inputs."""
    rows, (outputs, inputs) = len(x_RI), codes_OI.shape
    y_RO = x_RI.new_empty(rows, outputs)
    _bytes[(triton.cdiv(outputs, plan.outputs),)](
        x_RI, codes_OI, scales_O, x_RI if bias is None else bias, y_RO, rows, outputs, inputs,
        biased=bias is not None, slices=plan.warps, block_r=_padded(rows), block_o=plan.outputs,
        block_k=64 * plan.pieces, num_warps=plan.warps, num_stages=_stages(rows),
    )  # fmt: skip
    return y_RO


def _padded(rows: int) -> int:
    return max(16, 1 << (rows - 1).bit_length())


def _stages(rows: int) -> int:
    """How many steps are in memory at once: what small cards have room for."""
    return 3 if rows <= 16 else 2


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
