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

from finesight.config import TrainSettings
from finesight.train.oom import max_unsplit_packs
from finesight.train.parallel.distributed import ProcessGroup

if TYPE_CHECKING:
    from finesight.data.corpus import Corpus

_WITHIN_SOURCE, _ACROSS_SOURCES = 0, 1


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
        self._sizes, self._seed = tuple(sizes), seed
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
            self._epoch, self._indices = epoch, self.epoch_indices(epoch)
        return int(self._indices[offset])

    def epoch_indices(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample indices of an epoch in order, int64 of shape [epoch_length]."""
        starts = enumerate(accumulate(self._sizes[:-1], initial=0))
        source_indices = [start + self._epoch_slice(source, epoch) for source, start in starts]
        order = _random_permutation(self.epoch_length, self._seed, _ACROSS_SOURCES, epoch)
        return np.concatenate(source_indices)[order]

    def _epoch_slice(self, source: int, epoch: int) -> NDArray[np.int64]:
        size, count = self._sizes[source], self._samples_per_epoch[source]
        start, stop = epoch * count, (epoch + 1) * count
        passes = range(start // size, -(-stop // size))
        pass_indices = [
            _random_permutation(size, self._seed, _WITHIN_SOURCE, source, pass_index)
            for pass_index in passes
        ]
        offset = passes.start * size
        return np.concatenate(pass_indices)[start - offset : stop - offset]


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
        ends = [bisect_left(indices, end) for end in accumulate(corpus.source_sizes)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        non_empty = [
            (size, weight) for size, weight in zip(sizes, corpus.weights, strict=True) if size
        ]
        self._indices, self._batch_size = indices, train.batch_size
        self._order = SampleOrder([s for s, _ in non_empty], [w for _, w in non_empty], train.seed)
        self.epoch_length = self._order.epoch_length
        epochs = 1.0 if train.epochs is None else train.epochs
        self.num_samples = (
            train.steps * train.batch_size
            if train.steps is not None
            else max(1, round(epochs * self.epoch_length))
        )

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
        self._indices, self._batch_size = indices, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._indices) / self._batch_size)

    def batch_indices(self, step: int) -> Sequence[int]:
        return self._indices[step * self._batch_size : (step + 1) * self._batch_size]


def assign_to_ranks(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign items to ranks with balanced costs.

    Items are assigned in order of decreasing cost to the rank with the lowest load. Returns the
    ascending positions of each rank, without the last ranks if there are more ranks than items.
    """
    loads = [(0.0, 0, rank) for rank in range(min(num_ranks, len(costs)))]
    heapify(loads)
    positions: list[list[int]] = []
    for _ in loads:
        positions.append([])
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
        max_tokens, num_tokens_fn = self.max_unsplit_tokens, self.num_tokens_fn
        return bool(num_tokens_fn and max_tokens and num_tokens_fn(index) > max_tokens)
