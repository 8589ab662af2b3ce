"""Loss of the odds ratio of preference pairs (Hong et al. 2024, ORPO).

Shapes: N pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.train.objectives.orpo import Settings
from finesight.train.objectives.response_objective import PairObjective


class OrpoObjective(PairObjective[Settings]):
    """Likelihood of the chosen response and odds ratio of both, as a mean over pairs.

    It needs no reference model. The rewards are mean log-probabilities per token.
    """

    def compute_pair_loss(
        self, logps_2: Tensor, lengths_2: Tensor, reference_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a pair, and the rewards of both responses, [2]."""
        means_2 = logps_2 / lengths_2.clamp(min=1)
        (loss,) = compute_odds_losses(self.settings, means_2[:, None])
        return loss, self.settings.beta * means_2


def compute_odds_losses(settings: Settings, means_2N: Tensor) -> Tensor:
    """Return the loss of each pair, [N].

    The definition is that of TRL 1.16 (`ORPOTrainer`), but with the mean negative log-likelihood of
    each chosen response, without its prompt.

    Args:
        means_2N: Mean log-probabilities per token of the chosen and of the rejected responses.
    """
    # The odds of a certain response are infinite.
    odds_2N = means_2N - (-torch.expm1(means_2N.clamp(max=-1e-6))).log()
    return -means_2N[0] - settings.beta * F.logsigmoid(odds_2N[0] - odds_2N[1])
