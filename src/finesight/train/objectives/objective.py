"""Objectives: their interface, and the cross entropy, which is the default loss.

Language model head and cross entropy are fused, in chunks of logits. Only hidden states that
predict supervised tokens are multiplied with the head, so the logits of a complete pack are never
stored.

Shapes: L supervised tokens, D model width, V vocabulary size, C rows of a chunk, T rows with a
label.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from finesight.components import SettingsT
from finesight.encode.batch import PackedBatch
from finesight.model.fused_ops import has_kernels
from finesight.model.kernels.cross_entropy import cross_entropy
from finesight.train.step_batch import GlobalStepStats, StepBatch

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer
    from finesight.settings.config import TrainSettings

MAX_LOGITS_BYTES = 1 << 28
"""Maximum size of the fp32 logits of a chunk, in bytes."""


PackKey = tuple[str, tuple[int, ...]]
"""Split (`train` or `eval`) and corpus indices of the samples of a pack."""


class Objective(Generic[SettingsT]):
    """Loss of a packed batch, computed from the hidden states of its supervised tokens.

    The default is the mean cross entropy of the supervised tokens, without metrics. Training step,
    CUDA graphs, evaluation and memory estimates use it. Shapes: L supervised tokens, D model width,
    V vocabulary size, M metrics.

    Attributes:
        metric_names: Names of the metrics that are computed with the loss.
        num_updates: Number of optimizer steps with the data of a training step.
        has_baseline: Whether the loss depends on the means over all packs of the step, which a
            forward pass computes before (`set_baseline`).
    """

    metric_names: tuple[str, ...] = ()
    num_updates: int = 1
    has_baseline: bool = False

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    def check_renderer(self, renderer: Renderer) -> None:
        """Verify before the weights are loaded that other models fit the trained model.

        Estimates of memory and time have no renderer.

        Raises:
            UserError: They do not.
        """

    def load_models(self, train: TrainSettings) -> None:
        """Load the models that the loss compares with, after the trained model."""

    # `state` is the `TrainState`, whose module imports this one.
    def prepare(self, state: Any) -> None:
        """Compute what the loss needs before the first step, or load that of a resumed run.

        Raises:
            UserError: A file of a resumed run is missing or corrupt.
            TrainingInterrupted: A stop was requested.
        """

    def sample_steps(self, state: Any, start: int) -> Generator[StepBatch, None, None]:
        """Return the steps from `start` on with sampled responses, if the objective needs them."""
        raise NotImplementedError(f"{type(self).__name__} samples no responses")

    def set_baseline(self, means: Tensor) -> None:
        """Store what the loss needs of the mean loss and metrics of a step, [1 + M]."""

    def describe_metrics(self, means: Sequence[float]) -> dict[str, float]:
        """Return metrics for users by name from the means of `metric_names`."""
        return dict(zip(self.metric_names, means, strict=True))

    def count_terms(self, stats: GlobalStepStats) -> int:
        """Return the number of terms of a step, such as tokens, over which the loss is a mean."""
        return stats.num_supervised_tokens

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return the inputs of the loss other than the hidden states, by name.

        A CUDA graph copies them to static buffers. Each is a scalar, or has one row per supervised
        token. Padding rows contain -1 in tensors of integers, and 0 in other tensors.

        Args:
            loss_weight: fp32 scalar on the device that multiplies the loss.
            key: Samples of the pack, if known.
        """
        return {"labels_L": batch.labels_L, "loss_weight": loss_weight}

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sums of loss and metrics, [1 + M], without synchronizing.

        Metrics have no gradient.

        Args:
            h_LD: Hidden states of the supervised tokens, followed by padding.
            head_VD: Weights of the language model head.
            inputs: Result of `loss_inputs`, possibly with padding.
        """
        loss = fused_linear_cross_entropy(h_LD, head_VD, inputs["labels_L"], inputs["loss_weight"])
        return loss[None]


def fused_linear_cross_entropy(
    h_LD: Tensor, head_VD: Tensor, labels_L: Tensor, scale: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Compute the language model head and the summed cross entropy without storing all logits.

    The gradients are computed chunk by chunk in the forward pass, so each logit is computed only
    once. The softmax is in fp32. The gradient is multiplied by `scale` before it is rounded to the
    dtype of `h_LD`, which preserves small probabilities in fp16. The host does not synchronize with
    the device.

    Args:
        h_LD: Hidden states. Rows after the last label, and those with the label -1, are padding
            without loss and gradient.
        scale: fp32 scalar on the device that multiplies the loss.
        chunk_size: Rows per chunk; by default, as many as fit in `MAX_LOGITS_BYTES` of logits.

    Returns:
        `scale` times the summed loss, an fp32 scalar.
    """
    labels_L = labels_L.long()
    chunk_size = chunk_size or max(1, MAX_LOGITS_BYTES // (4 * len(head_VD)))
    if not torch.is_grad_enabled():
        total = scale.new_zeros(())
        for start in range(0, len(h_LD), chunk_size):
            rows = slice(start, start + chunk_size)
            # The logits have no name here, so that they are freed before the next chunk.
            total += _chunk_loss(h_LD[rows], head_VD, labels_L[rows], scale, needs_grad=False)[0]
        return total * scale
    apply: Callable[..., Tensor] = _FusedLinearCrossEntropy.apply
    return apply(h_LD, head_VD, labels_L, scale, chunk_size)


def _chunk_loss(
    h_CD: Tensor, head_VD: Tensor, labels_T: Tensor, scale: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of a chunk and its logit gradient [C, V].

    The gradient is multiplied by `scale`. Without `needs_grad`, the second result has no meaning.
    """
    logits_CV = h_CD @ head_VD.T
    if has_kernels(logits_CV):
        losses_C = cross_entropy(logits_CV, labels_T, scale, needs_grad=needs_grad)
        return losses_C.sum(), logits_CV
    fp32_CV = logits_CV.float()
    fp32_TV = fp32_CV[: len(labels_T)]
    has_label_T1 = labels_T[:, None] >= 0
    label_T1 = labels_T[:, None].clamp(min=0)
    target_logit_T1 = fp32_TV.gather(1, label_T1)
    max_logit_T1 = fp32_TV.amax(1, keepdim=True)
    sum_exp_T1 = fp32_TV.sub_(max_logit_T1).exp_().sum(1, keepdim=True)
    loss_T1 = sum_exp_T1.log() + max_logit_T1 - target_logit_T1
    loss = loss_T1.where(has_label_T1, 0).sum()
    if not needs_grad:
        return loss, logits_CV
    # d loss / d logits = softmax - one hot.
    fp32_CV[len(labels_T) :] = 0
    scale_T1 = scale * has_label_T1
    fp32_TV.mul_(scale_T1 / sum_exp_T1)
    fp32_TV.scatter_add_(1, label_T1, -scale_T1)
    return loss, fp32_CV.to(h_CD.dtype)


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h_LD: Tensor,
        head_VD: Tensor,
        labels_L: Tensor,
        scale: Tensor,
        chunk_size: int,
    ) -> Tensor:
        needs_h, needs_head = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        # The logits of a single chunk are saved; the backward pass computes the head's gradient.
        is_single_chunk = needs_head and 0 < len(h_LD) <= chunk_size
        total = scale.new_zeros(())
        grad_LD = None
        if needs_h:
            grad_LD = torch.empty_like(h_LD)
        grad_VD = None
        saved_grad_LV = None
        if needs_head and not is_single_chunk:
            grad_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        for start in range(0, len(h_LD), chunk_size):
            rows = slice(start, start + chunk_size)
            h_CD = h_LD[rows]
            loss, grad_CV = _chunk_loss(h_CD, head_VD, labels_L[rows], scale, needs_h or needs_head)
            total += loss
            if grad_LD is not None:
                torch.mm(grad_CV, head_VD, out=grad_LD[rows])
            if grad_VD is not None:
                grad_VD += grad_CV.T @ h_CD
            if is_single_chunk:
                saved_grad_LV = grad_CV
            # Free it before the next chunk.
            del grad_CV
        grad_head_VD = None if grad_VD is None else grad_VD.to(head_VD.dtype)
        saved_h_LD = h_LD if is_single_chunk else None
        saved_tensors = grad_LD, grad_head_VD, saved_grad_LV, saved_h_LD
        ctx.save_for_backward(*saved_tensors)  # type: ignore[arg-type]
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_LD, grad_VD, saved_grad_LV, h_LD = ctx.saved_tensors  # type: ignore[attr-defined]
        factor = grad_output.to(torch.float32)
        if saved_grad_LV is not None:
            grad_VD = saved_grad_LV.mul_(factor).T @ h_LD
        elif grad_VD is not None:
            grad_VD.mul_(factor)
        if grad_LD is not None:
            grad_LD.mul_(factor)
        return grad_LD, grad_VD, None, None, None
