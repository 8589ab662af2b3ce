"""Group relative policy optimization (Shao et al. 2024, GRPO) and its variants, as in TRL 1.16.

A pack contains the prompt with its images once, then the responses of a group. Log-probabilities
are those of the distribution that the responses were sampled from.

Shapes: L supervised tokens, D model width, V vocabulary size, N responses.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.train.objectives.grpo import Settings
from finesight.train.objectives.objective import Objective, PackKey
from finesight.train.objectives.response_objective import find_responses
from finesight.train.token_logps import compute_token_logps

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer
    from finesight.train.state import TrainState
    from finesight.train.step_batch import StepBatch

SAPO_TEMPERATURES = 1.0, 1.05
"""Temperatures of SAPO for positive and other advantages (Gao et al. 2025)."""


def list_clipping_metrics(settings: Settings) -> tuple[str, ...]:
    """Return the names of the clip ratios of a loss in TRL; SAPO clips nothing."""
    if settings.loss_type == "sapo":
        return ()
    if settings.loss_type == "cispo":
        return ("cispo_clip_ratio",)
    return "clip_ratio/low_mean", "clip_ratio/high_mean"


def list_metrics(settings: Settings) -> tuple[str, ...]:
    """Return the names of the metrics of a loss."""
    names = ["entropy"]
    if settings.beta:
        names.append("kl")
    names += list_clipping_metrics(settings)
    names.append("sampling/sampling_logp_difference/mean")
    names.append("sampling/importance_sampling_ratio/mean")
    return tuple(names)


class GrpoObjective(Objective[Settings]):
    """Policy loss of sampled responses; for batches without rewards, the cross entropy.

    Attributes:
        banned_ids: Tokens that sampled responses never contain.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.metric_names = list_metrics(settings)
        self.num_updates = settings.num_iterations
        self.banned_ids: tuple[int, ...] = ()

    def check_renderer(self, renderer: Renderer) -> None:
        """Store the tokens that responses never contain."""
        self.banned_ids = renderer.visual_token_ids

    def sample_steps(self, state: TrainState, start: int) -> Generator[StepBatch, None, None]:
        """Return the steps from `start` on with groups of scored responses."""
        # Other objectives need no inference engine.
        from finesight.train.objectives.grpo.rollout import GrpoRollout

        return GrpoRollout(state).read_steps(start)

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return labels, response of each label, and what `Rollout` knows of each token."""
        inputs = super().loss_inputs(batch, loss_weight)
        if batch.loss_inputs:
            inputs |= {"response_L": find_responses(batch), **batch.loss_inputs}
        return inputs

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sums of loss and metrics over the tokens of a group."""
        if "advantages_L" not in inputs:
            loss = super().compute_loss(h_LD, head_VD, inputs)
            return torch.cat([loss, loss.new_zeros(len(self.metric_names))])
        logps_L = compute_token_logps(
            h_LD, head_VD, inputs["labels_L"], self.settings.temperature, self.banned_ids
        )
        losses_L, metrics = compute_token_losses(
            self.settings,
            logps_L,
            inputs["sampled_logps_L"],
            inputs.get("reference_logps_L"),
            inputs["advantages_L"],
            inputs["response_L"],
        )
        if self.settings.importance_sampling_level == "sequence":
            # Responses are clipped instead of tokens, so each one counts once.
            for name in list_clipping_metrics(self.settings):
                metrics[name] = metrics[name] * inputs["response_weights_L"]
        weights_L = inputs["token_weights_L"]
        # Padding has no weight, but possibly infinite values.
        is_token_L = weights_L > 0
        metrics_ML = [metrics[name] for name in self.metric_names]
        values_L = torch.stack([losses_L * weights_L, *metrics_ML]).where(is_token_L, 0)
        return values_L.sum(1) * inputs["loss_weight"]


