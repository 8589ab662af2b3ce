"""Step samplers: map a step index to its samples, depending only on settings and seed.

They have no state, so a resumed run continues with the same samples.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from finesight.config import TrainSettings
from finesight.data.corpus import Corpus
from finesight.data.sample_order import SampleOrder


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
        train: Training settings.
    """

    def __init__(self, corpus: Corpus, indices: Sequence[int], train: TrainSettings) -> None:
        ends = [bisect_left(indices, end) for end in accumulate(corpus.source_sizes)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        non_empty = [
            (size, weight) for size, weight in zip(sizes, corpus.weights, strict=True) if size
        ]
        self._indices, self._batch_size = indices, train.batch_size
        self._order = SampleOrder(
            [s for s, _ in non_empty], [w for _, w in non_empty], train.data_seed
        )
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
        positions = range(
            step * self._batch_size, min((step + 1) * self._batch_size, self.num_samples)
        )
        return [self._indices[self._order.index_at(position)] for position in positions]


class SequentialSampler:
    """Sampler that returns every valid sample once, in order."""

    def __init__(self, indices: Sequence[int], batch_size: int) -> None:
        self._indices, self._batch_size = indices, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._indices) / self._batch_size)

    def batch_indices(self, step: int) -> Sequence[int]:
        return self._indices[step * self._batch_size : (step + 1) * self._batch_size]
