"""How much of a GPU's memory a step may take, and how a run takes less when that is too much."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from finesight.encode.pack import PackedBatch
from finesight.errors import UserError

T = TypeVar("T")

FEWEST = 4
"""A sample of fewer packs is not split."""


def packs_alone(processes: int) -> int:
    """A sample of more tokens than so many packs is split over all processes: each then has a pack
    or more to compute for what it waits for others in every layer, and one alone would need many
    times the memory of a pack."""
    return max(FEWEST, processes)


class Budget(BaseModel):
    """Packs of at most `pack_tokens` tokens, and the share of layers whose activations are
    computed twice: as the recipe says, or less where the memory of this run was full."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack_tokens: int
    recompute: float

    def within(self, other: Budget) -> Budget:
        """Whichever is less of each."""
        return Budget(
            pack_tokens=min(self.pack_tokens, other.pack_tokens),
            recompute=max(self.recompute, other.recompute),
        )

    def below(self, pack: PackedBatch, learning: bool, processes: int = 1) -> Budget | None:
        """The next one to try where this pack was too much; None where nothing is left.

        Half of what the pack held, so that none like it comes again. What one sample needs is less
        only when activations are computed twice, which are kept for learning alone, or where one
        of several `processes` that may share it would else have it alone.
        """
        if len(pack.sample_ids) > 1:
            held = min(self.pack_tokens, sum(pack.lengths))
            return self.model_copy(update={"pack_tokens": max(1, held // 2)})
        if learning and self.recompute < 1.0:
            return self.model_copy(update={"recompute": 1.0})
        if learning and processes > 1 and pack.share is None:
            split = (sum(pack.lengths) - 1) // packs_alone(processes)
            if 1 < split < self.pack_tokens:
                return self.model_copy(update={"pack_tokens": split})
        return None

    def unlike(self, old: Budget) -> str:
        """What is other than before, for people, with what makes the next run begin so."""
        if self == old:
            return "the same packs, not recorded where memory was full"
        if self.pack_tokens != old.pack_tokens:
            return (
                f"packs of at most {self.pack_tokens:,} tokens instead of {old.pack_tokens:,}"
                f" (train.pack_tokens={self.pack_tokens})"
            )
        return "activations computed twice (train.recompute=true)"


class FullMemory(UserError):
    """A pack was too much for the GPU's memory: nothing has moved, and nothing of it is kept.

    `below` is the budget to try next, the same one where other memory was given back, None where
    there is none: then the run ends with what the error says.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        remedy: str = "",
        below: Budget | None = None,
    ) -> None:
        super().__init__(what, where=where, expected=expected, remedy=remedy)
        self.below = below


def too_much(
    error: torch.OutOfMemoryError,
    pack: PackedBatch,
    budget: Budget,
    learning: bool,
    processes: int = 1,
    *,
    freed: bool = False,
) -> FullMemory:
    """What a refusal of memory for a pack means to one of so many `processes` that may share a
    sample. Where memory was `freed` since, the pack may be tried as it was."""
    samples, first = len(pack.sample_ids), pack.sample_ids[0]
    held = f"sample {first:.80}" if samples == 1 else f"{samples} samples from {first:.80} on"
    return FullMemory(
        f"the GPU's memory is full: {said(error)}",
        where=f"{held}, {sum(pack.lengths):,} tokens and {len(pack.patches_ND):,} patches",
        expected="room for one sample at a time"
        + (" whose activations are computed twice" if learning else ""),
        remedy="end other programs on this GPU and start again with --resume; or begin another run"
        " with smaller pictures, a lower data.max_length, a lower tune.lora.rank, or frozen"
        " weights in four bits (tune.nf4=[language])",
        below=budget if freed else budget.below(pack, learning, processes),
    )


def too_many(error: torch.OutOfMemoryError) -> FullMemory:
    """What a refusal of memory for one answer means."""
    return FullMemory(
        f"the GPU's memory is full: {said(error)}",
        where="measuring",
        expected="room for one answer at a time",
        remedy="end other programs on this GPU, or set eval.max_new_tokens lower, and start again"
        " with --resume; or choose smaller pictures",
    )


def within_memory(
    budget: Budget, device: torch.device, say: Callable[[str], None], work: Callable[[Budget], T]
) -> T:
    """What `work` gives. Where a pack in it is too much for the GPU's memory, it is called again
    with less, or once more where less than before is kept beside it, and has to know by itself
    where to go on.

    Raises FullMemory when no smaller budget is left.
    """
    while True:
        try:
            return work(budget)
        except FullMemory as full:
            if full.below is None:
                raise
            before, budget, why = budget, full.below, full.what
        # torch goes on about the whole card, on the same line.
        short = ". ".join(why.split(". ")[:2]).removesuffix(".")
        say(f"{short}; going on with {budget.unlike(before)}")
        # Here, where the error is gone and with it whatever its frames held.
        release(device)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within the block, a memory that is full becomes a UserError that says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full: {said(error)}",
            where="training",
            expected="a model, its gradients and its optimiser's moments within the GPU's memory",
            remedy="end other programs on this GPU, keep frozen weights in four bits"
            " (tune.nf4=[language]), train less of the model (LoRA instead of full, a lower"
            " tune.lora.rank), or keep smaller moments (train.optimizer=adamw8bit)",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(
            "this machine's memory is full: " + (str(error) or "of Python's data").splitlines()[0],
            where="training",
            expected="a model, its gradients and its optimiser's moments within the memory",
            remedy="end other programs, train less of the model (a lower tune.lora.rank), take"
            " smaller packs (train.pack_tokens) or pictures, or answer more briefly"
            " (eval.max_new_tokens)",
        ) from error


def release(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def said(error: torch.OutOfMemoryError) -> str:
    """What torch says first, before its advice."""
    return str(error).splitlines()[0]
