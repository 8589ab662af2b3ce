"""Cross entropy at the learned tokens, without ever holding all logits.

Shapes: L learned tokens, D width of the model, V words of the vocabulary, C rows of a chunk, T of
them with a target.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from finesight.model.frozen import KERNELS
from finesight.model.fused import has_kernels

if KERNELS:
    from finesight.train import loss_kernels

LOGITS_BYTES = 1 << 28
"""Most bytes of fp32 logits that exist at a time."""


def label_loss(
    h_LD: Tensor, head_VD: Tensor, target_L: Tensor, scale: Tensor, rows: int | None = None
) -> Tensor:
    """`scale` times the sum over L of the cross entropy of softmax(h head^T); a scalar in fp32.

    The gradients are made on the way forward, chunk by chunk, so the product with the head is
    computed once. The softmax is in fp32; `scale` (a scalar on the device, in fp32) multiplies
    its gradient before that is rounded to the type of `h_LD`, which keeps small probabilities
    alive in fp16. `rows` sets the size of a chunk (by default so many that their logits fill
    `LOGITS_BYTES`). Rows of `h_LD` beyond the targets are filling, without loss or gradient.
    Nothing waits for the device.
    """
    target_L = target_L.long()
    rows = rows or max(1, LOGITS_BYTES // (4 * len(head_VD)))
    if not torch.is_grad_enabled():
        total = scale.new_zeros(())
        for at in range(0, len(h_LD), rows):
            chunk = h_LD[at : at + rows], head_VD, target_L[at : at + rows]
            total += _chunk(*chunk, scale, learned=False)[0]
        return total * scale
    apply: Callable[..., Tensor] = _LabelLoss.apply
    return apply(h_LD, head_VD, target_L, scale, rows)


def _chunk(
    h_CD: Tensor, head_VD: Tensor, target_T: Tensor, scale: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy, and where `learned` its gradient by the logits times `scale`, [C,
    V], zero for filling."""
    logits_CV = h_CD @ head_VD.T
    if has_kernels(logits_CV):
        losses_C = loss_kernels.cross_entropy(logits_CV, target_T, scale, learned=learned)
        return losses_C.sum(), logits_CV
    wide_CV = logits_CV.float()
    wide_TV = wide_CV[: len(target_T)]
    at_target_T1 = wide_TV.gather(1, target_T[:, None])
    highest_T1 = wide_TV.amax(1, keepdim=True)
    sums_T1 = wide_TV.sub_(highest_T1).exp_().sum(1, keepdim=True)
    loss = (sums_T1.log() + highest_T1 - at_target_T1).sum()
    if not learned:
        return loss, logits_CV
    # d loss / d logits = softmax - one hot.
    wide_CV[len(target_T) :] = 0
    wide_TV.mul_(scale / sums_T1)
    wide_TV.scatter_add_(1, target_T[:, None], -scale.expand(len(target_T), 1))
    return loss, wide_CV.to(h_CD.dtype)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h_LD: Tensor,
        head_VD: Tensor,
        target_L: Tensor,
        scale: Tensor,
        rows: int,
    ) -> Tensor:
        needs_h, needs_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        # One chunk's logits are kept until then: the head's gradient is made once, on the way back.
        at_once = needs_head and 0 < len(h_LD) <= rows
        total = scale.new_zeros(())
        grad_LD = torch.empty_like(h_LD) if needs_h else None
        grad_VD, kept_LV = None, None
        if needs_head and not at_once:
            grad_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        for at in range(0, len(h_LD), rows):
            h_CD, target_T = h_LD[at : at + rows], target_L[at : at + rows]
            loss, grad_CV = _chunk(h_CD, head_VD, target_T, scale, needs_h or needs_head)
            total += loss
            if grad_LD is not None:
                torch.mm(grad_CV, head_VD, out=grad_LD[at : at + rows])
            if grad_VD is not None:
                grad_VD += grad_CV.T @ h_CD
            if at_once:
                kept_LV = grad_CV
            # Or it would be there until the next one is.
            del grad_CV
        narrow_VD = None if grad_VD is None else grad_VD.to(head_VD.dtype)
        kept = grad_LD, narrow_VD, kept_LV, h_LD if at_once else None
        ctx.save_for_backward(*kept)  # type: ignore[arg-type]
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, outer: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_LD, grad_VD, kept_LV, h_LD = ctx.saved_tensors  # type: ignore[attr-defined]
        by = outer.to(torch.float32)
        if kept_LV is not None:
            grad_VD = kept_LV.mul_(by).T @ h_LD
        elif grad_VD is not None:
            grad_VD.mul_(by)
        return None if grad_LD is None else grad_LD.mul_(by), grad_VD, None, None, None
