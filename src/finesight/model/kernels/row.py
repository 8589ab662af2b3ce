"""Triton kernels that multiply single rows with a matrix of eight bits a number.

A thread reads 16 bytes of several outputs at a time, makes numbers of them in its registers and
adds up their products in fp32; only the sums of the end travel between threads. Programs of one
place of the matrix and several rows follow each other, and find its bits in the cache.

Shapes: R rows, O outputs, T pieces of 16 bytes, E bytes of one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
