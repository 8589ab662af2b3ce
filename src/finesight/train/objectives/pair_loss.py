"""Preference objectives: DPO (Rafailov et al. 2023) and its variants, ORPO, SimPO and KTO.

A pack contains one sample: the prompt with its images, which all responses share, then the
responses, such as the chosen and the rejected one. The reference model is the model before the
first step. Its log-probabilities are computed once and stored in the run folder.

Shapes: L supervised tokens, D model width, V vocabulary size, C rows of a chunk, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finesight.config import DpoSettings, KtoSettings, OrpoSettings, SimpoSettings
from finesight.data.sample import Sample
from finesight.encode.packing import PackedBatch
from finesight.model.attention import pad_rows
from finesight.model.lora.fused import MAX_PADDING
from finesight.train.dataset_stats import load_tensors, save_tensors
from finesight.train.evaluation import iter_step_losses
from finesight.train.objectives.cross_entropy import MAX_LOGITS_BYTES, PackKey, SftObjective
from finesight.train.oom import MemoryBudget, retry_on_oom
from finesight.train.run_dir import Split
from finesight.train.state import TrainState
from finesight.train.step_dataset import GlobalStepStats

REFERENCE_FILE = "reference_logps.safetensors"
"""File of the run folder with the log-probabilities of the reference model."""

ResponseLogps = tuple[float, ...]
"""Log-probabilities of the chosen and of the rejected response, and for KTO of a mismatched one.

