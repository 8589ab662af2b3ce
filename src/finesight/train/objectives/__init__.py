"""Training objectives: the loss of a packed batch, with one file per objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from finesight.encode.packing import PackedBatch


class Objective(Protocol):
    """Loss of a packed batch, computed from the hidden states of its supervised tokens.

    The training step, CUDA graphs, evaluation and the memory estimate of a plan use both methods.

    Shapes: L supervised tokens, D model width, V vocabulary size.

    Objectives with several responses per prompt need the following additions:

    - Units. `encode.packing.plan_packs` keeps a unit in one pack: the chosen and the rejected
      response (DPO), or the responses of a group (GRPO). Prompt and image are the shared prefix.
    - Loss inputs, one value per supervised token. DPO: the index of the response, and the stored
      log-probability under the reference model. GRPO: the advantage, and the log-probabilities
      under the sampler and the reference model. `PackedBatch` carries them.
    - Metrics besides the loss, such as the reward margin (DPO) or the clip ratio (GRPO). They are
      sums over tokens, which the step adds to its all-reduce of the loss.
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
