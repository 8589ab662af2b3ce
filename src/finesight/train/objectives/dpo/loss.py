"""Losses of preference pairs: DPO (Rafailov et al. 2023) and its variants.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.train.objectives.dpo import Settings
from finesight.train.objectives.response_objective import PairObjective


class DpoObjective(PairObjective[Settings]):
    """Weighted sum of the losses `train.dpo.loss_type`, as a mean over pairs."""

    def compute_pair_loss(
        self, logps_2: Tensor, lengths_2: Tensor, reference_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a pair, and the rewards of both responses, [2]."""
        (loss,) = compute_pair_losses(
            self.settings, logps_2[:, None], reference_2[:, None], lengths_2[:, None]
        )
        return loss, self.settings.beta * (logps_2 - reference_2)


def compute_pair_losses(
    settings: Settings, logps_2N: Tensor, reference_2N: Tensor, lengths_2N: Tensor
) -> Tensor:
    """Return the weighted sum of the losses of each pair, [N].

    The definitions are those of TRL 1.16 (`DPOTrainer`): DPO (Rafailov et al. 2023), IPO (Azar et
    al. 2023), hinge (Zhao et al. 2023), robust DPO (Chowdhury et al. 2024), APO (D'Oosterlinck et
    al. 2024) and SFT (Pang et al. 2024). SFT is the mean over the tokens of each chosen response;
    TRL averages over the tokens of a micro-batch.

    Args:
        logps_2N: Log-probabilities of the chosen and of the rejected responses.
        reference_2N: The same of the reference model.
        lengths_2N: Number of tokens of the responses.
    """
    beta = settings.beta
    smoothing = settings.label_smoothing
    lengths_2N = lengths_2N.clamp(min=1)
    ratios_2N = logps_2N - reference_2N
    chosen_N, rejected_N = ratios_2N
    scaled_N = beta * (chosen_N - rejected_N)
    mean_chosen_N, mean_rejected_N = ratios_2N / lengths_2N
    loss_fns: Mapping[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -F.logsigmoid(scaled_N),
        "hinge": lambda: torch.relu(1 - scaled_N),
        "ipo": lambda: (mean_chosen_N - mean_rejected_N - 1 / (2 * beta)) ** 2,
        "robust": lambda: (
            (smoothing * F.logsigmoid(-scaled_N) - (1 - smoothing) * F.logsigmoid(scaled_N))
            / (1 - 2 * smoothing)
        ),
        "apo_zero": lambda: 1 - torch.sigmoid(beta * chosen_N) + torch.sigmoid(beta * rejected_N),
        "apo_down": lambda: torch.sigmoid(beta * chosen_N) + 1 - torch.sigmoid(scaled_N),
        "sft": lambda: -logps_2N[0] / lengths_2N[0],
    }
    total_N = torch.zeros_like(scaled_N)
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    for loss_type, weight in zip(settings.loss_type, weights, strict=True):
        total_N = total_N + weight * loss_fns[loss_type]()
    return total_N
