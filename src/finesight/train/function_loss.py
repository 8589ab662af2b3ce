"""Loss of a pack that a function of a Python program computes.

Shapes: L supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError
from finesight.train.objectives.objective import Objective, PackKey
from finesight.train.token_logps import compute_token_logps

LossFunction = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Function of log-probabilities of the supervised tokens of a pack, [L], and of further tensors.

It returns a scalar; the loss of a batch is the sum over its packs. The tensors have one value per
token: `labels_L`, for a pair or sampled responses also `response_L`, the number of its response (0
is the chosen one), and for sampled responses `advantages_L` and `sampled_logps_L`.
"""


class FunctionLoss(Objective[Any]):
    """Loss of a pack that a function of a Python program computes."""

    def __init__(
        self, function: LossFunction, temperature: float, banned_ids: Sequence[int]
    ) -> None:
        super().__init__(None)
        self.function = function
        self.temperature = temperature
        self.banned_ids = banned_ids

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return the labels and the further tensors of the pack."""
        return super().loss_inputs(batch, loss_weight) | dict(batch.loss_inputs)

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss of the pack, [1]."""
        # Sampling gives these tokens probability zero.
        banned_ids = self.banned_ids if "sampled_logps_L" in inputs else ()
        logps_L = compute_token_logps(
            h_LD, head_VD, inputs["labels_L"], self.temperature, banned_ids
        )
        tensors = {name: tensor for name, tensor in inputs.items() if name != "loss_weight"}
        loss: object = self.function(logps_L, tensors)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(
                f"the loss function returns {shape}",
                where="loss",
                expected="a scalar tensor, the loss of the pack",
                remedy="sum over the tokens, such as -(logps_L * weights_L).sum()",
            )
        if logps_L.requires_grad and not loss.requires_grad:
            raise UserError(
                "the loss does not depend on logps_L",
                where="loss",
                expected="a loss with a gradient",
                remedy="compute it from logps_L, without detach, item or torch.no_grad",
            )
        return loss.reshape(1) * inputs["loss_weight"]
