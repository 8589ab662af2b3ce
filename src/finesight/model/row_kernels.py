"""Triton kernels that multiply single rows with a matrix in few bits.

A thread reads 16 bytes of several outputs at a time, makes numbers of them in its registers and
adds up their products in fp32; only the sums of the end travel between threads. Programs of one
place of the matrix and several rows follow each other, and find its bits in the cache.

Shapes: R rows, O outputs, T pieces of 16 bytes, W words of a piece (of 32 bits), E bytes of one.
Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, int32


class Plan(NamedTuple):
    """How a product is cut: outputs of a program, what it reads of each at once (pieces of a row,
    or groups of inputs), and warps."""

    outputs: int
    pieces: int
    warps: int


def plan(outputs: int, bytes_: int) -> Plan:
    """For a matrix of so many outputs, each of so many bytes."""
    # Few outputs leave processors idle, unless several warps share a row.
    warps = 4 if outputs <= 6144 and bytes_ >= 2048 else 2 if outputs <= 6144 else 1
    return Plan(outputs=4, pieces=32 * warps, warps=warps)


@triton.jit
def _finish(total_OTE, bias, y, first, outputs, biased: tl.constexpr, block_o: tl.constexpr):
    sums_O = tl.sum(tl.sum(total_OTE, axis=2), axis=1)
    o = first + tl.arange(0, block_o)
    if biased:
        sums_O += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    to = y + tl.program_id(0).to(tl.int64) * outputs + o
    tl.store(to, sums_O.to(y.dtype.element_ty), mask=o < outputs)


@triton.jit
def _quarters(x_TI, block_t: tl.constexpr):
    """Of each word's four inputs the first, the second, ...: [T, W] each."""
    even, odd = tl.split(tl.reshape(x_TI, (block_t, 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def own_level(values, shuffled: tl.constexpr):
    """Of 16 levels the one that this thread keeps for `level`."""
    value = 0.0
    if shuffled:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1
        )
        value = tl.load(values + (lane & 15))
    return value


@triton.jit
def level(words, value, values, shift: tl.constexpr, shuffled: tl.constexpr):
    """What the four bits from `shift` on stand for.

    Each thread of a warp keeps one of the 16 levels, and fetches the one it wants from another: in
    a table in memory, every number would cost an address. Only the interpreter has no warps.
    """
    if shuffled:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=r,r,r",
            [value, words >> shift], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(values + ((words >> shift) & 15))


@triton.jit
def _nf4(x, codes, scales, coarse, mean, scale_levels, values, bias, y, outputs, inputs,
         biased: tl.constexpr, shuffled: tl.constexpr, block_o: tl.constexpr,
         block_t: tl.constexpr):  # fmt: skip
    # A byte holds two neighbours, the first in its high bits; two pieces share a scale.
    x += tl.program_id(0).to(tl.int64) * inputs
    first = tl.program_id(1) * block_o
    o, w, i = tl.arange(0, block_o), tl.arange(0, 4), tl.arange(0, 32)
    pieces = inputs // 32
    codes += first.to(tl.int64) * (inputs // 8)
    offset = tl.load(mean)
    value = own_level(values, shuffled)
    total_OTW = tl.zeros((block_o, block_t, 4), tl.float32)
    for start in range(0, pieces, block_t):
        t = start + tl.arange(0, block_t)
        inside_OT = (first + o < outputs)[:, None] & (t < pieces)[None, :]
        at_OTW = (o * (inputs // 8))[:, None, None] + (t * 4)[None, :, None] + w[None, None, :]
        words = tl.load(codes + at_OTW, mask=inside_OT[:, :, None], other=0)
        at_TI = (t * 32)[:, None] + i[None, :]
        x_TI = tl.load(x + at_TI, mask=(t < pieces)[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(x_TI, (block_t, 16, 2)))
        x0, x2, x4, x6 = _quarters(even, block_t)
        x1, x3, x5, x7 = _quarters(odd, block_t)
        place_OT = ((first + o) * (inputs // 64))[:, None] + (t // 2)[None, :]
        scale = tl.load(scales + place_OT, mask=inside_OT, other=0).to(tl.int32)
        share = tl.load(coarse + place_OT // 256, mask=inside_OT, other=0.0)
        sums = level(words, value, values, 4, shuffled) * x0[None, :, :]
        sums += level(words, value, values, 0, shuffled) * x1[None, :, :]
        sums += level(words, value, values, 12, shuffled) * x2[None, :, :]
        sums += level(words, value, values, 8, shuffled) * x3[None, :, :]
        sums += level(words, value, values, 20, shuffled) * x4[None, :, :]
        sums += level(words, value, values, 16, shuffled) * x5[None, :, :]
        sums += level(words, value, values, 28, shuffled) * x6[None, :, :]
        sums += level(words, value, values, 24, shuffled) * x7[None, :, :]
        total_OTW += sums * (tl.load(scale_levels + scale) * share + offset)[:, :, None]
    _finish(total_OTW, bias, y, first, outputs, biased, block_o)


@triton.jit
def _int4(x, codes, scales, zeros, values, bias, y, outputs, inputs, group: tl.constexpr,
          biased: tl.constexpr, shuffled: tl.constexpr, block_o: tl.constexpr,
          block_t: tl.constexpr):  # fmt: skip
    # A byte holds an input of the first half in its low bits, that of the second in its high ones.
    x += tl.program_id(0).to(tl.int64) * inputs
    first = tl.program_id(1) * block_o
    o, w, i = tl.arange(0, block_o), tl.arange(0, 4), tl.arange(0, 16)
    half = inputs // 2
    pieces = half // 16
    codes += first.to(tl.int64) * (inputs // 8)
    value = own_level(values, shuffled)
    total_OTW = tl.zeros((block_o, block_t, 4), tl.float32)
    for start in range(0, pieces, block_t):
        t = start + tl.arange(0, block_t)
        inside_OT = (first + o < outputs)[:, None] & (t < pieces)[None, :]
        at_OTW = (o * (inputs // 8))[:, None, None] + (t * 4)[None, :, None] + w[None, None, :]
        words = tl.load(codes + at_OTW, mask=inside_OT[:, :, None], other=0)
        at_TI = (t * 16)[:, None] + i[None, :]
        for second in tl.static_range(2):
            x_TI = tl.load(x + at_TI + second * half, mask=(t < pieces)[:, None], other=0.0)
            x0, x1, x2, x3 = _quarters(x_TI.to(tl.float32), block_t)
            group_T = (t * 16 + second * half) // group
            place_OT = ((first + o) * (inputs // group))[:, None] + group_T[None, :]
            scale = tl.load(scales + place_OT, mask=inside_OT, other=0.0).to(tl.float32)
            zero = tl.load(zeros + place_OT, mask=inside_OT, other=0).to(tl.float32)
            sums = level(words, value, values, 4 * second, shuffled) * x0[None, :, :]
            sums += level(words, value, values, 4 * second + 8, shuffled) * x1[None, :, :]
            sums += level(words, value, values, 4 * second + 16, shuffled) * x2[None, :, :]
            sums += level(words, value, values, 4 * second + 24, shuffled) * x3[None, :, :]
            sums -= zero[:, :, None] * (x0 + x1 + x2 + x3)[None, :, :]
            total_OTW += sums * scale[:, :, None]
    _finish(total_OTW, bias, y, first, outputs, biased, block_o)


@triton.jit
def _bytes(x, codes, scales, bias, y, outputs, inputs, biased: tl.constexpr,
           block_o: tl.constexpr, block_t: tl.constexpr):  # fmt: skip
    x += tl.program_id(0).to(tl.int64) * inputs
    first = tl.program_id(1) * block_o
    o, e = tl.arange(0, block_o), tl.arange(0, 16)
    pieces = inputs // 16
    codes += first.to(tl.int64) * inputs
    total_OTE = tl.zeros((block_o, block_t, 16), tl.float32)
    for start in range(0, pieces, block_t):
        t = start + tl.arange(0, block_t)
        inside_OT = (first + o < outputs)[:, None] & (t < pieces)[None, :]
        at_OTE = (o * inputs)[:, None, None] + (t * 16)[None, :, None] + e[None, None, :]
        w_OTE = tl.load(codes + at_OTE, mask=inside_OT[:, :, None], other=0.0).to(tl.float32)
        at_TE = (t * 16)[:, None] + e[None, :]
        x_TE = tl.load(x + at_TE, mask=(t < pieces)[:, None], other=0.0)
        total_OTE += w_OTE * x_TE.to(tl.float32)[None, :, :]
    scale_O = tl.load(scales + first + o, mask=first + o < outputs, other=0.0)
    _finish(total_OTE * scale_O[:, None, None], bias, y, first, outputs, biased, block_o)


def nf4_rows(
    x_RI: Tensor, codes: Tensor, scales_B: Tensor, coarse: Tensor, mean: Tensor,
    levels: tuple[Tensor, Tensor], bias: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """x W^T + bias [R, O] for W as in `model.nf4`, whose rows are multiples of 64 numbers; `levels`
    are those of scales and of numbers."""
    rows, inputs = x_RI.shape
    outputs = 2 * codes.numel() // inputs
    y_RO = x_RI.new_empty(rows, outputs)
    _nf4[(rows, triton.cdiv(outputs, plan.outputs))](
        x_RI, codes.flatten().view(int32), scales_B, coarse, mean, *levels,
        x_RI if bias is None else bias, y_RO, outputs, inputs, biased=bias is not None,
        shuffled=x_RI.is_cuda, block_o=plan.outputs, block_t=plan.pieces, num_warps=plan.warps,
    )  # fmt: skip
    return y_RO


def int4_rows(
    x_RI: Tensor, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, values_16: Tensor,
    bias: Tensor | None, group: int, plan: Plan,
) -> Tensor:  # fmt: skip
    """x W^T + bias [R, O] for W as in `model.int4`, each half of a row being whole groups;
    `values_16` are 0 to 15 in fp32."""
    rows, inputs = x_RI.shape
    outputs = len(codes)
    y_RO = x_RI.new_empty(rows, outputs)
    _int4[(rows, triton.cdiv(outputs, plan.outputs))](
        x_RI, codes.view(int32), scales_OG, zeros_OG, values_16, x_RI if bias is None else bias,
        y_RO, outputs, inputs, group=group, biased=bias is not None, shuffled=x_RI.is_cuda,
        block_o=plan.outputs, block_t=plan.pieces, num_warps=plan.warps,
    )  # fmt: skip
    return y_RO


def byte_rows(
    x_RI: Tensor, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """x W^T + bias [R, O] for W as in `model.rowwise`, whose rows are multiples of 16 numbers."""
    rows, (outputs, inputs) = len(x_RI), codes_OI.shape
    y_RO = x_RI.new_empty(rows, outputs)
    _bytes[(rows, triton.cdiv(outputs, plan.outputs))](
        x_RI, codes_OI, scales_O, x_RI if bias is None else bias, y_RO, outputs, inputs,
        biased=bias is not None, block_o=plan.outputs, block_t=plan.pieces, num_warps=plan.warps,
    )  # fmt: skip
    return y_RO
