"""Loss of the margin of preference pairs (Meng et al. 2024, SimPO).

Shapes: N pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from finesight.train.objectives.response_objective import PairObjective
from finesight.train.objectives.simpo import Settings


class SimpoObjective(PairObjective[Settings]):
    """Margin of the rewards of both responses, as a mean over pairs.

    It needs no reference model. The rewards are mean log-probabilities per token.
    """

    def compute_pair_loss(
        self, logps_2: Tensor, lengths_2: Tensor, reference_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a pair, and the rewards of both responses, [2]."""
        means_2 = logps_2 / lengths_2.clamp(min=1)
        (loss,) = compute_margin_losses(self.settings, means_2[:, None])
        return loss, self.settings.beta * means_2


def compute_margin_losses(settings: Settings, means_2N: Tensor) -> Tensor:
    """Return the loss of each pair, [N], as in TRL 1.16 (`CPOTrainer` with `simpo`).

    Args:
        means_2N: Mean log-probabilities per token of the chosen and of the rejected responses.
    """
    margins_N = means_2N[0] - means_2N[1]
    return -F.logsigmoid(settings.beta * margins_N - settings.simpo_gamma)
