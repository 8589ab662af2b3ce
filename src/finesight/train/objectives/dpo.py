"""Preference objectives: DPO (Rafailov et al. 2023) and its variants, ORPO and SimPO.

A pack contains one preference pair: the prompt with its images, which both responses share, then
the chosen and the rejected response. The reference model is the model before the first step. Its
log-probabilities are computed once and stored in the run folder.

Shapes: L supervised tokens, D model width, V vocabulary size, C rows of a chunk, N pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finesight.config import DpoSettings, OrpoSettings, SimpoSettings, TrainSettings
from finesight.encode.packing import PackedBatch
from finesight.progress import ProgressCallback
from finesight.train.dataloader import GlobalStepStats
from finesight.train.dataset_stats import load_tensors, save_tensors
from finesight.train.evaluation import iter_step_losses
from finesight.train.objectives import PackKey
from finesight.train.objectives.sft import MAX_LOGITS_BYTES
from finesight.train.oom import MemoryBudget, retry_on_oom
from finesight.train.sampler import SequentialSampler
from finesight.train.state import TrainState

REFERENCE_FILE = "reference_logps.safetensors"
"""File of the run folder with the log-probabilities of the reference model."""

LogpPair = tuple[float, float]
"""Log-probabilities of the chosen and of the rejected response."""

PairSettings = DpoSettings | OrpoSettings | SimpoSettings


def get_pair_settings(train: TrainSettings) -> PairSettings | None:
    """Return the settings of the objective if it trains on preference pairs, else None."""
    settings: dict[str, PairSettings] = {"dpo": train.dpo, "orpo": train.orpo, "simpo": train.simpo}
    return settings.get(train.objective or "")


class PairObjective:
    """Objective of preference tuning: the losses of DPO, ORPO or SimPO, as a mean over pairs.

    ORPO and SimPO need no reference model. Their rewards are mean log-probabilities per token.

    Attributes:
        reference_logps: Log-probabilities of the reference model by split (`train`, `eval`) and
            corpus index; empty before `prepare_references`.
    """

    metric_names: tuple[str, ...] = (
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected"),
    )
    num_updates: int = 1

    def __init__(self, settings: PairSettings) -> None:
        self.settings = settings
        self.reference_logps: dict[str, dict[int, LogpPair]] = {}

    def count_terms(self, stats: GlobalStepStats) -> int:
        """Return the number of pairs."""
        return stats.num_samples

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return labels, response of each label (0 is chosen, 1 rejected) and reference values."""
        reference = (0.0, 0.0)
        if key is not None and self.reference_logps:
            split, (index,) = key
            found = self.reference_logps[split].get(index)
            # An image was unreadable when the run started: the pair does not count.
            loss_weight = torch.zeros_like(loss_weight) if found is None else loss_weight
            reference = found or reference
        return {
            "labels_L": batch.labels_L,
            "response_L": find_responses(batch),
            "loss_weight": loss_weight,
            "reference_chosen": torch.full_like(loss_weight, reference[0]),
            "reference_rejected": torch.full_like(loss_weight, reference[1]),
        }

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss and metrics of the pair."""
        logps_L = compute_token_logps(h_LD, head_VD, inputs["labels_L"])
        response_L = inputs["response_L"]
        is_response_2L = torch.stack([response_L == 0, response_L == 1])
        logps_2 = (logps_L * is_response_2L).sum(1)
        lengths_2 = is_response_2L.sum(1)
        reference_2 = torch.stack([inputs["reference_chosen"], inputs["reference_rejected"]])
        settings = self.settings
        if isinstance(settings, DpoSettings):
            (loss,) = compute_pair_losses(
                settings, logps_2[:, None], reference_2[:, None], lengths_2[:, None]
            )
            rewards_2 = settings.beta * (logps_2 - reference_2)
        else:
            means_2 = logps_2 / lengths_2.clamp(min=1)
            (loss,) = compute_mean_losses(settings, means_2[:, None])
            rewards_2 = settings.beta * means_2
        chosen, rejected = rewards_2.detach().unbind()
        metrics = torch.stack(
            [chosen, rejected, (chosen > rejected).to(chosen.dtype), chosen - rejected]
        )
        values = torch.cat([loss[None], metrics, logps_2.detach()])
        return values * inputs["loss_weight"]


def find_responses(batch: PackedBatch) -> Tensor:
    """Return the index of the response of each label, [L]; the first sequence is the prompt."""
    cu_seqlens_S1 = batch.cu_seqlens_S1
    logit_indices_L = batch.logit_indices_L[: len(batch.labels_L)].to(cu_seqlens_S1.dtype)
    return torch.searchsorted(cu_seqlens_S1, logit_indices_L, right=True) - 2


def compute_token_logps(
    h_LD: Tensor,
    head_VD: Tensor,
    labels_L: Tensor,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """Return the log-probability of each label, [L], in fp32 or higher.

    The logits are computed in chunks of at most `MAX_LOGITS_BYTES`, and again in the backward pass.

    Args:
        h_LD: Hidden states, possibly followed by padding.
        labels_L: Labels; -1 for padding, whose result has no meaning.
        temperature: Divisor of the logits.
        banned_ids: Tokens with probability zero.
    """
    chunk_size = max(1, MAX_LOGITS_BYTES // (4 * len(head_VD)))
    labels_L = labels_L.long().clamp(min=0)

    def compute_chunk(h_CD: Tensor, labels_C: Tensor) -> Tensor:
        logits_CV = h_CD @ head_VD.T
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if temperature != 1.0:
            logits_CV = logits_CV / temperature
        for banned_id in banned_ids:
            logits_CV[:, banned_id] = -torch.inf
        return logits_CV.gather(1, labels_C[:, None])[:, 0] - logits_CV.logsumexp(1)

    chunks = zip(
        torch.split(h_LD[: len(labels_L)], chunk_size),
        torch.split(labels_L, chunk_size),
        strict=True,
    )
    return torch.cat(
        [
            checkpoint(compute_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    )


def compute_pair_losses(
    settings: DpoSettings, logps_2N: Tensor, reference_2N: Tensor, lengths_2N: Tensor
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
    beta, smoothing = settings.beta, settings.label_smoothing
    lengths_2N = lengths_2N.clamp(min=1)
    ratios_2N = logps_2N - reference_2N
    chosen_N, rejected_N = ratios_2N
    scaled_N = beta * (chosen_N - rejected_N)
    total_N = torch.zeros_like(scaled_N)
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    for loss_type, weight in zip(settings.loss_type, weights, strict=True):
        if loss_type == "sigmoid":
            loss_N = -F.logsigmoid(scaled_N)
        elif loss_type == "hinge":
            loss_N = torch.relu(1 - scaled_N)
        elif loss_type == "ipo":
            mean_chosen_N, mean_rejected_N = ratios_2N / lengths_2N
            loss_N = (mean_chosen_N - mean_rejected_N - 1 / (2 * beta)) ** 2
        elif loss_type == "robust":
            swapped_N = smoothing * F.logsigmoid(-scaled_N)
            loss_N = swapped_N - (1 - smoothing) * F.logsigmoid(scaled_N)
            loss_N = loss_N / (1 - 2 * smoothing)
        elif loss_type == "apo_zero":
            loss_N = 1 - torch.sigmoid(beta * chosen_N) + torch.sigmoid(beta * rejected_N)
        elif loss_type == "apo_down":
            loss_N = torch.sigmoid(beta * chosen_N) + 1 - torch.sigmoid(scaled_N)
        else:
            loss_N = -logps_2N[0] / lengths_2N[0]
        total_N = total_N + weight * loss_N
    return total_N


def compute_mean_losses(settings: OrpoSettings | SimpoSettings, means_2N: Tensor) -> Tensor:
    """Return the ORPO or SimPO loss of each pair, [N].

    The definitions are those of TRL 1.16 (`ORPOTrainer`, `CPOTrainer` with `simpo`), but ORPO has
    the mean negative log-likelihood of each chosen response, without its prompt.

    Args:
        means_2N: Mean log-probabilities per token of the chosen and of the rejected responses.
    """
    if isinstance(settings, SimpoSettings):
        margins_N = means_2N[0] - means_2N[1]
        return -F.logsigmoid(settings.beta * margins_N - settings.simpo_gamma)
    # The odds of a certain response are infinite.
    odds_2N = means_2N - (-torch.expm1(means_2N.clamp(max=-1e-6))).log()
    return -means_2N[0] - settings.beta * F.logsigmoid(odds_2N[0] - odds_2N[1])


def prepare_references(state: TrainState) -> None:
    """Compute the log-probabilities of the reference model, or load those of a resumed run.

    The reference is the model before the first step: the base model without adapter, or the model
    with the adapter that the run continues.

    Raises:
        UserError: The file of a resumed run is missing or corrupt.
        TrainingInterrupted: A stop was requested.
    """
    objective, hardware = state.engine.objective, state.run.hardware
    assert isinstance(objective, PairObjective), f"{objective} has no reference model"
    path = state.run.run_dir.path / REFERENCE_FILE
    if state.progress.step:
        remedy = "restore the file from a copy, or start a new run with another output_dir"
        content = "the log-probabilities of the reference model"
        objective.reference_logps = _index_references(load_tensors(path, content, remedy))
        return
    sampler, validation = state.data.sampler, state.data.validation
    steps = map(sampler.batch_indices, range(len(sampler)))
    indices = {"train": sorted({index for step in steps for index in step})}
    if validation is not None:
        indices["eval"] = sorted(validation.stats.sample_indices)
    found = {}
    for split, split_indices in indices.items():
        own_indices = hardware.process_group.shard(split_indices)
        found[split] = list[tuple[int, float, float]]()
        with (
            state.run.console.progress_stage(
                f"reference, data.{split}", len(own_indices)
            ) as on_progress,
            state.engine.parallel.summon_full_params(),
            hardware.process_group.sync_errors(),
        ):
            add_references = partial(
                _add_references, state, split, own_indices, found[split], on_progress
            )
            log = state.run.console.log
            retry_on_oom(state.progress.budget, hardware.device, log, add_references)
    payloads = hardware.process_group.all_gather_str(json.dumps(found))
    tables = [*map(json.loads, payloads)]
    references = {
        split: np.array([row for table in tables for row in table[split]], dtype=np.float64)
        for split in indices
    }
    objective.reference_logps = _index_references(references)
    if hardware.process_group.is_main:
        save_tensors(path, references)


def _add_references(
    state: TrainState,
    split: str,
    indices: Sequence[int],
    found: list[tuple[int, float, float]],
    on_progress: ProgressCallback,
    budget: MemoryBudget,
) -> None:
    """Add the corpus index and the two log-probabilities of each pair that `found` lacks.

    The model is in the mode in which the run processes the split.
    """
    recipe = state.run.recipe
    data = state.data.train if split == "train" else state.data.validation
    assert data is not None, f"no data of the split {split}"
    known = {index for index, *_ in found}
    missing = [index for index in indices if index not in known]
    sampler = SequentialSampler(missing, recipe.train.batch_size)
    dataset = data.build_step_dataset(state.data.renderer, sampler, budget.pack_tokens, recipe.data)
    state.engine.model.train(split == "train")
    try:
        for step_batch, values in iter_step_losses(state, dataset, split, budget, on_progress):
            logps = torch.stack([value[-2:] for value in values]).tolist() if values else []
            read = chain.from_iterable(step_batch.sample_indices)
            found += [(index, *pair) for index, pair in zip(read, logps, strict=True)]
            if step_batch.skipped and state.run.hardware.process_group.is_main:
                name: Literal["train", "eval"] = "train" if split == "train" else "eval"
                state.run.run_dir.append_skipped_samples(step_batch.skipped, 0, name)
    finally:
        state.engine.model.train()


def _index_references(tables: Mapping[str, NDArray[np.float64]]) -> dict[str, dict[int, LogpPair]]:
    return {
        split: {int(index): (chosen, rejected) for index, chosen, rejected in table.tolist()}
        for split, table in tables.items()
    }
