"""Training objectives: the loss of a packed batch, with one file per objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from finesight.encode.packing import PackedBatch


class Objective(Protocol):
    """Loss of a packed batch, computed from the hidden states of its supervised tokens.

    Training step, CUDA graphs, evaluation and memory estimates use it. Shapes: L supervised tokens,
    D model width, V vocabulary size. Objectives with several responses per prompt need additions:

    - Units: `plan_packs` keeps a pair (DPO) or a group (GRPO) in one pack. Prompt and image are the
      shared prefix.
    - Loss inputs per supervised token, in `PackedBatch`. DPO: index of the response, stored
      log-probability of the reference model. GRPO: advantage, log-probabilities of the sampler and
      of the reference model.
    - Metrics besides the loss, such as the reward margin (DPO) or the clip ratio (GRPO), as sums
      over tokens that the step adds to its all-reduce of the loss.
    """

    def loss_inputs(self, batch: PackedBatch, loss_weight: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the loss other than the hidden states, by name.

        A CUDA graph copies them to static buffers. Each is a scalar, or has one row per supervised
        token. Padding rows contain -1 in tensors of integers, and 0 in other tensors.

        Args:
            loss_weight: fp32 scalar on the device that multiplies the loss.
        """
        ...

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss, an fp32 scalar, without synchronizing with the device.

        Args:
            h_LD: Hidden states of the supervised tokens, followed by padding.
            head_VD: Weights of the language model head.
            inputs: Result of `loss_inputs`, possibly with padding.
        """
        ...
