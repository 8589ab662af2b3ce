"""What low-rank adapters need beside products: the gradient by a dropped input, the sum with a
product that is rounded already, and copies of what was learned.

Sums are fp32. Shapes: T rows (tokens), I inputs, O outputs of a layer, R its rank, S ranks of a
group end to end, P matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.drop import Drop, kept, mixed
from finesight.model.kernels.programs import Ptr, rank_block
from finesight.model.kernels.sizes import Blocks

LOWERED_BACK, RAISED = Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
"""What was quickest on an H200."""


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _lowered_back(dn: Ptr, dlow: Ptr, a: Ptr, dx: Ptr, rows: int, width: int, ranks: int,
                  dn_stride: int, dlow_stride: int, seed: Ptr, salt: int, threshold: int,
                  times: float, is_dropped: tl.constexpr, block_m: tl.constexpr,
                  block_n: tl.constexpr, block_s: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    c = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside_M, inside_N, at_M = m < rows, c < width, m.to(tl.int64)
    inside = inside_M[:, None] & inside_N[None, :]
    more_MN = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, ranks, block_s):
        s = start + tl.arange(0, block_s)
        inside_S = s < ranks
        dlow_MS = tl.load(dlow + at_M[:, None] * dlow_stride + s[None, :],
                          mask=inside_M[:, None] & inside_S[None, :], other=0.0)  # fmt: skip
        a_SN = tl.load(a + s[:, None] * width + c[None, :],
                       mask=inside_S[:, None] & inside_N[None, :], other=0.0)  # fmt: skip
        more_MN += tl.dot(dlow_MS, a_SN)
    more_MN *= times
    if is_dropped:
        more_MN = tl.where(kept(seed, salt, m, c, threshold), more_MN, 0.0)
    dn_MN = tl.load(dn + at_M[:, None] * dn_stride + c[None, :], mask=inside, other=0.0)
    to_MN = dx + at_M[:, None] * width + c[None, :]
    tl.store(to_MN, more_MN + dn_MN.to(tl.float32), mask=inside)


def lowered_back(dn_TI: Tensor, dlow_TS: Tensor, a_SI: Tensor, drop: Drop) -> Tensor:
    """`dn` plus the gradient by `x` of `drop.times` times dropped(x) A^T, from that of the latter:
    in a piece of its own."""
    (rows, width), ranks, tile = dn_TI.shape, len(a_SI), LOWERED_BACK
    dx_TI = dn_TI.new_empty(rows, width)
    _lowered_back[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns))](
        dn_TI, dlow_TS, a_SI, dx_TI, rows, width, ranks, dn_TI.stride(0), dlow_TS.stride(0),
        *drop.told(dn_TI), is_dropped=drop.share > 0.0, block_m=tile.rows,
        block_n=tile.columns, block_s=min(64, rank_block(ranks)), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return dx_TI


@triton.jit
def _by_chance(y_MN: tl.tensor, total_MN: tl.tensor, c: tl.tensor,
               lost: tl.constexpr) -> tl.tensor:  # fmt: skip
    """A sum of so many digits less than fp32 has, up or down as often as it is nearer to either: of
    what was added to `y`, in 16 bits, nothing is lost then on average, down to what fp32 loses (in
    fp16, not below its least normal number). Chance is a function of `y` and its column: what a
    sample gives hangs on nothing else."""
    bits_MN = total_MN.to(tl.uint32, bitcast=True)
    own_MN = y_MN.to(tl.uint16, bitcast=True).to(tl.uint32)
    # Multiples of the golden ratio, whose neighbours lie far apart, from a start of the column.
    start_N = mixed(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    chance_MN = (own_MN * 0x9E3779B1 + start_N[None, :]) >> (32 - lost)
    near_MN = (((bits_MN + chance_MN) >> lost) << lost).to(tl.float32, bitcast=True)
    # What is not finite stays so: all bits of one such number may be ones.
    return tl.where(tl.abs(total_MN) < float("inf"), near_MN, total_MN)


@triton.jit(do_not_specialize=["rows"])
def _raised(y: Ptr, low: Ptr, b: Ptr, rows: int, width: int, ranks: int, y_stride: int,
            low_stride: int, b_stride: int, times: float, lost: tl.constexpr,
            block_m: tl.constexpr, block_n: tl.constexpr,
            block_r: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inside_M, inside_N, at_M = m < rows, c < width, m.to(tl.int64)
    at, inside = y + at_M[:, None] * y_stride + c[None, :], inside_M[:, None] & inside_N[None, :]
    y_MN = tl.load(at, mask=inside, other=0.0)
    more_MN = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, ranks, block_r):
        r = start + tl.arange(0, block_r)
        inside_R = r < ranks
        low_MR = tl.load(low + at_M[:, None] * low_stride + r[None, :],
                         mask=inside_M[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
        b_NR = tl.load(b + c[:, None] * b_stride + r[None, :],
                       mask=inside_N[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
        more_MN += tl.dot(low_MR, tl.trans(b_NR))
    total_MN = y_MN.to(tl.float32) + more_MN * times
    tl.store(at, _by_chance(y_MN, total_MN, c, lost), mask=inside)


def raised(y_TO: Tensor, low_TR: Tensor, b_OR: Tensor, times: float) -> None:
    """Add times low B^T to a product that is rounded to 16 bits already, and round the sum by
    chance (see `model.updates`); rows of each may lie apart."""
    (rows, width), ranks, tile = y_TO.shape, b_OR.shape[1], RAISED
    assert low_TR.shape == (rows, ranks), f"{tuple(low_TR.shape)}, not {rows, ranks}"
    assert len(b_OR) == width, f"{len(b_OR)} outputs, not {width}"
    assert all(t.stride(1) == 1 for t in (y_TO, low_TR, b_OR)), "numbers of a row lie apart"
    _raised[(triton.cdiv(width, tile.columns), triton.cdiv(rows, tile.rows))](
        y_TO, low_TR, b_OR, rows, width, ranks, y_TO.stride(0), low_TR.stride(0),
        b_OR.stride(0), times, lost=16 if y_TO.dtype == torch.bfloat16 else 13,
        block_m=tile.rows, block_n=tile.columns, block_r=min(64, rank_block(ranks)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _laid(table: Ptr, kind: Ptr, block_m: tl.constexpr, block_n: tl.constexpr) -> None:
    row = table + tl.program_id(0).to(tl.int64) * 5
    source = tl.load(row).to(kind.dtype)
    place = tl.load(row + 1).to(kind.dtype)
    rows, columns, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    start = tl.program_id(1) * block_m
    if start >= rows:
        return
    m, n = start + tl.arange(0, block_m), tl.arange(0, block_n)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    x_MN = tl.load(source + m[:, None] * columns + n[None, :], mask=inside)
    tl.store(place + m[:, None] * stride + n[None, :], x_MN, mask=inside)


def laid(table_P5: Tensor, most_rows: int, most_columns: int, kind: Tensor) -> None:
    """Copy matrices whose rows lie end to end to where rows lie apart: of each, `table_P5` (int64,
    on the device) tells both addresses, rows, columns, and numbers from row to row of the copy.
    All have the type of `kind`."""
    _laid[(len(table_P5), triton.cdiv(most_rows, 64))](
        table_P5, kind, block_m=64, block_n=rank_block(most_columns), num_warps=8
    )
