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
from finesight.model.short_attention import AT_ONCE

NUMBER, WIDE, INDEX = torch.bfloat16.itemsize, torch.float32.itemsize, torch.int64.itemsize
"""Bytes of a number that comes or goes, of one that scores are computed in, and of a place."""

COLUMNS = 1 << 18
"""About so many numbers oneDNN lays anew of a large matrix that it reads by columns."""


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
        return NUMBER * (self._rows * self._inputs + self._scores)

    @property
    def places(self) -> int:
        """Bytes of where the rows of all heads go, and where they come back: those of queries, and
        those of keys where these are fewer."""
        grouped = self.shared < self.queries
        heads = self.heads + grouped * self.heads * self.shared // self.queries
        return 2 * INDEX * heads * self._rows

    @property
    def forth(self) -> int:
        """The most at once on the way forward, what is kept included."""
        ordered = NUMBER * self._rows * (self._inputs + self.queries)
        most = weights = 0
        for length, count in self.runs.lengths:
            rows, scores = self._sizes(length, count)
            weights += NUMBER * scores
            softmax = max(self._softmax(length, count))
            most = max(most, weights + WIDE * (rows * self.shared + AT_ONCE**2) + softmax)
        # Outputs as tokens lie, at last.
        return ordered + max(most, weights + NUMBER * self.tokens * self.queries)

    @property
    def back(self) -> int:
        """The most at once on the way back beside what is kept, the output's gradient included."""
        ordered = self._rows * (self.queries + self._inputs)
        most = max(
            self._sizes(length, count)[1] + self._columns(length)
            for length, count in self.runs.lengths
        )
        # Gradients as tokens lie, at last.
        most = max(most, self.tokens * self._inputs)
        return NUMBER * (self.tokens * self.queries + ordered + most)

    def _softmax(self, length: int, count: int) -> Iterator[int]:
        """What some queries of a batch take in fp32, with their scores."""
        for start in range(0, length, AT_ONCE) if self.causal else (0,):
            stop = min(start + AT_ONCE, length) if self.causal else length
            yield WIDE * count * (stop - start) * (self.queries + self.heads * stop)

    def _columns(self, length: int) -> int:
        """Numbers that oneDNN lays anew, on each thread, to read weights by columns."""
        rows = length * self.queries // self.shared
        return torch.get_num_threads() * min(COLUMNS, rows * (length + self.queries // self.heads))

    @property
    def _inputs(self) -> int:
        return self.queries + 2 * self.shared

    @property
    def _rows(self) -> int:
        return sum(rows for rows, _ in self._batches())

    @property
    def _scores(self) -> int:
        return sum(scores for _, scores in self._batches())

    def _batches(self) -> Iterator[tuple[int, int]]:
        return (self._sizes(length, count) for length, count in self.runs.lengths)

    def _sizes(self, length: int, count: int) -> tuple[int, int]:
        """Rows of a batch, and numbers of its scores."""
        return length * count, self.heads * length**2 * count
