"""Building blocks shared by Triton kernels: reduction of partial sums, fast sigmoid, layouts."""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

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
