"""Drop-out whose mask is made anew wherever it is needed, so that none is kept.

Shapes: M rows (tokens), N columns of an input.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
