"""Training step: forward and backward passes of all packs, then one optimizer step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.encode.packing import PackedBatch, dummy_batch
from finesight.errors import TrainingInterrupted
from finesight.model.attention import select_shard_features
from finesight.train.dataloader import SkippedSample, StepBatch, read_steps
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, build_pack_oom_error
from finesight.train.parallel.distributed import PeerFailedError, ProcessGroup, RankDesyncError
from finesight.train.setup import TrainState
from finesight.train.signals import StopRequest
from finesight.train.vision_store import VisionCache


class GlobalStepStats(NamedTuple):
    """Statistics of a step over all ranks.

    Attributes:
        num_supervised_tokens: Number of tokens that contribute to the loss.
        num_samples: Number of samples.
        num_tokens: Number of tokens.
        max_packs: Largest number of packs on one rank.
        skipped: Samples that were skipped because reading or encoding failed.
        signal: Number of a stop signal that any rank received, or 0.
    """

    num_supervised_tokens: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    max_packs: int = 0
    skipped: tuple[SkippedSample, ...] = ()
    signal: int = 0

    @classmethod
    def from_step(cls, step_batch: StepBatch, signal: int = 0) -> GlobalStepStats:
        """Compute the statistics of a step on this rank alone."""
        metrics = (
            step_batch.num_supervised_tokens,
            step_batch.num_samples,
            step_batch.num_tokens,
            len(step_batch.packs),
        )
        return cls(*metrics, step_batch.skipped, signal)


def sync_step(
    process_group: ProcessGroup, step_batch: StepBatch, signal: int = 0
) -> GlobalStepStats:
    """Exchange step statistics with all ranks; all ranks must call this before each step.

    Args:
        process_group: Ranks of the run.
        step_batch: Step data of this rank.
        signal: Number of the stop signal that this rank received, or 0.

    Returns:
        Statistics over all ranks.

    Raises:
        PeerFailedError: A rank has failed, or the ranks have different data.
        RankDesyncError: The ranks are at different steps.
    """
    local_stats = GlobalStepStats.from_step(step_batch, signal)
    if process_group.is_single_process:
        return local_stats
    own_values = (step_batch.split_checksum, *local_stats[:4], len(step_batch.skipped), signal)
    payloads = process_group.start_step(step_batch.step_index, json.dumps(own_values))
    checksums, supervised, samples, tokens, packs, skipped_counts, signals = zip(
        *map(json.loads, payloads), strict=True
    )
    if len({*checksums}) > 1:
        raise PeerFailedError(
            "a sample that is split over the ranks differs between them",
            where="training",
            expected="the same files on every rank during the run",
            remedy="verify that every machine can read the images of the sample, then start"
            " again with --resume",
        )
    skipped: list[SkippedSample] = []
    if any(skipped_counts):
        for payload in process_group.all_gather_str(json.dumps(step_batch.skipped)):
            skipped += [SkippedSample(*sample) for sample in json.loads(payload)]
    totals = sum(supervised), sum(samples), sum(tokens), max(packs)
    return GlobalStepStats(*totals, tuple(skipped), max(signals))


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Result of a training step, which the device may still be computing.

    Attributes:
        step_batch: Step data of this rank.
        global_stats: Statistics over all ranks.
        budget: Memory budget of the step.
        lr_factor: Factor of the learning rate schedule.
        is_applied: False if the gradients overflowed in fp16, or no sample was valid.
        loss_and_norm_2: Mean loss per supervised token and gradient norm. The CPU tensor is valid
            after `event`. If one of them is not finite, the device has skipped the update.
        event: CUDA event after the copy to the CPU; None on a CPU.
    """

    step_batch: StepBatch
    global_stats: GlobalStepStats
    budget: MemoryBudget
    lr_factor: float
    is_applied: bool
    loss_and_norm_2: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> tuple[float, float]:
        """Wait for the device, and return the loss and the gradient norm."""
        if self.event is not None:
            self.event.synchronize()
        loss, norm = self.loss_and_norm_2.tolist()
        return loss, norm


