"""GPU out-of-memory recovery: retry a step with a smaller memory budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from finesight.encode.batch import PackedBatch
from finesight.errors import Step, UserError
from finesight.optimizer_components import DEFAULT_OPTIMIZER, find_smaller_optimizer

T = TypeVar("T")

MIN_SPLIT_PACKS = 4
"""Minimum length, in packs, of a sample that is split over the ranks."""


def max_unsplit_packs(world_size: int) -> int:
    """Return the length in packs above which a sample is split over all ranks.

    Each rank then computes at least one pack, which outweighs the communication.
    """
    return max(MIN_SPLIT_PACKS, world_size)


class MemoryBudget(BaseModel):
    """Settings that limit the GPU memory of a step.

    Attributes:
        activation_checkpointing: Fraction of layers with activation checkpointing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack_tokens: int
    activation_checkpointing: float

    def min_with(self, other: MemoryBudget) -> MemoryBudget:
        """Combine two budgets: the fewer pack tokens, and the more activation checkpointing."""
        return MemoryBudget(
            pack_tokens=min(self.pack_tokens, other.pack_tokens),
            activation_checkpointing=max(
                self.activation_checkpointing, other.activation_checkpointing
            ),
        )

    def next_smaller(
        self, batch: PackedBatch, is_training: bool, world_size: int = 1
    ) -> MemoryBudget | None:
        """Return the next budget to try after a batch ran out of memory.

        The reductions are, in order: half of the tokens of the pack; activation checkpointing for a
        single sample; splitting the sample over the ranks.

        Args:
            world_size: Number of ranks that can share a sample; 1 if samples cannot be split.

        Returns:
            Smaller budget; None if there is none.
        """
        if len(batch.sample_ids) > 1:
            num_tokens = min(self.pack_tokens, sum(batch.lengths))
            return self.model_copy(update={"pack_tokens": max(1, num_tokens // 2)})
        if is_training and self.activation_checkpointing < 1.0:
            return self.model_copy(update={"activation_checkpointing": 1.0})
        if is_training and world_size > 1 and batch.context_shard is None:
            split_tokens = (sum(batch.lengths) - 1) // max_unsplit_packs(world_size)
            if 1 < split_tokens < self.pack_tokens:
                return self.model_copy(update={"pack_tokens": split_tokens})
        return None

    def describe_change(self, previous: MemoryBudget) -> str:
        """Describe the change from a previous budget, with the equivalent recipe settings."""
        if self == previous:
            return "the same packs without CUDA graphs"
        if self.pack_tokens != previous.pack_tokens:
            return (
                f"packs of at most {self.pack_tokens:,} tokens instead of {previous.pack_tokens:,}"
                f" (train.pack_tokens={self.pack_tokens})"
            )
        return "activation checkpointing (train.activation_checkpointing=true)"


class GpuOutOfMemoryError(UserError):
    """Raised when a pack exceeds the GPU memory; no parameter was updated.

    Attributes:
        next_budget: Memory budget for a retry: the same one if CUDA graphs were freed, None if the
            run must end.
    """

    next_budget: MemoryBudget | None = None

    def describe_retry(self, previous: MemoryBudget) -> str:
        """Describe the error and the change from the previous budget to the next one."""
        assert self.next_budget is not None, "no budget for a retry"
        # torch appends memory statistics on the same line.
        summary = ". ".join(self.what.split(". ")[:2]).removesuffix(".")
        return f"{summary}; continuing with {self.next_budget.describe_change(previous)}"


def retry_on_oom(
    budget: MemoryBudget,
    device: torch.device,
    log: Callable[[str], None],
    fn: Callable[[MemoryBudget], T],
) -> T:
    """Call a function with a memory budget; retry with smaller ones on out-of-memory errors.

    Args:
        device: Device whose cached memory is released before a retry.
        fn: Function of the budget. When called again, it must continue from its own progress.

    Raises:
        GpuOutOfMemoryError: No smaller budget is left.
    """
    while True:
        try:
            return fn(budget)
        except GpuOutOfMemoryError as oom_error:
            if oom_error.next_budget is None:
                raise
            log(oom_error.describe_retry(budget))
            budget = oom_error.next_budget
        # Outside the except block, because the traceback keeps tensors alive.
        release_memory(device)


@contextmanager
def translate_oom_errors() -> Iterator[None]:
    """Convert out-of-memory errors of GPU or CPU in the context to a `UserError` with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU memory is full: {first_error_line(error)}",
            where="training",
            expected="model, gradients and optimizer state within the GPU memory",
            remedy=propose_plan(
                "end other programs on this GPU, shard the model over several GPUs"
                " (train.parallel=fsdp), quantize frozen weights to 4 bits"
                " (tune.quantize.nf4=[language]), train fewer parameters (LoRA instead of full, a"
                f" lower tune.lora.rank), or use a smaller optimizer state{_name_smaller_state()}"
            ),
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            "the CPU memory is full: " + (str(error) or "allocation in Python").splitlines()[0],
            where="training",
            expected="model, gradients and optimizer state within the CPU memory",
            remedy="end other programs, train fewer parameters (a lower tune.lora.rank), use"
            " smaller packs (train.pack_tokens) or images, or lower eval.max_new_tokens",
        ) from error


def _name_smaller_state() -> str:
    """Name the optimizer with a smaller state than the default one, in parentheses, if any."""
    smaller = find_smaller_optimizer(DEFAULT_OPTIMIZER)
    return f" (train.optimizer={smaller})" if smaller else ""


def propose_plan(remedy: str) -> Step:
    """Return the step that finds what fits, after a remedy for a full GPU memory."""
    purpose = f"{remedy}; settings and numbers of GPUs that fit"
    return Step("plan", {"recipe": "RECIPE"}, purpose)


def release_memory(device: torch.device) -> None:
    """Release unused cached memory of PyTorch to the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def first_error_line(error: torch.OutOfMemoryError) -> str:
    """Return the first line of an error of PyTorch, without its advice."""
    return str(error).splitlines()[0]
