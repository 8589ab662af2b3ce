"""What kernels share: adding up what each of their programs has, and a sigmoid."""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

Ptr: TypeAlias = tl.tensor
"""Where a tensor begins, as a kernel sees it."""

FEW = 1 << 16
"""Sums that are too few for all of an H200's programs where one takes 1,024 of them."""


def rank_block(ranks: int) -> int:
    """What a kernel takes at once of so many ranks."""
    return max(16, int(triton.next_power_of_2(ranks)))


@triton.jit
def times_sigmoid(x: tl.tensor, power: tl.tensor) -> tl.tensor:
    """x / (1 + 2^power). A usual division looks after divisors that do not come up here, and takes
    twice as long."""
    return libdevice.fast_dividef(x, 1.0 + tl.exp2(power))


@triton.jit
def in_step(x: tl.tensor, y: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both as they are, with numbers of the same place in the same thread. Left alone, the compiler
    deals out what comes from memory and what comes from a product in different ways, and computes
    twice what is made of the former and meets both."""
    both = tl.split(tl.join(x, y))
    return both[0], both[1]


@triton.jit
def _folded(partial: Ptr, y: Ptr, total: int, chunks: int, tall: tl.constexpr,
            block: tl.constexpr) -> None:  # fmt: skip
    at_N = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside_N = at_N < total
    sums_N = tl.zeros((block,), tl.float32)
    for first in range(0, chunks, tall):
        chunk_C = tl.cast(first, tl.int64) + tl.arange(0, tall)
        from_CN = partial + chunk_C[:, None] * total + at_N[None, :]
        inside = (chunk_C < chunks)[:, None] & inside_N[None, :]
        sums_N += tl.sum(tl.load(from_CN, mask=inside, other=0.0), 0)
    tl.store(y + at_N, sums_N, mask=inside_N)


def folded(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, rounded once."""
    chunks, *shape = partial.shape
    y = torch.empty(shape, dtype=dtype, device=partial.device)
    total = y.numel()
    # Of few numbers a program takes fewer, and several chunks at once.
    tall, block = (1, 1024) if total > FEW else (64, 16)
    _folded[(triton.cdiv(total, block),)](partial, y, total, chunks, tall=tall, block=block)
    return y