NaN stands for a response that the sample does not have.
"""

REFERENCE_NAMES = "reference_chosen", "reference_rejected", "reference_mismatched"
"""Inputs of the loss with the log-probabilities of the reference model."""

PairSettings = DpoSettings | OrpoSettings | SimpoSettings | KtoSettings


class PairObjective(SftObjective):
    """Objective of preference tuning: the losses of DPO, ORPO or SimPO, as a mean over pairs.

    ORPO and SimPO need no reference model. Their rewards are mean log-probabilities per token.

    Attributes:
        reference_logps: Log-probabilities of the reference model by split (`train`, `eval`) and
            corpus index; empty before `prepare_references`.
    """

    metric_names: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )
    num_responses = 2

    def __init__(self, settings: PairSettings) -> None:
        self.settings = settings
        self.reference_logps: dict[str, dict[int, ResponseLogps]] = {}

    def count_terms(self, stats: GlobalStepStats) -> int:
        """Return the number of samples."""
        return stats.num_samples

    def arrange_logps(self, sample: Sample, logps: Sequence[float]) -> ResponseLogps:
        """Return the log-probabilities of the responses of a sample in the order of the loss."""
        return tuple(logps)

    def find_reference(self, key: PackKey | None) -> ResponseLogps | None:
        """Return the log-probabilities of the reference model, None for a skipped sample.

        They are 0 before `prepare_references`.
        """
        if key is None or not self.reference_logps:
            return (0.0,) * self.num_responses
        split, (index,) = key
        # None: an image was unreadable when the run started.
        return self.reference_logps[split].get(index)

    def loss_inputs(
        self, batch: PackedBatch, loss_weight: Tensor, key: PackKey | None = None
    ) -> dict[str, Tensor]:
        """Return labels, response of each label (0 is chosen, 1 rejected) and reference values."""
        reference = self.find_reference(key)
        if reference is None:
            # Without a reference, the sample has no loss.
            reference = (0.0,) * self.num_responses
            loss_weight = torch.zeros_like(loss_weight)
        inputs = {
            "labels_L": batch.labels_L,
            "response_L": find_responses(batch),
            "loss_weight": loss_weight,
        }
        for name, value in zip(REFERENCE_NAMES, reference, strict=False):
            inputs[name] = torch.full_like(loss_weight, value)
        return inputs

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss and metrics of the pair."""
        logps_2, lengths_2, reference_2 = self.sum_logps(h_LD, head_VD, inputs)
        settings = self.settings
        assert not isinstance(settings, KtoSettings), f"{settings} without pairs"
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
        is_correct = (chosen > rejected).to(chosen.dtype)
        metrics = torch.stack([chosen, rejected, is_correct, chosen - rejected])
        values = torch.cat([loss[None], metrics, logps_2.detach()])
        return values * inputs["loss_weight"]

    def sum_logps(
        self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probability, length and reference of each response, [R]."""
        logps_L = compute_token_logps(h_LD, head_VD, inputs["labels_L"])
        is_response_RL = torch.stack([inputs["response_L"] == n for n in range(self.num_responses)])
        reference_R = torch.stack([inputs[name] for name in REFERENCE_NAMES[: self.num_responses]])
        logps_R = (logps_L * is_response_RL).sum(1)
        lengths_R = is_response_RL.sum(1)
        return logps_R, lengths_R, reference_R


class KtoObjective(PairObjective):
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

    def __init__(self, settings: KtoSettings) -> None:
        super().__init__(settings)
        self.has_baseline = settings.loss_type == "kto"
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
        assert isinstance(settings, KtoSettings), f"{settings} in KTO"
        losses_2 = compute_kto_losses(settings, ratios_3[:2], inputs["baseline"]) * is_given_2
        loss = losses_2.sum() / is_given_2.sum()
        metrics = [settings.beta * ratios_3[:2], is_given_2, logps_3[:2] * is_given_2, ratios_3[2:]]
        values = torch.cat([loss[None], *(metric.detach() for metric in metrics)])
        return values * inputs["loss_weight"]


def compute_kto_losses(settings: KtoSettings, ratios_2N: Tensor, baseline: Tensor) -> Tensor:
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
    labels_L = labels_L.long().clamp(min=0)

    def compute_chunk(h_CD: Tensor, labels_C: Tensor) -> Tensor:
        rows_CD = h_CD
        if h_CD.is_cuda:
            # Libraries sum in another order for few rows.
            rows_CD = pad_rows(h_CD, MAX_PADDING)
        logits_CV = (rows_CD @ head_VD.T)[: len(h_CD)]
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if temperature != 1.0:
            logits_CV = logits_CV / temperature
        for banned_id in banned_ids:
            logits_CV[:, banned_id] = -torch.inf
        return logits_CV.gather(1, labels_C[:, None])[:, 0] - logits_CV.logsumexp(1)

    return map_chunks(compute_chunk, len(head_VD), h_LD[: len(labels_L)], labels_L)


def map_chunks(compute_chunk: Callable[..., Tensor], num_logits: int, *rows: Tensor) -> Tensor:
    """Return the results of a function of chunks of rows with at most `MAX_LOGITS_BYTES` of logits.

    The backward pass computes the logits again.
    """
    chunk_size = max(1, MAX_LOGITS_BYTES // (4 * num_logits))
    chunks_by_input = [torch.split(x, chunk_size) for x in rows]
    results = []
    for chunk in zip(*chunks_by_input, strict=True):
        results.append(
            checkpoint(compute_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(results)


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
    objective = state.engine.objective
    process_group = state.run.hardware.process_group
    assert isinstance(objective, PairObjective), f"{objective} has no reference model"
    path = state.run.run_dir.path / REFERENCE_FILE
    if state.progress.step:
        remedy = "restore the file from a copy, or start a new run with another output_dir"
        content = "the log-probabilities of the reference model"
        objective.reference_logps = _index_references(load_tensors(path, content, remedy))
        return
    sampler = state.data.sampler
    validation = state.data.validation
    steps = map(sampler.batch_indices, range(len(sampler)))
    indices: dict[Split, Sequence[int]] = {"train": sorted(set(chain.from_iterable(steps)))}
    if validation is not None:
        indices["eval"] = sorted(validation.stats.sample_indices)
    found: dict[Split, list[tuple[float, ...]]] = {}
    for split, split_indices in indices.items():
        found[split] = _compute_references(state, split, split_indices)
    tables = process_group.all_gather_object(found)
    references: dict[str, NDArray[np.float64]] = {}
    for split in indices:
        rows = chain.from_iterable(table[split] for table in tables)
        references[split] = np.array(list(rows), dtype=np.float64)
    objective.reference_logps = _index_references(references)
    if process_group.is_main:
        save_tensors(path, references)


def _compute_references(
    state: TrainState, split: Split, indices: Sequence[int]
) -> list[tuple[float, ...]]:
    """Return the corpus index and the log-probabilities of the samples of this rank."""
    objective = state.engine.objective
    console = state.run.console
    hardware = state.run.hardware
    assert isinstance(objective, PairObjective), f"{objective} has no reference model"
    own_indices = hardware.process_group.shard(indices)
    corpus = state.data.splits[split].corpus
    found: list[tuple[float, ...]] = []

    def add_missing(budget: MemoryBudget) -> None:
        known = {index for index, *_ in found}
        missing = [index for index in own_indices if index not in known]
        for step_batch, values in iter_step_losses(state, split, missing, budget, on_progress):
            read = chain.from_iterable(step_batch.sample_indices)
            for index, value in zip(read, values, strict=True):
                logps = value[-objective.num_responses :].tolist()
                found.append((index, *objective.arrange_logps(corpus[index].sample, logps)))
            if step_batch.skipped and hardware.process_group.is_main:
                state.run.run_dir.append_skipped_samples(step_batch.skipped, 0, split)

    with (
        console.progress_stage(f"reference, data.{split}", len(own_indices)) as on_progress,
        state.engine.parallel.summon_full_params(),
        hardware.process_group.sync_errors(),
    ):
        retry_on_oom(state.progress.budget, hardware.device, console.log, add_missing)
    return found


def _index_references(
    tables: Mapping[str, NDArray[np.float64]],
) -> dict[str, dict[int, ResponseLogps]]:
    references: dict[str, dict[int, ResponseLogps]] = {}
    for split, table in tables.items():
        logps_by_index = {int(index): tuple(logps) for index, *logps in table.tolist()}
        references[split] = logps_by_index
    return references
