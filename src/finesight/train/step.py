"""Training step: forward pass, loss and backward pass of each pack, then one optimizer step.

The packs of a step are its micro-batches. The trainer repeats a step with smaller packs if the GPU
memory is full (`Trainer.run_steps`).

Shapes: M image tokens, K features per token, D width, L tokens that predict a supervised token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch, dummy_batch
from finesight.errors import TrainingInterrupted
from finesight.train.device_timing import record_event
from finesight.train.objectives.objective import Objective, PackKey
from finesight.train.pack_oom import translate_pack_oom
from finesight.train.state import StepOutput, TrainEngine, TrainState
from finesight.train.step_batch import GlobalStepStats, StepBatch

if TYPE_CHECKING:
    from finesight.model.backend_model import BackendModel
    from finesight.train.vision_cache import VisionCache


def forward_backward(
    model: BackendModel,
    objective: Objective[Any],
    batch: PackedBatch,
    features_MKD: Tensor | None,
    loss_inputs: Mapping[str, Tensor],
    dropout_seed_1: Tensor | None = None,
    static_backward: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Return the weighted sums of loss and metrics of a pack, and add its gradients.

    There is no backward pass within `torch.no_grad`, as in an evaluation.

    Args:
        features_MKD: Cached image features; None to run the vision encoder.
        loss_inputs: Result of `Objective.loss_inputs`.
        dropout_seed_1: Only in a CUDA graph: buffer with the seed of dropout.
        static_backward: Only in a CUDA graph: backward pass that writes the gradients to buffers,
            which each replay overwrites.
    """
    if dropout_seed_1 is None:
        h_LD = model(batch, features_MKD)
    else:
        h_LD = model(batch, features_MKD, dropout_seed_1)
    # Features that a graph has encoded itself are freed here, before the backward pass. Other
    # callers keep theirs.
    del features_MKD
    # The loss weight is one of the inputs: it is applied before the gradients are rounded.
    losses = objective.compute_loss(h_LD, model.lm_head_weight, loss_inputs)
    if static_backward is not None:
        static_backward(losses[0])
    elif losses.requires_grad:  # False for text only, if only the vision encoder is trainable
        losses[0].backward()  # type: ignore[no-untyped-call]
    return losses


def run_pack(
    engine: TrainEngine,
    batch: PackedBatch,
    features_MKD: Tensor | None,
    loss_weight: Tensor,
    key: PackKey | None = None,
) -> Tensor:
    """Run `forward_backward` on a pack, or a CUDA graph of it.

    Args:
        features_MKD: Cached image features; None to run the vision encoder.
        loss_weight: Scalar on the device that multiplies the summed loss.
        key: Samples of the pack, if known.
    """
    loss_inputs = engine.objective.loss_inputs(batch, loss_weight, key)
    if engine.graph_runner.graphs is not None and torch.is_grad_enabled():
        # A graph of `forward_backward`, if one fits the pack and is faster.
        return engine.graph_runner.run(batch, features_MKD, loss_inputs)
    losses = forward_backward(engine.model, engine.objective, batch, features_MKD, loss_inputs)
    return losses.detach()


def train_step(
    state: TrainState,
    step_batch: StepBatch,
    vision_cache: VisionCache | None = None,
    global_stats: GlobalStepStats | None = None,
    can_stop: bool = True,
) -> StepOutput:
    """Run one training step; in a distributed run, the share of this rank.

    The loss is the mean over the terms of all packs on all ranks, so it does not depend on the
    packing. Terms are supervised tokens, unless the objective counts others (`count_terms`). The
    device skips a step with a non-finite loss or gradient, on every rank.

    Args:
        state: State of the run; its optimizer is updated.
        step_batch: Step data of this rank.
        vision_cache: Cached image features, if any.
        global_stats: Statistics over all ranks; those of this rank by default.
        can_stop: Whether a stop request ends the step, which is repeated on resume. Otherwise, it
            has to wait for the end of the step.

    Raises:
        TrainingInterrupted: A stop was requested; no parameter is updated.
        GpuOutOfMemoryError: A pack exceeds the GPU memory; no parameter is updated.
        RankDesyncError: This rank failed while the other ranks wait in a collective.
    """
    engine = state.engine
    objective = engine.objective
    loss_scaler = engine.loss_scaler
    loss_scale = loss_scaler.scale
    global_stats = global_stats or GlobalStepStats.from_step(step_batch)
    max_packs = global_stats.max_packs
    num_terms = objective.count_terms(global_stats)
    loss_weight = torch.full((), loss_scale / max(1, num_terms), device=state.run.hardware.device)

    try:
        if objective.has_baseline:
            with torch.no_grad():
                sums = _run_packs(state, step_batch, vision_cache, max_packs, loss_weight, can_stop)
                objective.set_baseline(sums / loss_scale)
        total = _run_packs(state, step_batch, vision_cache, max_packs, loss_weight, can_stop)
    except Exception:
        engine.zero_grad()
        raise

    grad_norm = engine.parallel.reduce_gradients(engine.optimizer)
    results = torch.cat([grad_norm[None], total]) / loss_scale
    step_output = StepOutput(
        step_batch=step_batch,
        global_stats=global_stats,
        budget=state.progress.budget,
        lr_factor=engine.lr_schedule.lr_factor(step_batch.step_index),
        is_applied=num_terms > 0,
        results=results.to("cpu", non_blocking=True),
        event=record_event(total.device, enable_timing=True),
    )
    if not step_output.is_applied:
        return step_output
    if loss_scaler.is_enabled:
        # The loss scale of the next step depends on the norm.
        loss, grad_norm_value = step_output.wait()
        if math.isfinite(loss) and not loss_scaler.update(grad_norm_value):
            engine.zero_grad()
            return replace(step_output, is_applied=False)

    # A loss that is not finite also skips the update.
    grad_norm = grad_norm.masked_fill(~total[0].isfinite(), math.nan)
    # Unscales and clips the gradients, without waiting for the device.
    engine.optimizer.step(step_output.lr_factor, grad_norm, loss_scale)
    engine.parallel.sync_params()
    return step_output


