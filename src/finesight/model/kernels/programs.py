"""What kernels share: adding up what each of their programs has."""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

Ptr: TypeAlias = tl.tensor
"""Where a tensor begins, as a kernel sees it."""


def rank_block(ranks: int) -> int:
    """What a kernel takes at once of so many ranks."""
    return max(16, int(triton.next_power_of_2(ranks)))


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
