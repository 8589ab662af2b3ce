"""Loss of desirable and undesirable answers (Ethayarajh et al. 2024, KTO).

Shapes: L supervised tokens, D model width, V vocabulary size, N answers of each label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.samples.sample import Sample
from finesight.train.objectives.kto import Settings
from finesight.train.objectives.objective import PackKey
from finesight.train.objectives.response_objective import ResponseLogps, ResponseObjective


class KtoObjective(ResponseObjective[Settings]):
    """Objective of KTO (Ethayarajh et al. 2024): desirable and undesirable answers.

    The answers of a preference pair count as half a sample each. A pack ends with the answer of
    another sample, with which the step estimates the KL divergence from the reference model.

    Attributes:
        baseline: KL divergence of the training step, at least 0.
    """

    metric_names: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "share/chosen",
        "share/rejected",
        "logps/chosen",
        "logps/rejected",
        "kl",
    )
    num_responses = 3

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.has_baseline = settings.has_baseline
        self.baseline: Tensor | None = None

    def set_baseline(self, means: Tensor) -> None:
        """Store the KL divergence of the step, which has no gradient."""
        self.baseline = means[-1].clamp(min=0)

    def describe_metrics(self, means: Sequence[float]) -> dict[str, float]:
        """Return the means over the desirable and over the undesirable answers."""
        values = super().describe_metrics(means)
        metrics: dict[str, float] = {}
        if self.has_baseline:
            metrics["kl"] = max(0.0, values["kl"])
        for name in ("chosen", "rejected"):
            share = values[f"share/{name}"]
            if share:
                for metric in (f"rewards/{name}", f"logps/{name}"):
                    metrics[metric] = values[metric] / share
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics

    def arrange_logps(self, sample: Sample, logps: Sequence[float]) -> ResponseLogps:
        """Return the log-probabilities as chosen, rejected and mismatched, NaN if not given."""
        if sample.rejected:
            slots = [0, 1]
        elif sample.label:
            slots = [0]
        else:
            slots = [1]
        if self.has_baseline:
            slots.append(2)
        found = dict(zip(slots, logps, strict=False))
        return tuple(found.get(slot, math.nan) for slot in range(self.num_responses))

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return labels, response of each label (2 is mismatched), references and baseline.

        Validation has no baseline, so that its loss is comparable between evaluations.
        """
        inputs = super().loss_inputs(batch, loss_weight, key)
        reference = self.find_reference(key) or (0.0,)
        slots = [slot for slot, logp in enumerate(reference) if not math.isnan(logp)]
        # The loss has slots for chosen, rejected and mismatched answer, but a pack numbers those
        # that it has from 0. Their slots are equally spaced, so that one stride is enough.
        stride = 1
        if len(slots) > 1:
            stride = slots[1] - slots[0]
        is_training = key is not None and key[0] == "train"
        if is_training and self.baseline is not None:
            inputs["baseline"] = self.baseline
        else:
            inputs["baseline"] = torch.zeros_like(loss_weight)
        inputs["response_L"] = inputs["response_L"] * stride + slots[0]
        return inputs

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss and metrics of the answers of a sample."""
        logps_3, _, reference_3 = self.sum_logps(h_LD, head_VD, inputs)
        is_given_3 = ~reference_3.isnan()
        ratios_3 = (logps_3 - reference_3.nan_to_num()) * is_given_3
        is_given_2 = is_given_3[:2]
        settings = self.settings
        losses_2 = compute_kto_losses(settings, ratios_3[:2], inputs["baseline"]) * is_given_2
        loss = losses_2.sum() / is_given_2.sum()
        metrics = [settings.beta * ratios_3[:2], is_given_2, logps_3[:2] * is_given_2, ratios_3[2:]]
        values = torch.cat([loss[None], *(metric.detach() for metric in metrics)])
        return values * inputs["loss_weight"]


def compute_kto_losses(settings: Settings, ratios_2N: Tensor, baseline: Tensor) -> Tensor:
    """Return the weighted losses of desirable and undesirable answers, [2, N].

    The definitions are those of TRL 1.16 (`KTOTrainer`). `apo_zero_unpaired` (D'Oosterlinck et al.
    2024) has no baseline.

    Args:
        ratios_2N: Log-ratios of model and reference.
        baseline: Estimated KL divergence of the step, at least 0.
    """
    chosen_N, rejected_N = settings.beta * (ratios_2N - baseline)
    desirable_N = settings.desirable_weight * (1 - torch.sigmoid(chosen_N))
    undesirable_N = settings.undesirable_weight * (1 - torch.sigmoid(-rejected_N))
    return torch.stack([desirable_N, undesirable_N])
