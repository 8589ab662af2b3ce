"""Dropout in Triton kernels, with a mask that is recomputed from a seed.

The mask is never stored. Shapes: M rows (tokens), N columns of an input.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class SeededDropout(NamedTuple):
    """Dropout of an adapter's input, with a reproducible mask.

    The mask is a hash of seed, salt, row and column, so that the backward pass can recompute it.

    Attributes:
        seed_1: Seed of the forward pass (int32, on the device); None without dropout.
        salt: Integer that is distinct for each adapter.
        p: Dropout probability.
        scale: Factor of retained elements, which includes the adapter's scale.
    """

    seed_1: Tensor | None
    salt: int
    p: float
    scale: float

    def kernel_args(self, placeholder: Tensor) -> tuple[Tensor, int, int, float]:
        """Return the kernel arguments: seed, salt, threshold and scale.

        An element is dropped if its hash, a signed 32-bit integer, is below the threshold. Without
        a seed `placeholder` is passed, which kernels do not read.
        """
        seed_1 = placeholder if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.p * 2**32) - 2**31, self.scale


NO_DROPOUT = SeededDropout(None, 0, 0.0, 1.0)


@triton.jit
def hash_u32(x: tl.tensor) -> tl.tensor:
    """Hash 32-bit integers with lowbias32 by Chris Wellons."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep_mask(
    seed: tl.tensor, salt: tl.tensor, m: tl.tensor, c: tl.tensor, threshold: tl.tensor
) -> tl.tensor:
    """Return the mask [M, N] of the elements that dropout retains.

    `m` and `c` are the indices of rows and columns. Most of the hash is computed per row and per
    column, not per element.
    """
    key = hash_u32(tl.load(seed).to(tl.uint32) ^ (salt.to(tl.uint32) * 0xC2B2AE35))
    key_M = hash_u32(m.to(tl.uint32) * 0x9E3779B1 + key)
    key_N = hash_u32(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    x_MN = (key_M[:, None] ^ key_N[None, :]) * 0x9E3779B1
    x_MN = (x_MN ^ (x_MN >> 15)) * 0x846CA68B
    return x_MN.to(tl.int32, bitcast=True) >= threshold
