"""Dropout whose mask is recomputed from a seed and never stored.

Shapes: M rows (tokens), N columns of an input.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class SeededDropout(NamedTuple):
    """Parameters of an adapter's input dropout.

    The mask is a function of `seed_1` (int32, on the device), `salt` (distinct for each adapter),
    row and column. `scale` multiplies the retained elements and includes the adapter's scale.
    """

    seed_1: Tensor | None
    salt: int
    p: float
    scale: float

    def kernel_args(self, placeholder: Tensor) -> tuple[Tensor, int, int, float]:
        """Return the kernel arguments: seed, salt, threshold and scale.

        Without dropout the seed is not read and `placeholder` is passed. The threshold is the
        number of 2^32 equally likely hashes that drop an element, minus 2^31, since kernels take
        signed integers.
        """
        seed_1 = placeholder if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.p * 2**32) - 2**31, self.scale


NO_DROPOUT = SeededDropout(None, 0, 0.0, 1.0)


@triton.jit
def hash_u32(x: tl.tensor) -> tl.tensor:
    """Hash a 32-bit integer (lowbias32 by Chris Wellons)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(
    seed: tl.tensor, salt: tl.tensor, m: tl.tensor, c: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    """Return the mask [M, N] of retained elements for rows `m` and columns `c`.

    Most of the hash is computed per row and per column, not per element.
    """
    key = hash_u32(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0xC2B2AE35))
    key_M = hash_u32(m.to(tl.uint32) * 0x9E3779B1 + key)
    key_N = hash_u32(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    x_MN = (key_M[:, None] ^ key_N[None, :]) * 0x9E3779B1
    x_MN = (x_MN ^ (x_MN >> 15)) * 0x846CA68B
    return x_MN.to(tl.int32, bitcast=True) >= threshold
