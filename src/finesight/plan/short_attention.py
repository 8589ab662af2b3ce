"""What attention in plain products takes (`model.short_attention`), in bytes: what it keeps, and
what it makes for a moment, forwards and on the way back.

Whoever makes it come and go with other tensors changes this; tests/plan/test_short_attention.py
counts what it really allocates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from finesight.model.runs import Runs

NUMBER, WIDE = torch.bfloat16.itemsize, torch.float32.itemsize
"""Bytes of a number that comes or goes, and of one that scores are computed in."""


@dataclass(frozen=True, slots=True)
class ShortAttention:
    """Over the batches of a pack of so many tokens: so many numbers of a row's queries, and as many
    of its keys as of its values, in `heads` heads."""

    queries: int
    shared: int
    heads: int
    causal: bool
    tokens: int
    runs: Runs

    @property
    def kept(self) -> int:
        """Copies of queries, keys and values, and all weights."""
        return NUMBER * (self._rows * self._inputs + sum(scores for _, scores in self._batches()))

    @property
    def forth(self) -> int:
        """The most at once on the way forward, what is kept included."""
        ordered = NUMBER * self._rows * self._inputs * self._sorted
        most = made = 0
        for length, count in self.runs.lengths:
            rows, scores = self._sizes(length, count)
            made += NUMBER * rows * self._inputs
            mask = WIDE * length**2 * (self.queries // self.shared + self.causal)
            # Wide queries and keys beside their scores; then these beside their softmax, wide and
            # rounded.
            product = WIDE * (rows * (self.queries + self.shared) + scores)
            softmax = (2 * WIDE + NUMBER) * scores
            most = max(most, ordered + made + mask + max(product, softmax))
            made += NUMBER * (scores + rows * self.queries)
        # Outputs lie as tokens do, and then in one piece.
        return max(most, made + NUMBER * 2 * self._rows * self.queries)

    @property
    def back(self) -> int:
        """The most at once on the way back beside what is kept, the output's gradient included."""
        numbers = most = rows = scores = 0
        for length, count in self.runs.lengths:
            before = scores
            rows, scores = self._sizes(length, count)
            # Gradients of weights and of scores, while those of the batch before are still there.
            most = max(most, numbers + rows * self.queries + 2 * scores + before)
            numbers += rows * self._inputs
        # Three gradients are put in one piece each, one after the other.
        first = 2 * self._rows * self.queries
        last = self.tokens * (self.queries + self.shared) + 2 * self._rows * self.shared
        most = max(most, numbers + rows * self.queries + scores + max(first, last))
        given = self.queries * (self.tokens + self._rows * self._sorted)
        return NUMBER * (given + most)

    @property
    def _inputs(self) -> int:
        return self.queries + 2 * self.shared

    @property
    def _rows(self) -> int:
        return sum(rows for rows, _ in self._batches())

    @property
    def _sorted(self) -> bool:
        return self.runs.order_T is not None

    def _batches(self) -> Iterator[tuple[int, int]]:
        return (self._sizes(length, count) for length, count in self.runs.lengths)

    def _sizes(self, length: int, count: int) -> tuple[int, int]:
        """Rows of a batch, and numbers of its scores."""
        return length * count, self.heads * length**2 * count