def micro_batch_seed(seed: int, step: int, micro_index: int) -> int:
    """Derive the random seed of a micro-batch from the seed of the run.

    Dropout masks then need no random state in a checkpoint.

    Args:
        seed: Seed of the run (`train.seed`).
        step: Index of the step.
        micro_index: Index of the micro-batch over all ranks.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{micro_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def iter_train_steps(
    state: TrainState, vision_cache: VisionCache | None
) -> Generator[StepBatch, None, None]:
    """Iterate over the remaining steps of this rank, packed within the current memory budget.

    Close the generator to end the data loader workers.

    Args:
        state: State of the run.
        vision_cache: Vision cache, with which images are not decoded; None to decode images.
    """
    hardware, progress = state.hardware, state.progress
    data = (
        state.step_dataset
        if vision_cache is None
        else state.step_dataset.with_vision_cache(vision_cache.reader)
    )
    data = data.with_pack_tokens(progress.budget.pack_tokens)
    return read_steps(data, progress.step, hardware.num_workers, hardware.device.type == "cuda")


def train_step(
    state: TrainState,
    step_batch: StepBatch,
    stop: StopRequest,
    vision_cache: VisionCache | None = None,
    global_stats: GlobalStepStats | None = None,
) -> StepOutput:
    """Run one training step; in a distributed run, the share of this rank.

    The loss is the mean over the supervised tokens of all packs on all ranks, so it does not depend
    on the packing. The device skips a step with a non-finite loss or gradient, on every rank.

    Args:
        state: State of the run; its optimizer is updated.
        step_batch: Step data of this rank.
        stop: Stop request, checked between packs.
        vision_cache: Cached image features, if any.
        global_stats: Statistics over all ranks; those of this rank by default.

    Raises:
        TrainingInterrupted: A stop was requested; no parameter is updated.
        GpuOutOfMemoryError: A pack exceeds the GPU memory; no parameter is updated.
        RankDesyncError: This rank failed while the other ranks wait in a collective.
    """
    optimizer, loss_scaler = state.optimizer, state.loss_scaler
    loss_scale = loss_scaler.scale
    process_group = state.hardware.process_group
    global_stats = global_stats or GlobalStepStats.from_step(step_batch)
    total = _accumulate_all_packs(state, step_batch, global_stats, stop, vision_cache)
    process_group.all_reduce(total)
    grad_norm = state.parallel.reduce_gradients(optimizer)
    step_output = StepOutput(
        step_batch=step_batch,
        global_stats=global_stats,
        budget=state.progress.budget,
        lr_factor=state.lr_schedule.lr_factor(step_batch.step_index),
        is_applied=global_stats.num_supervised_tokens > 0,
        loss_and_norm_2=(torch.stack([total, grad_norm]) / loss_scale).to("cpu", non_blocking=True),
        event=record_event(total.device),
    )
    if not step_output.is_applied:
        return step_output
    if loss_scaler.is_enabled:
        # The loss scale of the next step depends on the norm.
        loss, grad_norm_value = step_output.wait()
        if math.isfinite(loss) and not loss_scaler.update(grad_norm_value):
            state.zero_grad()
            return replace(step_output, is_applied=False)
    optimizer.step(
        step_output.lr_factor, grad_norm.masked_fill(~total.isfinite(), math.nan), loss_scale
    )
    state.parallel.sync_params()
    return step_output


def _accumulate_all_packs(
    state: TrainState,
    step_batch: StepBatch,
    global_stats: GlobalStepStats,
    stop: StopRequest,
    vision_cache: VisionCache | None,
) -> Tensor:
    """Accumulate the gradients of all packs of a step.

    Packs whose layers communicate with other ranks come first: all packs of a sharded model, or
    those of split samples.

    Returns:
        Loss of this rank's packs times the loss scale.
    """
    process_group, is_sharded = state.hardware.process_group, state.parallel.is_sharded
    packs = [*enumerate(_pad_micro_batches(state, step_batch, global_stats))]
    num_synced = len(packs) if is_sharded else step_batch.num_split_packs
    total = torch.zeros((), device=state.hardware.device)
    try:
        if num_synced:
            with _raise_desync(process_group):
                total += _accumulate_gradients(
                    state, step_batch, global_stats, packs[:num_synced], stop, vision_cache
                )
        if not is_sharded:
            # Agree on success before the all-reduce, so that a failed rank cannot block the others.
            with process_group.sync_errors():
                total += _accumulate_gradients(
                    state, step_batch, global_stats, packs[num_synced:], stop, vision_cache
                )
    except Exception:
        state.zero_grad()
        raise
    return total


@contextmanager
def _raise_desync(process_group: ProcessGroup) -> Iterator[None]:
    """Convert an error in the context, where other ranks wait, to a `RankDesyncError`."""
    try:
        yield
    except Exception as error:
        is_oom = isinstance(error, GpuOutOfMemoryError)
        raise RankDesyncError(
            f"rank {process_group.rank} of {process_group.world_size} failed in the middle of a"
            f" step: {error}",
            where="training",
            expected="all ranks in every layer",
            remedy="lower train.pack_tokens or set train.activation_checkpointing=true, then start"
            " again with --resume"
            if is_oom
            else "start again with --resume",
        ) from error


def _accumulate_gradients(
    state: TrainState,
    step_batch: StepBatch,
    global_stats: GlobalStepStats,
    packs: Sequence[tuple[int, PackedBatch]],
    stop: StopRequest,
    vision_cache: VisionCache | None,
) -> Tensor:
    """Accumulate the gradients of several packs.

    Args:
        state: State of the run.
        step_batch: Step data of this rank.
        global_stats: Statistics over all ranks.
        packs: Packs with their micro-batch indices.
        stop: Stop request, checked between packs.
        vision_cache: Cached image features, if any.

    Returns:
        Sum of the losses, divided by the supervised tokens of all ranks and multiplied by the loss
        scale.
    """
    device = state.hardware.device
    total = torch.zeros((), device=device)
    loss_weight = torch.full(
        (), state.loss_scaler.scale / max(1, global_stats.num_supervised_tokens), device=device
    )
    process_group = state.hardware.process_group
    for micro_index, packed_batch in packs:
        # In a distributed run, the other ranks would wait for this one.
        if stop.is_requested and process_group.is_single_process:
            raise TrainingInterrupted(
                f"in step {step_batch.step_index + 1}, which is repeated on resume"
            )
        global_index = micro_index * process_group.world_size + process_group.rank
        torch.manual_seed(
            micro_batch_seed(state.recipe.train.seed, step_batch.step_index, global_index)
        )
        cache_inputs = None if vision_cache is None else step_batch.cache_inputs[micro_index]
        pack_weight = loss_weight if packed_batch.sample_ids else torch.zeros_like(loss_weight)
        try:
            if micro_index:
                state.optimizer.accumulate_gradients()
            total += _forward_backward(state, packed_batch, pack_weight, vision_cache, cache_inputs)
        except torch.OutOfMemoryError as error:
            # A retry can use the memory of the freed CUDA graphs.
            has_freed_memory = state.graph_runner.release_graphs()
            world_size = 1 if state.max_unsplit_tokens is None else process_group.world_size
            budget = state.progress.budget
            raise build_pack_oom_error(
                error,
                packed_batch,
                budget,
                is_training=True,
                world_size=world_size,
                has_freed_memory=has_freed_memory,
            ) from None
    return total


def _pad_micro_batches(
    state: TrainState, step_batch: StepBatch, global_stats: GlobalStepStats
) -> Sequence[PackedBatch]:
    """Return the packs of a step, with dummy packs for a sharded model.

    All ranks of a sharded model must run the same number of packs.
    """
    if not state.parallel.is_sharded:
        return step_batch.packs
    return *step_batch.packs, *[dummy_batch()] * (global_stats.max_packs - len(step_batch.packs))


def _forward_backward(
    state: TrainState,
    packed_batch: PackedBatch,
    loss_weight: Tensor,
    vision_cache: VisionCache | None,
    cache_inputs: Tensor | None,
) -> Tensor:
    """Run the forward and backward pass of a pack, and return its weighted loss.

    This is a separate function so that the tensors of the pack are freed on return.
    """
    batch = state.to_device(packed_batch)
    if cache_inputs is not None and packed_batch.context_shard is not None:
        cache_inputs = select_shard_features(cache_inputs, packed_batch.context_shard)
    features_MKD = (
        None
        if vision_cache is None or cache_inputs is None
        else vision_cache.load_features(cache_inputs)
    )
    return state.graph_runner.forward_backward(batch, features_MKD, loss_weight)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Record a CUDA event with timing after all queued kernels; return None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