def compute_token_losses(
    settings: Settings,
    logps_L: Tensor,
    sampled_logps_L: Tensor,
    reference_logps_L: Tensor | None,
    advantages_L: Tensor,
    response_L: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each token, [L], and the metrics of `list_metrics` by name, each [L].

    With one update per rollout, the ratio to the old policy is one, and its gradient remains. The
    loss is then multiplied by the ratio of trainer and sampler, which differ by rounding. Several
    updates use the log-probabilities of the sampler as those of the old policy.

    Args:
        sampled_logps_L: Log-probabilities of the sampler.
        reference_logps_L: Log-probabilities of the reference model; None without KL divergence.
        response_L: Index of the response of each token, from 0; negative for padding.
    """
    is_on_policy = settings.num_iterations == 1
    old_logps_L = logps_L.detach() if is_on_policy else sampled_logps_L
    log_ratio_L = logps_L - old_logps_L
    if settings.importance_sampling_level == "sequence":
        num_responses = settings.num_generations
        counts_L = sum_of_responses(torch.ones_like(log_ratio_L), response_L, num_responses)
        sums_L = sum_of_responses(log_ratio_L, response_L, num_responses)
        log_ratio_L = sums_L / counts_L.clamp(min=1)
    ratio_L = log_ratio_L.exp()
    metrics = {"entropy": -logps_L}
    if settings.loss_type == "cispo":
        max_ratio = settings.effective_epsilon_high
        metrics["cispo_clip_ratio"] = (ratio_L > max_ratio) & (advantages_L > 0)
        weights_L = ratio_L.clamp(max=max_ratio).detach()
        losses_L = -weights_L * advantages_L * logps_L
    elif settings.loss_type == "sapo":
        positive, other = SAPO_TEMPERATURES
        tau_L = torch.where(advantages_L > 0, positive, other)
        losses_L = -torch.sigmoid(tau_L * (ratio_L - 1)) * 4 / tau_L * advantages_L
    else:
        low = 1 - settings.epsilon
        high = 1 + settings.effective_epsilon_high
        metrics["clip_ratio/low_mean"] = (ratio_L < low) & (advantages_L < 0)
        metrics["clip_ratio/high_mean"] = (ratio_L > high) & (advantages_L > 0)
        clipped_L = ratio_L.clamp(low, high)
        losses_L = -torch.minimum(ratio_L * advantages_L, clipped_L * advantages_L)
    correction_L = torch.ones_like(losses_L)
    if is_on_policy:
        correction_L = compute_correction(settings, (old_logps_L - sampled_logps_L), response_L)
        losses_L = losses_L * correction_L
    if reference_logps_L is not None:
        difference_L = reference_logps_L - logps_L
        # The estimator k3 of Schulman (2020).
        kl_L = difference_L.exp() - difference_L - 1
        if settings.use_bias_correction_kl:
            kl_L = kl_L * ratio_L
        losses_L = losses_L + settings.beta * kl_L
        metrics["kl"] = kl_L
    metrics["sampling/sampling_logp_difference/mean"] = (logps_L - sampled_logps_L).abs()
    metrics["sampling/importance_sampling_ratio/mean"] = correction_L
    values = {name: metric_L.detach().to(losses_L.dtype) for name, metric_L in metrics.items()}
    return losses_L, values


def compute_correction(settings: Settings, log_ratio_L: Tensor, response_L: Tensor) -> Tensor:
    """Return the importance sampling ratio of trainer and sampler, [L], truncated or masked."""
    mode = settings.importance_sampling_mode
    max_ratio = settings.importance_sampling_clip_max
    if mode == "none":
        return torch.ones_like(log_ratio_L)
    if mode.startswith("sequence"):
        log_ratio_L = sum_of_responses(log_ratio_L, response_L, settings.num_generations)
    ratio_L = log_ratio_L.exp()
    if mode.endswith("truncate"):
        return ratio_L.clamp(max=max_ratio)
    return ratio_L.masked_fill(ratio_L > max_ratio, 0)


def sum_of_responses(x_L: Tensor, response_L: Tensor, num_responses: int) -> Tensor:
    """Return the sum over the tokens of its response for each token, [L]."""
    is_response_NL = response_L == torch.arange(num_responses, device=x_L.device)[:, None]
    sums_N = x_L.where(is_response_NL, 0).sum(1)
    return sums_N[response_L.clamp(min=0)]