def _run_packs(
    state: TrainState,
    step_batch: StepBatch,
    vision_cache: VisionCache | None,
    max_packs: int,
    loss_weight: Tensor,
    can_stop: bool,
) -> Tensor:
    """Run all packs of a step, and return the weighted sums of loss and metrics over all ranks.

    Args:
        max_packs: Largest number of packs on one rank.
        loss_weight: Scalar on the device that multiplies the loss.
        can_stop: Whether a stop request ends the step.
    """
    engine = state.engine
    hardware = state.run.hardware
    process_group = hardware.process_group
    packs = [*step_batch.packs]
    # Packs whose layers communicate with other ranks come first.
    num_communicating = step_batch.num_split_packs
    if engine.parallel.is_sharded:
        # All ranks of a sharded model must run the same number of packs; the last ones are empty.
        packs += [dummy_batch()] * (max_packs - len(packs))
        num_communicating = len(packs)

    def sum_packs(micro_indices: range) -> Tensor:
        total = torch.zeros(1 + len(engine.objective.metric_names), device=hardware.device)
        for micro_index in micro_indices:
            # In a distributed run, the other ranks would wait for this one.
            can_stop_alone = can_stop and process_group.is_single_process
            if can_stop_alone and state.run.stop.signal is not None:
                raise TrainingInterrupted(
                    f"in step {step_batch.step_index + 1}, which is repeated on resume"
                )
            total += _load_and_run_pack(
                state, step_batch, vision_cache, micro_index, packs[micro_index], loss_weight
            )
        return total

    total = torch.zeros(1 + len(engine.objective.metric_names), device=hardware.device)
    if num_communicating:
        with process_group.raise_desync():
            total += sum_packs(range(num_communicating))
    if not engine.parallel.is_sharded:
        # Agree on success before the all-reduce, so that a failed rank cannot block the others.
        with process_group.sync_errors():
            total += sum_packs(range(num_communicating, len(packs)))
    return process_group.all_reduce(total)


def _load_and_run_pack(
    state: TrainState,
    step_batch: StepBatch,
    vision_cache: VisionCache | None,
    micro_index: int,
    packed_batch: PackedBatch,
    loss_weight: Tensor,
) -> Tensor:
    """Load a pack to the device, run it, and return its weighted sums of loss and metrics."""
    engine = state.engine
    process_group = state.run.hardware.process_group
    # For dropout. A seed for each micro-batch needs no random state in a checkpoint.
    global_index = micro_index * process_group.world_size + process_group.rank
    seed = state.run.recipe.train.seed
    torch.manual_seed(micro_batch_seed(seed, step_batch.step_index, global_index))
    key = None
    if packed_batch.sample_ids:
        key = ("train", step_batch.sample_indices[micro_index])
    else:
        # An empty pack, which runs all layers and contributes nothing.
        loss_weight = torch.zeros_like(loss_weight)
    with translate_pack_oom(state, packed_batch, state.progress.budget):
        # Move the gradients of the pack before to sums in fp32: autograd would add in 16 bits, and
        # a graph replaces them. The optimizer adds those of the last pack to the sums.
        if micro_index and torch.is_grad_enabled():
            engine.parallel.accumulate_gradients(engine.optimizer)
        # The tensors of the pack have no name here, so that they are freed.
        return run_pack(
            engine,
            engine.device_loader.load(packed_batch),
            _load_features(vision_cache, step_batch, micro_index, packed_batch),
            loss_weight,
            key,
        )


def _load_features(
    vision_cache: VisionCache | None,
    step_batch: StepBatch,
    micro_index: int,
    packed_batch: PackedBatch,
) -> Tensor | None:
    """Return the cached image features of a pack; None without a cache."""
    if vision_cache is None:
        return None
    cache_inputs = step_batch.cache_inputs[micro_index]
    return vision_cache.load_features(cache_inputs, packed_batch.context_shard)


def micro_batch_seed(seed: int, step: int, micro_index: int) -> int:
    """Derive the random seed of a micro-batch from the seed of the run.

    Args:
        seed: Seed of the run (`train.seed`).
        micro_index: Index of the micro-batch over all ranks.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{micro_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
