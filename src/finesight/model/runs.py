"""Segments of a pack in batches: those of one length together, or of like length, padded.

Shapes: T tokens of the pack, P places of the batches end to end, X places of all heads, Y some of
them.
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

LIKE, EVEN = 2, 64
"""Segments share a padded batch where the longest is at most `LIKE` times the shortest, and are
filled up to a multiple of `EVEN`: few sizes, which come again from pack to pack. For each new one a
CPU builds its kernels anew, which costs more than the products with what was filled in."""


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """The array on `device`, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Rows(NamedTuple):
    """Where the heads of all tokens stand once the heads of a segment stand one after the other.

    Both sides are rows, a head of a token each: `order_X` brings them into their places, `back_Y`
    back. `idle_Y` are the places of nothing and of copies; None where there are none. Each of the
    first rows stands in copies, too, those of a row of `copies_RC`; None where there are none.
    """

    order_X: Tensor
    back_Y: Tensor
    idle_Y: Tensor | None
    copies_RC: Tensor | None


@dataclass(frozen=True)
class Runs:
    """Batches end to end: `(length, count)` pairs.

    `order_T` brings the tokens into their places and `back_T` the places into the order of the
    tokens; both None where the segments already stand so. `padding_P` is True at the places after
    the end of a segment, which hold any token, and `copied_P` at those of a token that stands
    elsewhere, too; None where there are none.
    """

    lengths: tuple[tuple[int, int], ...]
    order_T: Tensor | None = None
    back_T: Tensor | None = None
    padding_P: Tensor | None = None
    copied_P: Tensor | None = None
    _rows: dict[int, Rows] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def places(self) -> int:
        """Of all batches, padding included."""
        return sum(length * count for length, count in self.lengths)

    def rows(self, heads: int) -> Rows:
        """The places of so many heads; every layer of a pack asks for the same."""
        if heads not in self._rows:
            self._rows[heads] = self._rows_of(heads)
        return self._rows[heads]

    def _rows_of(self, heads: int) -> Rows:
        order_P = torch.arange(self.places) if self.order_T is None else self.order_T
        order_X = self._by_head(order_P * heads, torch.arange(heads))
        padding_X, copied_X = (
            self._by_head(
                torch.zeros(self.places, dtype=torch.bool) if marked_P is None else marked_P,
                torch.zeros(heads, dtype=torch.bool),
            )
            for marked_P in (self.padding_P, self.copied_P)
        )
        idle_X, copies_RC = padding_X | copied_X, None
        real_Y, idle_Y = (~idle_X).nonzero().squeeze(1), idle_X.nonzero().squeeze(1)
        back_Y = torch.empty_like(real_Y)
        back_Y[order_X[real_Y]] = real_Y
        if self.copied_P is not None:
            copied_Y = copied_X.nonzero().squeeze(1)
            by_row = order_X[copied_Y].argsort(stable=True)
            copies_RC = copied_Y[by_row].view(int(order_X[copied_Y].max()) + 1, -1)
        return Rows(order_X, back_Y, idle_Y if len(idle_Y) else None, copies_RC)

    def _by_head(self, values_P: Tensor, added_H: Tensor) -> Tensor:
        """Values of places, once for each head of a segment, plus what is added for that head."""
        parts = torch.split(values_P, [length * count for length, count in self.lengths])
        lengths = (length for length, _ in self.lengths)
        pieces = (
            (part.view(-1, 1, length) + added_H[:, None]).flatten()
            for part, length in zip(parts, lengths, strict=True)
        )
        return torch.cat([*pieces])


def alike(lengths: Sequence[int], device: torch.device) -> Runs:
    """Batches of segments of one length, the tokens reordered only if that makes fewer."""
    inline = _counted(lengths)
    if len(inline) == len(set(lengths)):
        return Runs(inline)
    of_S = np.array(lengths)
    by_length = np.argsort(of_S, kind="stable")
    order = _places(of_S, by_length, of_S[by_length])
    back = np.argsort(order)
    return Runs(_counted(of_S[by_length].tolist()), upload(order, device), upload(back, device))


def padded(lengths: Sequence[int], device: torch.device) -> Runs:
    """Batches of segments of like length, all segments of a batch filled up to one."""
    of_S = np.array(lengths)
    by_length = np.argsort(of_S, kind="stable")
    sorted_S = of_S[by_length]
    room_S = np.empty_like(sorted_S)
    stop = len(room_S)
    while stop:
        longest = sorted_S[stop - 1]
        start = np.searchsorted(sorted_S * LIKE, longest)
        room_S[start:stop] = -(-longest // EVEN) * EVEN
        stop = int(start)
    if np.array_equal(room_S, sorted_S):
        return alike(lengths, device)
    order = _places(of_S, by_length, room_S)
    within = np.arange(room_S.sum()) - np.repeat(np.cumsum(room_S) - room_S, room_S)
    padding = within >= np.repeat(sorted_S, room_S)
    order[padding] = 0
    real = np.flatnonzero(~padding)
    back = real[np.argsort(order[real])]
    tensors = (upload(array, device) for array in (order, back, padding))
    return Runs(_counted(room_S.tolist()), *tensors)


def branched(lengths: Sequence[int]) -> Runs:
    """Batches of segments that go on from the first one, whose tokens stand before those of each:
    as `padded`, on the CPU. They are real in the second one, which comes after it, and copies in
    those that follow."""
    trunk, *others = lengths
    whole = [trunk + length for length in others]
    starts = np.cumsum([trunk, *others[:-1]])
    at_M = np.concatenate(
        [
            np.concatenate([np.arange(trunk), np.arange(start, start + length)])
            for start, length in zip(starts, others, strict=True)
        ]
    )
    inside_M = np.concatenate([np.arange(length) for length in whole])
    copied_M = (inside_M < trunk) & (np.arange(len(at_M)) >= whole[0])
    runs = padded(whole, torch.device("cpu"))
    order_P = torch.arange(len(at_M)) if runs.order_T is None else runs.order_T
    copied_P = torch.from_numpy(copied_M)[order_P]
    if runs.padding_P is not None:
        copied_P &= ~runs.padding_P
    found = copied_P if bool(copied_P.any()) else None
    return replace(runs, order_T=torch.from_numpy(at_M)[order_P], back_T=None, copied_P=found)


def _counted(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((length, len(list(group))) for length, group in groupby(lengths))


def _places(
    of_S: NDArray[np.int64], by_length: NDArray[np.int64], room_S: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each place the token that stands there: segments in the order `by_length`, each with
    its room."""
    starts = np.cumsum(of_S) - of_S
    new_starts = np.cumsum(room_S) - room_S
    order: NDArray[np.int64] = np.repeat(starts[by_length] - new_starts, room_S)
    return order + np.arange(len(order))
