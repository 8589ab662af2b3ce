"""Triton kernel of the cross entropy, which replaces the logits by their gradient.

Shapes: C rows of a chunk, V vocabulary size, T rows with a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.kernels.runtime import Ptr, jit, tl

_BLOCK_SIZE, _NUM_WARPS = 4096, 8
"""Vocabulary entries per block, and warps per program of the cross entropy kernel."""


@jit(do_not_specialize=["num_labels"])
def _cross_entropy_kernel(
    logits: Ptr, labels: Ptr, scale: Ptr, losses: Ptr, num_labels: int, vocab_size: int,
    needs_grad: tl.constexpr, block_size: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    row_logits = logits + row.to(tl.int64) * vocab_size
    v = tl.arange(0, block_size)
    label = tl.load(labels + row, mask=row < num_labels, other=-1)
    if label < 0:
        # Padding has neither loss nor gradient.
        tl.store(losses + row, 0.0)
        if needs_grad:
            zeros = tl.zeros((block_size,), logits.dtype.element_ty)
            for start in range(0, vocab_size, block_size):
                tl.store(row_logits + start + v, zeros, mask=start + v < vocab_size)
        return
    max_V = tl.full((block_size,), -float("inf"), tl.float32)
    sum_V = tl.zeros((block_size,), tl.float32)
    for start in range(0, vocab_size, block_size):
        x_V = tl.load(row_logits + start + v, mask=start + v < vocab_size, other=-float("inf")).to(
            tl.float32
        )
        new_max_V = tl.maximum(max_V, x_V)
        # Both are minus infinity before the first finite value.
        rescale_V = tl.where(max_V == new_max_V, 1.0, tl.exp(max_V - new_max_V))
        exp_V = tl.where(x_V == -float("inf"), 0.0, tl.exp(x_V - new_max_V))
        sum_V = sum_V * rescale_V + exp_V
        max_V = new_max_V
    max_logit = tl.max(max_V, 0)
    # NaN must propagate to the loss.
    sum_exp = tl.sum(tl.where(sum_V == 0.0, 0.0, sum_V * tl.exp(max_V - max_logit)), 0)
    label_logit = tl.load(row_logits + label).to(tl.float32)
    tl.store(losses + row, tl.log(sum_exp) + max_logit - label_logit)
    if needs_grad:
        # All threads must read the label's logit before it is overwritten.
        tl.debug_barrier()
        grad_scale = tl.load(scale)
        for start in range(0, vocab_size, block_size):
            mask = start + v < vocab_size
            x_V = tl.load(row_logits + start + v, mask=mask, other=-float("inf")).to(tl.float32)
            grad_V = tl.exp(x_V - max_logit) * (grad_scale / sum_exp)
            grad_V = tl.where(start + v == label, grad_V - grad_scale, grad_V)
            tl.store(row_logits + start + v, grad_V, mask=mask)


def cross_entropy(
    logits_CV: Tensor, labels_T: Tensor, scale: Tensor, *, needs_grad: bool
) -> Tensor:
    """Compute the cross entropy of each row of logits.

    Rows without a label or with a negative label have zero loss and gradient.

    Args:
        logits_CV: Logits. With `needs_grad`, they are replaced by their gradient times `scale`.
        labels_T: Label tokens of the first T rows; the other rows are padding.
        scale: fp32 scalar on the device that multiplies the gradient.
        needs_grad: Whether to compute the gradient.

    Returns:
        Loss of each row [C] in fp32, not multiplied by `scale`.
    """
    num_rows, vocab_size = logits_CV.shape
    losses_C = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_CV, labels_T, scale, losses_C, len(labels_T), vocab_size,
        needs_grad=needs_grad, block_size=_BLOCK_SIZE, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return losses_C
