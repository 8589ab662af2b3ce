"""Building blocks shared by Triton kernels.

They reduce partial sums, compute a fast sigmoid, and recompute dropout masks from a seed, so that
no mask is stored.

Shapes: M rows (tokens), N columns of an input.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from finesight.model.kernels.runtime import libdevice, tl, triton

Ptr: TypeAlias = tl.tensor
"""Pointer to a tensor, in the signature of a Triton kernel."""

SMALL_REDUCTION = 1 << 16
"""Number of outputs up to which 1,024 elements per program do not saturate an H200."""


def rank_block_size(ranks: int) -> int:
    """Return the power-of-two block size that covers this number of LoRA ranks."""
    return max(16, int(triton.next_power_of_2(ranks)))


@triton.jit
def times_sigmoid(x: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Compute x / (1 + 2^power) with a fast division, in half the time.

    The exact division additionally handles divisors that do not occur here.
    """
    return libdevice.fast_dividef(x, 1.0 + tl.exp2(power))


@triton.jit
def align_layouts(x: tl.tensor, y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Convert two tensors to the same thread layout.

    Otherwise the compiler uses different layouts for loaded tensors and for matmul results, and
    duplicates computations on both.
    """
    pair = tl.split(tl.join(x, y))
    return pair[0], pair[1]


@triton.jit
def _sum_partials_kernel(
    partial: Ptr, y: Ptr, total: int, chunks: int, block_chunks: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    offsets_N = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask_N = offsets_N < total
    sums_N = tl.zeros((block,), tl.float32)
    for first in range(0, chunks, block_chunks):
        chunk_C = tl.cast(first, tl.int64) + tl.arange(0, block_chunks)
        ptrs_CN = partial + chunk_C[:, None] * total + offsets_N[None, :]
        mask = (chunk_C < chunks)[:, None] & mask_N[None, :]
        sums_N += tl.sum(tl.load(ptrs_CN, mask=mask, other=0.0), 0)
    tl.store(y + offsets_N, sums_N, mask=mask_N)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum partial results over the first dimension, rounded once to `dtype`."""
    chunks, *shape = partial.shape
    y = torch.empty(shape, dtype=dtype, device=partial.device)
    total = y.numel()
    # For small outputs a program processes fewer elements and several chunks at once.
    block_chunks, block = (1, 1024) if total > SMALL_REDUCTION else (64, 16)
    _sum_partials_kernel[(triton.cdiv(total, block),)](
        partial, y, total, chunks, block_chunks=block_chunks, block=block
    )
    return y


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
