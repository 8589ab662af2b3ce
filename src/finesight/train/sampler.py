"""Step samplers: map a step index to its samples, depending only on settings and seed.

They have no state, so a resumed run continues with the same samples. In a distributed run, each
rank gets a share of the samples of each step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.settings.config import TrainSettings
from finesight.train.oom import max_unsplit_packs
from finesight.train.parallel.distributed import ProcessGroup

if TYPE_CHECKING:
    from finesight.samples.corpus import Corpus

_WITHIN_SOURCE = 0
_ACROSS_SOURCES = 1


class SampleOrder:
    """Infinite shuffled order of the training samples of several sources.

    Each source is an infinite sequence of passes, and each pass is a permutation of all its
    samples. An epoch takes the next `ceil(weight * size)` samples of each source and shuffles them
    together. With weight 2, every sample occurs twice per epoch. With weight 0.5, two epochs cover
    all samples.

    Indices refer to the concatenated sources, as in `Corpus`. Permutations sort the raw output of a
    Philox generator (Salmon et al. 2011), which is stable across NumPy releases.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights), f"{len(sizes)} sizes for {len(weights)} weights"
        assert sizes, "an order of no sources"
        assert min(sizes) > 0, f"an empty source among sizes {list(sizes)}"
        assert min(weights) > 0, f"a weight that is not positive among {list(weights)}"
        self._sizes = tuple(sizes)
        self._seed = seed
        # Exact fractions: in floating point, 1.1 * 50 is above 55 and would be rounded up to 56.
        self._samples_per_epoch = tuple(
            math.ceil(Fraction(str(weight)) * size)
            for size, weight in zip(sizes, weights, strict=True)
        )
        self.epoch_length = sum(self._samples_per_epoch)
        """Number of samples per epoch, the same for all epochs."""
        self._epoch = -1
        self._indices: NDArray[np.int64] = np.empty(0, np.int64)

    def index_at(self, position: int) -> int:
        """Return the sample index at a position, counted from the start of epoch 0."""
        epoch, offset = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._indices = self.epoch_indices(epoch)
            self._epoch = epoch
        return int(self._indices[offset])

    def epoch_indices(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample indices of an epoch in order, int64 of shape [epoch_length]."""
        source_indices = []
        start = 0
        for source, size in enumerate(self._sizes):
            source_indices.append(start + self._epoch_slice(source, epoch))
            start += size
        order = _random_permutation(self.epoch_length, self._seed, _ACROSS_SOURCES, epoch)
        return np.concatenate(source_indices)[order]

    def _epoch_slice(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples of a source in an epoch, from the passes that the epoch overlaps."""
        size = self._sizes[source]
        count = self._samples_per_epoch[source]
        start = epoch * count
        stop = start + count
        first_pass = start // size
        end_pass = -(-stop // size)
        permutations = []
        for pass_index in range(first_pass, end_pass):
            permutations.append(
                _random_permutation(size, self._seed, _WITHIN_SOURCE, source, pass_index)
            )
        offset = first_pass * size
        return np.concatenate(permutations)[start - offset : stop - offset]


def _random_permutation(size: int, *key: int) -> NDArray[np.int64]:
    draws = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(draws, kind="stable")


class StepSampler(Protocol):
    """Interface of a sampler that returns the samples of each step."""

    def __len__(self) -> int:
        """Return the number of steps of the run."""
        ...

    def batch_indices(self, step: int) -> Sequence[int]:
        """Return the corpus indices of the samples of a step, in order."""
        ...


class TrainSampler:
    """Shuffled sampler of a training run, with `train.batch_size` samples per step.

    The last step may have fewer samples, and a step may contain samples of two epochs.

    Args:
        corpus: Samples, with the sizes and weights of their sources.
        indices: Ascending corpus indices of the valid samples.
    """

    def __init__(self, corpus: Corpus, indices: Sequence[int], train: TrainSettings) -> None:
        # Nothing can be drawn from sources without valid samples.
        sizes: list[int] = []
        weights: list[float] = []
        start = 0
        source_ends = accumulate(corpus.source_sizes)
        for source_end, weight in zip(source_ends, corpus.weights, strict=True):
            end = bisect_left(indices, source_end)
            if end > start:
                sizes.append(end - start)
                weights.append(weight)
            start = end
        self._indices = indices
        self._batch_size = train.batch_size
        self._order = SampleOrder(sizes, weights, train.seed)
        self.epoch_length = self._order.epoch_length
        if train.steps is not None:
            self.num_samples = train.steps * train.batch_size
        else:
            epochs = 1.0 if train.epochs is None else train.epochs
            self.num_samples = max(1, round(epochs * self.epoch_length))

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self._batch_size)

    def batch_indices(self, step: int) -> Sequence[int]:
        start = step * self._batch_size
        return self._get_indices(start, min(start + self._batch_size, self.num_samples))

    def replacement_indices(self, number: int) -> Sequence[int]:
        """Return samples of the order after the end of the run, `train.batch_size` for a number."""
        start = self.num_samples + number * self._batch_size
        return self._get_indices(start, start + self._batch_size)

    def _get_indices(self, start: int, stop: int) -> Sequence[int]:
        return [self._indices[self._order.index_at(position)] for position in range(start, stop)]


class SequentialSampler:
    """Sampler that returns every valid sample once, in order."""

    def __init__(self, indices: Sequence[int], batch_size: int) -> None:
        self._indices = indices
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._indices) / self._batch_size)

    def batch_indices(self, step: int) -> Sequence[int]:
        start = step * self._batch_size
        return self._indices[start : start + self._batch_size]


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign items to ranks with balanced costs.

    Items are assigned in order of decreasing cost to the rank with the lowest load. Returns the
    ascending positions of each rank, without the last ranks if there are more ranks than items.
    """
    loads: list[tuple[float, int, int]] = []
    positions: list[list[int]] = []
    for rank in range(min(num_ranks, len(costs))):
        loads.append((0.0, 0, rank))
        positions.append([])
    heapify(loads)
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        load, num_items, rank = loads[0]
        heapreplace(loads, (load + costs[position], num_items + 1, rank))
        positions[rank].append(position)
    return list(map(sorted, positions))


@dataclass(frozen=True)
class DistributedSampler:
    """Step sampler of one rank, with the computational cost balanced over the ranks.

    Samples above `max_unsplit_tokens` are split over all ranks.

    Attributes:
        sampler: Sampler of complete steps, the same on all ranks.
        cost_fn: Function from a corpus index to the cost of the sample.
        num_tokens_fn: Function from a corpus index to the number of tokens; None never splits
            samples.
    """

    sampler: StepSampler
    process_group: ProcessGroup
    cost_fn: Callable[[int], float]
    num_tokens_fn: Callable[[int], int] | None
    pack_tokens: int

    def __len__(self) -> int:
        return len(self.sampler)

    def batch_indices(self, step: int) -> Sequence[int]:
        indices = [index for index in self.sampler.batch_indices(step) if not self._is_split(index)]
        costs = [self.cost_fn(index) for index in indices]
        shares = assign_to_ranks(costs, self.process_group.world_size)
        if self.process_group.rank >= len(shares):
            return []
        own_share = shares[self.process_group.rank]
        return [indices[position] for position in own_share]

    def split_indices(self, step: int) -> Sequence[int]:
        """Return the corpus indices of a step's split samples, in order."""
        return [index for index in self.sampler.batch_indices(step) if self._is_split(index)]

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
        if self.num_tokens_fn is None or max_tokens is None:
            return False
        return self.num_tokens_fn(index) > max_tokens
