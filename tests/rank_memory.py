"""Memory of one rank of a sharded model, measured in a forked process of a test."""

import json
import os
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from plan_fixtures import Tune, compute_loss, make_batch, make_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from finesight.encode.batch import PackedBatch
from finesight.model.linear import stacked_row_counts
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import locate_model
from finesight.settings.config import ParallelMode, TrainSettings
from finesight.train.master_weight_optimizer import MasterWeightOptimizer
from finesight.train.parallel.fsdp import FSDPStrategy

TINY = locate_model("finesight-tiny")


def count_storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors on this rank, each counted once."""
    local = [getattr(tensor, "to_local", lambda own=tensor: own)() for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in local]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_peak_of_step(model: VisionLanguageModel, batch: PackedBatch) -> int:
    """Return the bytes that forward and backward allocate at most at the same time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        compute_loss(model, batch).backward()
    assert profiled.profiler is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))


def measure_rank(store: str, data: str, mode: ParallelMode, tune: Tune, dtype: str) -> int:
    """Print the memory of the first of two ranks as JSON: persistent, and the peak of a step."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch_dtype = getattr(torch, dtype)
    batch = make_batch(TINY, Path(data))
    model = make_model(TINY, torch_dtype, tune)
    row_counts = stacked_row_counts(model)
    strategy = FSDPStrategy(model, torch_dtype, mode)
    optimizer = MasterWeightOptimizer(strategy.trainable_params, TrainSettings(), row_counts)
    masters = [group.master_weights.params_E for group in optimizer.param_groups]
    measured = {
        "weights": count_storage_bytes([*model.parameters(), *model.buffers()]),
        "master_weights": count_storage_bytes(masters),
        "optimizer_states": sum(group.optimizer.state_bytes() for group in optimizer.param_groups),
    }
    compute_loss(model, batch).backward()
    strategy.zero_grad()
    # A thread of gloo holds the buffers of a collective until it runs again: on a busy machine,
    # a single step may have two units more. This only adds, so the least of several steps counts.
    peaks = []
    for _ in range(12):
        peaks.append(measure_peak_of_step(model, batch))
        strategy.zero_grad()
    measured["peak"] = min(peaks)
    compute_loss(model, batch).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    measured["gradients"] = count_storage_bytes(gradients)
    print(json.dumps(measured), flush=True)
    dist.destroy_process_group()
    return 0
