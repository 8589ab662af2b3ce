"""Sampler that distributes the samples of each step over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace

from finesight.encode.packing import ContextShard, SampleShape
from finesight.encode.tokenized_sample import TokenizedSample
from finesight.train.dataloader import ContextParallelSampler
from finesight.train.dataset_stats import SampleStatsMap
from finesight.train.flops import FlopCounter, NullFlopCounter
from finesight.train.oom import max_unsplit_packs
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.sampler import StepSampler


@dataclass(frozen=True)
class DistributedSampler(ContextParallelSampler):
    """Step sampler of one rank, with the computational cost balanced over the ranks.

    The samples of a step are assigned in order of decreasing cost to the rank with the lowest load.
    Samples above `max_unsplit_tokens` are split over all ranks.

    Attributes:
        sampler: Sampler of complete steps, the same on all ranks.
        process_group: Ranks of the run.
        cost_fn: Function from a corpus index to the cost of the sample.
        num_tokens_fn: Function from a corpus index to the number of tokens; None never splits
            samples.
        pack_tokens: Maximum number of tokens of a pack.
    """

    sampler: StepSampler
    process_group: ProcessGroup
    cost_fn: Callable[[int], float]
    num_tokens_fn: Callable[[int], int] | None
    pack_tokens: int

    def __len__(self) -> int:
        return len(self.sampler)

    def with_pack_tokens(self, pack_tokens: int) -> DistributedSampler:
        """Return a copy for another pack size, which determines the split samples."""
        return replace(self, pack_tokens=pack_tokens)

    def batch_indices(self, step: int) -> Sequence[int]:
        indices = [index for index in self.sampler.batch_indices(step) if not self._is_split(index)]
        costs = [self.cost_fn(index) for index in indices]
        loads = [(0.0, 0, rank) for rank in range(self.process_group.world_size)]
        heapify(loads)
        own_positions: list[int] = []
        for position in sorted(range(len(indices)), key=lambda position: -costs[position]):
            load, num_samples, rank = loads[0]
            heapreplace(loads, (load + costs[position], num_samples + 1, rank))
            if rank == self.process_group.rank:
                own_positions.append(position)
        return [indices[position] for position in sorted(own_positions)]

    def split_indices(self, step: int) -> Sequence[int]:
        """Return the corpus indices of a step's split samples, in order."""
        return [index for index in self.sampler.batch_indices(step) if self._is_split(index)]

    def context_shard(self, tokenized: TokenizedSample) -> ContextShard:
        """Return the part of a split sample that this rank processes."""
        return ContextShard.from_sample(
            tokenized, self.process_group.rank, self.process_group.world_size
        )

    @property
    def reports_skipped(self) -> bool:
        """True on the main process, which reports skipped split samples."""
        return self.process_group.is_main

    @property
    def max_unsplit_tokens(self) -> int | None:
        """Maximum number of tokens of a sample that is not split over the ranks.

        None if samples are never split. The limit is at least two tokens per rank, so that every
        shard contains tokens.
        """
        if self.num_tokens_fn is None:
            return None
        return max_unsplit_packs(self.process_group.world_size) * max(2, self.pack_tokens)

    def _is_split(self, index: int) -> bool:
        max_tokens = self.max_unsplit_tokens
        return (
            self.num_tokens_fn is not None
            and max_tokens is not None
            and self.num_tokens_fn(index) > max_tokens
        )


def build_rank_sampler(
    sampler: StepSampler,
    process_group: ProcessGroup,
    sample_stats: SampleStatsMap | None,
    flop_counter: FlopCounter | NullFlopCounter,
    pack_tokens: int,
) -> StepSampler:
    """Create the step sampler of this rank, balanced by estimated FLOPs.

    The cost ignores the shared prefix, which adds almost no computation.

    Args:
        sampler: Sampler of complete steps, returned unchanged in a single-process run.
        process_group: Ranks of the run.
        sample_stats: Statistics of all samples. Without them (None), all ranks get the same number
            of samples, because the ranks must agree on the costs.
        flop_counter: Counter that estimates the cost of a sample.
        pack_tokens: Maximum number of tokens of a pack.
    """
    if process_group.is_single_process:
        return sampler
    if sample_stats is None:
        return DistributedSampler(sampler, process_group, lambda index: 1.0, None, pack_tokens)
    stats = sample_stats

    def estimate_cost(index: int) -> float:
        sample = stats[index]
        num_tokens = max(0, sample.num_packed_tokens - stats.prefix_length)
        return (
            flop_counter.count(
                SampleShape((num_tokens,), sample.grid_thw, sample.num_supervised_tokens)
            )
            or sample.num_packed_tokens
        )

    def count_tokens(index: int) -> int:
        return stats[index].num_packed_tokens

    # Models of the transformers backend cannot split samples.
    can_split = not isinstance(flop_counter, NullFlopCounter)
    return DistributedSampler(
        sampler, process_group, estimate_cost, count_tokens if can_split else None, pack_tokens
    )
