"""Training objectives: the loss of a packed batch, with one file per objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from finesight.encode.packing import PackedBatch
from finesight.train.dataloader import GlobalStepStats

PackKey = tuple[str, tuple[int, ...]]
"""Split (`train` or `eval`) and corpus indices of the samples of a pack."""


class Objective:
    """Loss of a packed batch, computed from the hidden states of its supervised tokens.

    By default, it is a mean over the supervised tokens, without metrics.
    Training step, CUDA graphs, evaluation and memory estimates use it. Shapes: L supervised tokens,
    D model width, V vocabulary size, M metrics.

    Attributes:
        metric_names: Names of the metrics that are computed with the loss.
        num_updates: Number of optimizer steps with the data of a training step.
        has_baseline: Whether the loss depends on the means over all packs of the step, which a
            forward pass computes before (`set_baseline`).
    """

    metric_names: tuple[str, ...] = ()
    num_updates: int = 1
    has_baseline: bool = False

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
        raise NotImplementedError
