"""Drop-out whose mask is made anew wherever it is needed, so that none is kept.

Shapes: T rows (tokens), I inputs, J columns of an input and of what is joined to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.programs import Ptr


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
        does), the salt, how many of 2^32 equally likely numbers stand for zero, less 2^31 (what
        kernels take as a whole number has a sign), and `times`."""
        seed_1 = anything if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.share * 2**32) - 2**31, self.times


UNDROPPED = Drop(None, 0, 0.0, 1.0)


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
    x_MN = (x_MN ^ (x_MN >> 15)) * 0x846CA68B
    return x_MN.to(tl.int32, bitcast=True) >= threshold


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
