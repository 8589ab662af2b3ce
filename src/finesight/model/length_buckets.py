"""Buckets of packed segments with equal or similar length.

Attention without a variable-length kernel processes each bucket as one batch.

Shapes: T tokens of the packed batch, P positions of the concatenated buckets, H heads, X rows
(heads of positions), Y a subset of them, S segments, M tokens of sequences with their shared
prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.packing import copy_to_device

MAX_LENGTH_RATIO, LENGTH_MULTIPLE = 2, 64
"""Maximum length ratio of the segments in a padded bucket, and divisor of its padded length.

Few distinct lengths remain, which recur between packed batches. A CPU rebuilds its kernels for each
new size, which costs more than the padding.
"""


class HeadRowIndices(NamedTuple):
    """Row indices that group the heads of each segment.

    Attributes:
        order_X: Row at each bucket position.
        inverse_Y: Bucket position of each row.
        padding_Y: Positions of padding and duplicates; None if there are none.
        copies_RC: Positions of the C duplicates of each of the first R rows; None without
            duplicates.
    """

    order_X: Tensor
    inverse_Y: Tensor
    padding_Y: Tensor | None
    copies_RC: Tensor | None


@dataclass(frozen=True)
class LengthBuckets:
    """Buckets of segments, concatenated to one sequence of positions.

    Attributes:
        shapes: Segment length and number of segments of each bucket.
        order_T: Token at each position, any token for padding; None if the order is unchanged.
        inverse_T: Position of each token; None if the order is unchanged, or with a shared prefix.
        padding_P: Flags of positions after the end of a segment; None without padding.
        duplicate_P: Flags of positions with copies of tokens; None without duplicates.
    """

    shapes: tuple[tuple[int, int], ...]
    order_T: Tensor | None = None
    inverse_T: Tensor | None = None
    padding_P: Tensor | None = None
    duplicate_P: Tensor | None = None
    _head_rows_cache: dict[int, HeadRowIndices] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_positions(self) -> int:
        return sum(length * count for length, count in self.shapes)

    def head_rows(self, num_heads: int) -> HeadRowIndices:
        """Return the row indices for `num_heads` heads, cached for all layers."""
        if num_heads not in self._head_rows_cache:
            self._head_rows_cache[num_heads] = self._build_head_rows(num_heads)
        return self._head_rows_cache[num_heads]

    def _build_head_rows(self, num_heads: int) -> HeadRowIndices:
        order_P = torch.arange(self.num_positions) if self.order_T is None else self.order_T
        order_X = self._repeat_per_head(order_P * num_heads, torch.arange(num_heads))
        padding_X, duplicate_X = (
            self._repeat_per_head(
                torch.zeros(self.num_positions, dtype=torch.bool) if flags_P is None else flags_P,
                torch.zeros(num_heads, dtype=torch.bool),
            )
            for flags_P in (self.padding_P, self.duplicate_P)
        )
        unused_X, copies_RC = padding_X | duplicate_X, None
        real_Y, unused_Y = (~unused_X).nonzero().squeeze(1), unused_X.nonzero().squeeze(1)
        inverse_Y = torch.empty_like(real_Y)
        inverse_Y[order_X[real_Y]] = real_Y
        if self.duplicate_P is not None:
            duplicate_Y = duplicate_X.nonzero().squeeze(1)
            sorted_rows = order_X[duplicate_Y].argsort(stable=True)
            copies_RC = duplicate_Y[sorted_rows].view(int(order_X[duplicate_Y].max()) + 1, -1)
        return HeadRowIndices(order_X, inverse_Y, unused_Y if len(unused_Y) else None, copies_RC)

    def _repeat_per_head(self, values_P: Tensor, offsets_H: Tensor) -> Tensor:
        parts = torch.split(values_P, [length * count for length, count in self.shapes])
        lengths = (length for length, _ in self.shapes)
        repeated = (
            (part.view(-1, 1, length) + offsets_H[:, None]).flatten()
            for part, length in zip(parts, lengths, strict=True)
        )
        return torch.cat([*repeated])


def bucket_by_length(lengths: Sequence[int], device: torch.device) -> LengthBuckets:
    """Group segments of equal length; reorder tokens only if that reduces the number of buckets."""
    contiguous = _run_lengths(lengths)
    if len(contiguous) == len(set(lengths)):
        return LengthBuckets(contiguous)
    return _sort_segments(np.array(lengths), np.sort(lengths), device)


def bucket_with_padding(lengths: Sequence[int], device: torch.device) -> LengthBuckets:
    """Group segments of similar length into buckets and pad each bucket to one length."""
    sorted_S = np.sort(lengths)
    padded_S = np.empty_like(sorted_S)
    stop = len(padded_S)
    while stop:
        longest = sorted_S[stop - 1]
        start = np.searchsorted(sorted_S * MAX_LENGTH_RATIO, longest)
        padded_S[start:stop] = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        stop = int(start)
    if np.array_equal(padded_S, sorted_S):
        return bucket_by_length(lengths, device)
    return _sort_segments(np.array(lengths), padded_S, device)


def _sort_segments(
    lengths_S: NDArray[np.int64], padded_S: NDArray[np.int64], device: torch.device
) -> LengthBuckets:
    """Sort segments by length and pad them to `padded_S`, in ascending order."""
    by_length = np.argsort(lengths_S, kind="stable")
    starts = np.cumsum(lengths_S) - lengths_S
    within = np.arange(padded_S.sum()) - np.repeat(np.cumsum(padded_S) - padded_S, padded_S)
    order = np.repeat(starts[by_length], padded_S) + within
    padding = within >= np.repeat(lengths_S[by_length], padded_S)
    order[padding] = 0
    real = np.flatnonzero(~padding)
    inverse = real[np.argsort(order[real])]
    arrays = (order, inverse, padding) if padding.any() else (order, inverse)
    tensors = (copy_to_device(array, device) for array in arrays)
    return LengthBuckets(_run_lengths(padded_S.tolist()), *tensors)


def bucket_shared_prefix(lengths: Sequence[int]) -> LengthBuckets:
    """Build padded buckets of sequences with a shared prefix, on the CPU."""
    prefix_length, *suffix_lengths = lengths
    full_lengths = [prefix_length + length for length in suffix_lengths]
    starts = np.cumsum([prefix_length, *suffix_lengths[:-1]])
    source_M = np.concatenate(
        [
            np.concatenate([np.arange(prefix_length), np.arange(start, start + length)])
            for start, length in zip(starts, suffix_lengths, strict=True)
        ]
    )
    offset_M = np.concatenate([np.arange(length) for length in full_lengths])
    duplicate_M = (offset_M < prefix_length) & (np.arange(len(source_M)) >= full_lengths[0])
    buckets = bucket_with_padding(full_lengths, torch.device("cpu"))
    order_P = torch.arange(len(source_M)) if buckets.order_T is None else buckets.order_T
    duplicate_P = torch.from_numpy(duplicate_M)[order_P]
    if buckets.padding_P is not None:
        duplicate_P &= ~buckets.padding_P
    duplicates = duplicate_P if bool(duplicate_P.any()) else None
    return replace(
        buckets, order_T=torch.from_numpy(source_M)[order_P], inverse_T=None, duplicate_P=duplicates
    )


def _run_lengths(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(group))) for length, group in groupby(lengths))
