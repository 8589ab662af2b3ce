"""Objectives of responses to a prompt, and log-probabilities of the reference model.

A pack contains one sample: the prompt with its images, which all responses share, then the
responses, such as the chosen and the rejected one. The reference model is the model before the
first step. Its log-probabilities are computed once and stored in the run folder.

Shapes: L supervised tokens, D model width, V vocabulary size, R responses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.components import SettingsT
from finesight.encode.batch import PackedBatch
from finesight.samples.sample import Sample
from finesight.train.dataset_stats import load_tensors, save_tensors
from finesight.train.evaluation import iter_step_losses
from finesight.train.objectives.objective import Objective, PackKey
from finesight.train.oom import MemoryBudget, retry_on_oom
from finesight.train.run_dir import Split
from finesight.train.state import TrainState
from finesight.train.step_batch import GlobalStepStats
from finesight.train.token_logps import compute_token_logps

REFERENCE_FILE = "reference_logps.safetensors"
"""File of the run folder with the log-probabilities of the reference model."""

ResponseLogps = tuple[float, ...]
"""Log-probabilities of the chosen and of the rejected response, or also of a mismatched one.

NaN stands for a response that the sample does not have.
"""

REFERENCE_NAMES = "reference_chosen", "reference_rejected", "reference_mismatched"
"""Inputs of the loss with the log-probabilities of the reference model."""


class ResponseObjective(Objective[SettingsT]):
    """Objective of preference tuning: a loss of the responses of a sample, a mean over samples.

    Attributes:
        reference_logps: Log-probabilities of the reference model by split (`train`, `eval`) and
            corpus index; empty before `prepare`.
    """

    num_responses = 2

    def __init__(self, settings: SettingsT) -> None:
        super().__init__(settings)
        self.reference_logps: dict[str, dict[int, ResponseLogps]] = {}

    def prepare(self, state: TrainState) -> None:
        """Compute the log-probabilities of the reference model, if the objective has one."""
        if state.run.recipe.needs.reference:
            _prepare_references(self, state)

    def count_terms(self, stats: GlobalStepStats) -> int:
        """Return the number of samples."""
        return stats.num_samples

    def arrange_logps(self, sample: Sample, logps: Sequence[float]) -> ResponseLogps:
        """Return the log-probabilities of the responses of a sample in the order of the loss."""
        return tuple(logps)

    def find_reference(self, key: PackKey | None) -> ResponseLogps | None:
        """Return the log-probabilities of the reference model, None for a skipped sample.

        They are 0 before `prepare`.
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


class PairObjective(ResponseObjective[SettingsT]):
    """Objective of preference pairs: a loss of the chosen and the rejected response."""

    metric_names: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    )

    def compute_loss(self, h_LD: Tensor, head_VD: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss and metrics of the pair."""
        logps_2, lengths_2, reference_2 = self.sum_logps(h_LD, head_VD, inputs)
        loss, rewards_2 = self.compute_pair_loss(logps_2, lengths_2, reference_2)
        chosen, rejected = rewards_2.detach().unbind()
        is_correct = (chosen > rejected).to(chosen.dtype)
        metrics = torch.stack([chosen, rejected, is_correct, chosen - rejected])
        values = torch.cat([loss[None], metrics, logps_2.detach()])
        return values * inputs["loss_weight"]

    @abstractmethod
    def compute_pair_loss(
        self, logps_2: Tensor, lengths_2: Tensor, reference_2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a pair, and the rewards of both responses, [2].

        Args:
            logps_2: Log-probabilities of the chosen and of the rejected response.
            lengths_2: Numbers of their tokens.
            reference_2: Log-probabilities of the reference model; zeros without one.
        """


def find_responses(batch: PackedBatch) -> Tensor:
    """Return the index of the response of each label, [L]; the first sequence is the prompt."""
    cu_seqlens_S1 = batch.cu_seqlens_S1
    logit_indices_L = batch.logit_indices_L[: len(batch.labels_L)].to(cu_seqlens_S1.dtype)
    return torch.searchsorted(cu_seqlens_S1, logit_indices_L, right=True) - 2


def _prepare_references(objective: ResponseObjective[Any], state: TrainState) -> None:
    """Compute the log-probabilities of the reference model, or load those of a resumed run.

    The reference is the model before the first step: the base model without adapter, or the model
    with the adapter that the run continues.

    Raises:
        UserError: The file of a resumed run is missing or corrupt.
        TrainingInterrupted: A stop was requested.
    """
    process_group = state.run.hardware.process_group
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
        found[split] = _compute_references(objective, state, split, split_indices)
    tables = process_group.all_gather_object(found)
    references: dict[str, NDArray[np.float64]] = {}
    for split in indices:
        rows = chain.from_iterable(table[split] for table in tables)
        references[split] = np.array(list(rows), dtype=np.float64)
    objective.reference_logps = _index_references(references)
    if process_group.is_main:
        save_tensors(path, references)


def _compute_references(
    objective: ResponseObjective[Any], state: TrainState, split: Split, indices: Sequence[int]
) -> list[tuple[float, ...]]:
    """Return the corpus index and the log-probabilities of the samples of this rank."""
    console = state.run.console
    hardware = state.run.hardware
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
