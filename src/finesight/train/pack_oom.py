"""Convert an out-of-memory error of a pack to one that proposes a smaller budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from finesight.encode.batch import PackedBatch
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget, first_error_line, propose_plan

if TYPE_CHECKING:
    from finesight.train.state import TrainState


@contextmanager
def translate_pack_oom(
    state: TrainState, packed_batch: PackedBatch, budget: MemoryBudget, *, is_training: bool = True
) -> Iterator[None]:
    """Convert an out-of-memory error in the context to a `GpuOutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        names, first_line = packed_batch.sample_ids, first_error_line(error)
        location = f"sample {names[0]:.80}"
        if len(names) > 1:
            location = f"{len(names)} samples from {names[0]:.80} on"
        num_tokens, num_patches = sum(packed_batch.lengths), len(packed_batch.patches_ND)
        oom_error = GpuOutOfMemoryError(
            f"the GPU memory is full: {first_line}",
            where=f"{location}, {num_tokens:,} tokens and {num_patches:,} patches",
            expected="sufficient memory for one sample at a time"
            + (" with activation checkpointing" if is_training else ""),
            remedy=propose_plan(
                "end other programs on this GPU and start again with --resume, or start a new run"
                " with smaller images, a lower data.max_length, a lower tune.lora.rank, 4-bit"
                " frozen weights (tune.quantize.nf4=[language]), or several GPUs"
                " (train.parallel=fsdp)"
            ),
        )
        can_split = state.max_unsplit_tokens is not None
        world_size = state.run.hardware.process_group.world_size if can_split else 1
        smaller = budget.next_smaller(packed_batch, is_training, world_size)
        # A retry can use the memory of the freed CUDA graphs.
        has_freed_memory = state.engine.graph_runner.release_graphs()
        oom_error.next_budget = budget if has_freed_memory else smaller
        try:
            raise oom_error from None
        finally:
            del oom_error  # this frame and its traceback would keep the tensors of the pack alive
