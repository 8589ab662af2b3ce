"""Which sample comes when: a pure function of (seed, epoch, position), with nothing to store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_WITHIN_SOURCE, _ACROSS_SOURCES = 0, 1


class Order:
    """The endless order in which training meets the samples of several sources.

    Each source is an endless row of passes, every pass its own permutation of all its samples.
    An epoch takes the next `ceil(weight * size)` of each row and mixes what it took: a weight of
    2 gives every sample twice an epoch, a weight of 0.5 a different half, so that two epochs
    cover all. Indices count the samples of all sources end to end, as in `Corpus`.

    Permutations sort the raw output of a Philox generator (Salmon et al. 2011), the part of
    numpy's random numbers that stays the same from release to release.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights), f"{len(sizes)} sizes for {len(weights)} weights"
        assert sizes, "an order of no sources"
        assert min(sizes) > 0, f"an empty source among sizes {list(sizes)}"
        assert min(weights) > 0, f"a weight that is not positive among {list(weights)}"
        self._sizes, self._seed = tuple(sizes), seed
        # As fractions of decimals, because 1.1 * 50 in floats is above 55.
        self._taken = tuple(
            math.ceil(Fraction(str(weight)) * size)
            for size, weight in zip(sizes, weights, strict=True)
        )
        self._epoch = -1
        self._indices: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def epoch_length(self) -> int:
        """Samples of an epoch, the same for every epoch."""
        return sum(self._taken)

    def index(self, position: int) -> int:
        """The sample at `position`, which counts samples from the first of epoch 0 on."""
        epoch, place = divmod(position, self.epoch_length)
        if epoch != self._epoch:
            self._epoch, self._indices = epoch, self.epoch_indices(epoch)
        return int(self._indices[place])

    def epoch_indices(self, epoch: int) -> NDArray[np.int64]:
        """All samples of an epoch in order: int64 [epoch_length]."""
        first = 0
        taken = []
        for source, size in enumerate(self._sizes):
            taken.append(first + self._take(source, epoch))
            first += size
        mixed = _permutation(self.epoch_length, self._seed, _ACROSS_SOURCES, epoch)
        return np.concatenate(taken)[mixed]

    def _take(self, source: int, epoch: int) -> NDArray[np.int64]:
        """What an epoch takes of a source's endless row of passes."""
        size, count = self._sizes[source], self._taken[source]
        start, stop = epoch * count, (epoch + 1) * count
        passes = range(start // size, -(-stop // size))
        row = [_permutation(size, self._seed, _WITHIN_SOURCE, source, turn) for turn in passes]
        offset = passes.start * size
        return np.concatenate(row)[start - offset : stop - offset]


def _permutation(size: int, *key: int) -> NDArray[np.int64]:
    return _places_by_size(np.random.Philox(np.random.SeedSequence(key)).random_raw(size))


def _places_by_size(draws_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where the numbers stand, from the least to the greatest, equal ones in their order: what
    `argsort(kind="stable")` gives, in a third of its time."""
    size = len(draws_N)
    shift = np.uint64(size.bit_length())
    # Upper bits with the place below them: sorting these moves no places about.
    packed_N = (draws_N >> shift << shift) | np.arange(size, dtype=np.uint64)
    packed_N.sort()
    places_N = (packed_N & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int64)
    packed_N >>= shift
    alike = np.flatnonzero(packed_N[1:] == packed_N[:-1])
    # The few that differ in the lower bits alone, run by run.
    for run in np.split(alike, np.flatnonzero(np.diff(alike) > 1) + 1):
        if len(run):
            some = slice(run[0], run[-1] + 2)
            places_N[some] = places_N[some][np.argsort(draws_N[places_N[some]], kind="stable")]
    return places_N
