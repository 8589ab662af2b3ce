"""Triton kernels of low-rank adapters, and what kernels beside them share. A drop-out's mask is
made anew wherever it is needed, so that none is kept.

Sums are fp32. Shapes: T rows (tokens), I inputs, S ranks of a group end to end, J columns of an
input and of what is joined to it, C chunks of rows. Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernel_sizes import Blocks

Ptr: TypeAlias = tl.tensor
"""Where a tensor begins, as a kernel sees it."""


LOWERED_BACK = Blocks(64, 64, 4, 2)
"""What was quickest on an H200."""


class Drop(NamedTuple):
    """Which numbers of an adapter's input are zero: a function of `seed_1` (int32, on the device),
    of `salt`, another for each adapter, and of row and column. `times` scales what is left, and
    carries the adapter's own scale."""

    seed_1: Tensor | None
    salt: int
    share: float
    times: float

    def told(self, anything: Tensor) -> tuple[Tensor, int, int, float]:
        """What kernels take: the seed (where nothing is dropped it is not read, and any pointer
        does), the salt, how many of 2^32 equally likely numbers stand for zero, and `times`."""
        seed_1 = anything if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.share * 2**32), self.times


@triton.jit
def mixed(x: tl.tensor) -> tl.tensor:
    """A 32-bit number whose bits all depend on all bits of `x` (lowbias32 of C. Wellons)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(
    seed: tl.tensor, salt: tl.tensor, m: tl.tensor, c: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    """Which numbers of rows `m` [M] and columns `c` [N] are not dropped, [M, N]: what is done for
    each number, and not for a row or a column, is as little as scatters them."""
    key = mixed(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0xC2B2AE35))
    key_M = mixed(m.to(tl.uint32) * 0x9E3779B1 + key)
    key_N = mixed(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    x_MN = (key_M[:, None] ^ key_N[None, :]) * 0x9E3779B1
    return (x_MN ^ (x_MN >> 15)) * 0x846CA68B >= threshold


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _dropped(x: Ptr, y: Ptr, copy: Ptr, rows: int, width: int, copy_stride: int, seed: Ptr,
             salt: int, threshold: int, is_copied: tl.constexpr, block_m: tl.constexpr,
             block_n: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    c = tl.program_id(1) * block_n + tl.arange(0, block_n)
    at_M = m.to(tl.int64)
    inside = (m < rows)[:, None] & (c < width)[None, :]
    at = at_M[:, None] * width + c[None, :]
    x_MN = tl.load(x + at, mask=inside, other=0.0)
    if is_copied:
        tl.store(copy + at_M[:, None] * copy_stride + c[None, :], x_MN, mask=inside)
    tl.store(y + at, tl.where(kept(seed, salt, m, c, threshold), x_MN, 0.0), mask=inside)


def dropped(x_TI: Tensor, drop: Drop, copy_TJ: Tensor | None = None) -> Tensor:
    """`x` with zeros for what is dropped; and `x` itself in the first columns of `copy_TJ`."""
    (rows, width), y_TI = x_TI.shape, torch.empty_like(x_TI)
    copy = y_TI if copy_TJ is None else copy_TJ
    _dropped[(triton.cdiv(rows, 16), triton.cdiv(width, 256))](
        x_TI, y_TI, copy, rows, width, copy.stride(0), *drop.told(x_TI)[:3],
        is_copied=copy_TJ is not None, block_m=16, block_n=256, num_warps=4,
    )  # fmt: skip
    return y_TI


def rank_block(ranks: int) -> int:
    """What a kernel takes at once of so many ranks."""
    return max(16, int(triton.next_power_of_2(ranks)))


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


@triton.jit
def _folded(partial: Ptr, y: Ptr, total: int, chunks: int, block: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    sums = tl.zeros((block,), tl.float32)
    for chunk in range(chunks):
        sums += tl.load(partial + chunk * total + at, mask=inside, other=0.0)
    tl.store(y + at, sums, mask=inside)


def folded(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, rounded once."""
    chunks, *shape = partial.shape
    y = torch.empty(shape, dtype=dtype, device=partial.device)
    total = y.numel()
    _folded[(triton.cdiv(total, 1024),)](partial, y, total, chunks, block=1024)
    return y
