"""A Triton kernel of cross entropy, which puts the gradients where the logits were.

Shapes: C rows of a chunk, V words of the vocabulary. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.programs import Ptr

_BLOCK, _WARPS = 4096, 8
"""Words that a program takes at once, and its warps."""


@triton.jit(do_not_specialize=["labelled"])
def _cross(logits: Ptr, target: Ptr, scale: Ptr, losses: Ptr, labelled: int, width: int,
           is_learned: tl.constexpr, block: tl.constexpr) -> None:  # fmt: skip
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * width
    v = tl.arange(0, block)
    wanted = tl.load(target + row, mask=row < labelled, other=-1)
    if wanted < 0:
        # Filling has neither loss nor gradient.
        tl.store(losses + row, 0.0)
        if is_learned:
            nothing = tl.zeros((block,), logits.dtype.element_ty)
            for start in range(0, width, block):
                tl.store(at + start + v, nothing, mask=start + v < width)
        return
    most_V = tl.full((block,), -float("inf"), tl.float32)
    sum_V = tl.zeros((block,), tl.float32)
    for start in range(0, width, block):
        x_V = tl.load(at + start + v, mask=start + v < width, other=-float("inf")).to(tl.float32)
        higher_V = tl.maximum(most_V, x_V)
        # Where nothing has come yet, both are minus infinity.
        fade_V = tl.where(most_V == higher_V, 1.0, tl.exp(most_V - higher_V))
        own_V = tl.where(x_V == -float("inf"), 0.0, tl.exp(x_V - higher_V))
        sum_V = sum_V * fade_V + own_V
        most_V = higher_V
    most = tl.max(most_V, 0)
    # Not what is no number: that has to show in the loss.
    total = tl.sum(tl.where(sum_V == 0.0, 0.0, sum_V * tl.exp(most_V - most)), 0)
    at_target = tl.load(at + wanted).to(tl.float32)
    tl.store(losses + row, tl.log(total) + most - at_target)
    if is_learned:
        # Every thread has read the target's logit before any of them is overwritten.
        tl.debug_barrier()
        times = tl.load(scale)
        for start in range(0, width, block):
            inside = start + v < width
            x_V = tl.load(at + start + v, mask=inside, other=-float("inf")).to(tl.float32)
            d_V = tl.exp(x_V - most) * (times / total)
            d_V = tl.where(start + v == wanted, d_V - times, d_V)
            tl.store(at + start + v, d_V, mask=inside)


def cross_entropy(logits_CV: Tensor, target_T: Tensor, scale: Tensor, *, learned: bool) -> Tensor:
    """Cross entropy of each row, [C] in fp32, zero for rows beyond the targets and for targets
    below zero. Where `learned`, `scale` times its gradient replaces the logits, rounded once."""
    rows, width = logits_CV.shape
    losses_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    _cross[(rows,)](
        logits_CV, target_T, scale, losses_C, len(target_T), width,
        is_learned=learned, block=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return losses_C
