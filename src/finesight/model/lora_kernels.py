"""Triton kernels of low-rank adapters: each reads what it needs of the wide activations once, and
makes the drop-out's mask anew wherever it is needed, so that no mask is kept.

An adapter's down-projection gives `low`, S numbers of each row, that carry the adapter's scale and
the drop-out's; it is the consumer of the wide product that adds `low` times the up-projection. Sums
are fp32. Shapes: T rows (tokens), I inputs, D width, S ranks of a group end to end, C chunks of
rows. Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Ptr: TypeAlias = tl.tensor
"""Where a tensor begins, as a kernel sees it."""


class Blocks(NamedTuple):
    """How a kernel's programs share the work: rows and columns of a tile, warps, and tiles that are
    loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


LOWERED, LOWERED_BACK, DOWN_GRAD = Blocks(16, 128, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
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
    """Which numbers of rows `m` [M] and columns `c` [N] are not dropped, [M, N]."""
    key = mixed(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0xC2B2AE35))
    key_M = mixed(m.to(tl.uint32) * 0x9E3779B1 + key)
    return mixed(key_M[:, None] ^ (c.to(tl.uint32) * 0x85EBCA77)[None, :]) >= threshold


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _lowered(x: Ptr, a: Ptr, low: Ptr, joined: Ptr, rows: int, width: int, ranks: int,
             x_stride: int, joined_stride: int, seed: Ptr, salt: int, threshold: int,
             times: float, is_dropped: tl.constexpr, is_joined: tl.constexpr,
             is_copied: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
             block_s: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    s = tl.program_id(1) * block_s + tl.arange(0, block_s)
    inside_M, at_M = m < rows, m.to(tl.int64)
    low_MS = tl.zeros((block_m, block_s), tl.float32)
    for start in range(0, width, block_n):
        c = start + tl.arange(0, block_n)
        inside = inside_M[:, None] & (c < width)[None, :]
        x_MN = tl.load(x + at_M[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
        if is_copied:
            tl.store(joined + at_M[:, None] * joined_stride + c[None, :], x_MN, mask=inside)
        if is_dropped:
            x_MN = tl.where(kept(seed, salt, m, c, threshold), x_MN, 0.0)
        inside_SN = (s < ranks)[:, None] & (c < width)[None, :]
        a_SN = tl.load(a + s[:, None] * width + c[None, :], mask=inside_SN, other=0.0)
        low_MS += tl.dot(x_MN, tl.trans(a_SN))
    inside_MS = inside_M[:, None] & (s < ranks)[None, :]
    tl.store(low + at_M[:, None] * ranks + s[None, :], low_MS * times, mask=inside_MS)
    if is_joined:
        # Beyond the ranks there are zeros: so are the sums.
        to_MS = joined + at_M[:, None] * joined_stride + (width + s)[None, :]
        inside_MS = inside_M[:, None] & (width + s < joined_stride)[None, :]
        tl.store(to_MS, low_MS * times, mask=inside_MS)


def lowered(
    x_TI: Tensor, a_SI: Tensor, drop: Drop, joined_TJ: Tensor | None = None, *, copied: bool = False
) -> Tensor:
    """drop(x) A^T: [T, S]. It is put after the first I columns of `joined_TJ`, too; before it `x`,
    where that is to be `copied`."""
    (rows, width), ranks, tile = x_TI.shape, len(a_SI), LOWERED
    low_TS = x_TI.new_empty(rows, ranks)
    room = ranks if joined_TJ is None else joined_TJ.shape[1] - width
    # One program for all ranks where the input is copied.
    block_s = rank_block(room) if copied else min(64, rank_block(room))
    into = low_TS if joined_TJ is None else joined_TJ
    _lowered[(triton.cdiv(rows, tile.rows), triton.cdiv(room, block_s))](
        x_TI, a_SI, low_TS, into, rows, width, ranks, x_TI.stride(0), into.stride(0),
        *drop.told(x_TI), is_dropped=drop.share > 0.0, is_joined=joined_TJ is not None,
        is_copied=copied, block_m=tile.rows, block_n=tile.columns,
        block_s=block_s, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return low_TS


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
    """`dn` plus the gradient by `x` of `lowered`, in a piece of its own."""
    (rows, width), ranks, tile = dn_TI.shape, len(a_SI), LOWERED_BACK
    dx_TI = dn_TI.new_empty(rows, width)
    _lowered_back[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns))](
        dn_TI, dlow_TS, a_SI, dx_TI, rows, width, ranks, dn_TI.stride(0), dlow_TS.stride(0),
        *drop.told(dn_TI), is_dropped=drop.share > 0.0, block_m=tile.rows,
        block_n=tile.columns, block_s=min(64, rank_block(ranks)), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return dx_TI


@triton.jit(do_not_specialize=["rows", "per_chunk", "salt", "threshold"])
def _down_grad(x: Ptr, w: Ptr, scales: Ptr, dlow: Ptr, partial: Ptr, rows: int, per_chunk: int,
               width: int, ranks: int, dlow_stride: int, seed: Ptr, salt: int,
               threshold: int, times: float, is_normed: tl.constexpr, is_dropped: tl.constexpr,
               block_m: tl.constexpr, block_n: tl.constexpr,
               block_s: tl.constexpr) -> None:  # fmt: skip
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    chunk = tl.program_id(1)
    s = tl.arange(0, block_s)
    inside_N, inside_S = c < width, s < ranks
    w_N = tl.full((block_n,), 1.0, tl.float32)
    if is_normed:
        w_N = tl.load(w + c, mask=inside_N, other=0.0).to(tl.float32)
    da_SN = tl.zeros((block_s, block_n), tl.float32)
    last = tl.minimum(rows, (chunk + 1) * per_chunk)
    for start in range(chunk * per_chunk, last, block_m):
        m = start + tl.arange(0, block_m)
        inside_M = m < last
        at_M = m.to(tl.int64)
        x_MN = tl.load(x + at_M[:, None] * width + c[None, :],
                       mask=inside_M[:, None] & inside_N[None, :], other=0.0)  # fmt: skip
        if is_normed:
            scale_M = tl.load(scales + m, mask=inside_M, other=0.0)
            x_MN = (x_MN.to(tl.float32) * scale_M[:, None] * w_N[None, :]).to(x_MN.dtype)
        if is_dropped:
            x_MN = tl.where(kept(seed, salt, m, c, threshold), x_MN, 0.0)
        dlow_MS = tl.load(dlow + at_M[:, None] * dlow_stride + s[None, :],
                          mask=inside_M[:, None] & inside_S[None, :], other=0.0)  # fmt: skip
        da_SN += tl.dot(tl.trans(dlow_MS), x_MN)
    at = partial + (chunk * ranks + s).to(tl.int64)[:, None] * width + c[None, :]
    tl.store(at, da_SN * times, mask=inside_S[:, None] & inside_N[None, :])


def down_grad(
    x_TI: Tensor, dlow_TS: Tensor, drop: Drop, norm: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The gradient by A of drop(x) A^T, [S, I]; with `norm`, a weight and the rows' scales, of
    drop(norm(x)) A^T. Always summed in the same order."""
    (rows, width), ranks = x_TI.shape, dlow_TS.shape[1]
    w, scales = (x_TI, x_TI) if norm is None else norm
    tile = DOWN_GRAD
    wide = triton.cdiv(width, tile.columns)
    per_chunk = rows_of_chunk(rows, wide)
    chunks = triton.cdiv(rows, per_chunk)
    partial_CSI = torch.empty(chunks, ranks, width, dtype=torch.float32, device=x_TI.device)
    _down_grad[(wide, chunks)](
        x_TI, w, scales, dlow_TS, partial_CSI, rows, per_chunk, width, ranks,
        dlow_TS.stride(0), *drop.told(x_TI), is_normed=norm is not None,
        is_dropped=drop.share > 0.0, block_m=tile.rows, block_n=tile.columns,
        block_s=rank_block(ranks), num_warps=2 * tile.warps if ranks > 64 else tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return folded(partial_CSI, x_TI.dtype)


PROGRAMS = 512
"""Of a kernel that fill a large card."""


def rows_of_chunk(rows: int, beside: int) -> int:
    """Rows that one of a kernel's programs takes, where `beside` of them take each row."""
    chunks = max(1, min(PROGRAMS // beside, triton.cdiv(rows, 64)))
    return max(1, int(triton.cdiv(triton.cdiv(rows, chunks), 64))) * 64


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
