"""Which samples each optimiser step takes: a pure function of settings, seed and step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from finesight.config import Train
from finesight.data.order import Order
from finesight.data.sources import Corpus


class Members(Protocol):
    """Steps and the samples of each."""

    def __len__(self) -> int:
        """Number of steps."""
        ...

    def of(self, step: int) -> Sequence[int]:
        """Indices into the corpus, in order, of the step counted from 0."""
        ...


class Course:
    """All steps of a run, `train.batch` samples each; the last one may hold fewer.

    Steps count on over the ends of epochs, so a step may hold the last samples of one epoch and
    the first of the next. `kept` are the indices of usable samples, in order.
    """

    def __init__(self, corpus: Corpus, kept: Sequence[int], train: Train) -> None:
        ends = [bisect_left(kept, end) for end in accumulate(corpus.sizes)]
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        filled = [
            (size, weight) for size, weight in zip(sizes, corpus.weights, strict=True) if size
        ]
        self._kept, self._batch = kept, train.batch
        self._order = Order([s for s, _ in filled], [w for _, w in filled], train.data_seed)
        self.epoch_length = self._order.epoch_length
        epochs = 1.0 if train.epochs is None else train.epochs
        self.samples = (
            train.steps * train.batch
            if train.steps is not None
            else max(1, round(epochs * self.epoch_length))
        )

    def __len__(self) -> int:
        return math.ceil(self.samples / self._batch)

    def of(self, step: int) -> Sequence[int]:
        positions = range(step * self._batch, min((step + 1) * self._batch, self.samples))
        return [self._kept[self._order.index(position)] for position in positions]


class InOrder:
    """Every usable sample once, as it comes."""

    def __init__(self, kept: Sequence[int], batch: int) -> None:
        self._kept, self._batch = kept, batch

    def __len__(self) -> int:
        return math.ceil(len(self._kept) / self._batch)

    def of(self, step: int) -> Sequence[int]:
        return self._kept[step * self._batch : (step + 1) * self._batch]
