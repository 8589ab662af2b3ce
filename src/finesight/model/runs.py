"""Segments of a pack in batches: those of one length together, or of like length, padded.

Shapes: T tokens of the pack, P places of the batches end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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


@dataclass(frozen=True)
class Runs:
    """Batches end to end: `(length, count)` pairs.

    `order_T` brings the tokens into their places and `back_T` the places into the order of the
    tokens; both None where the segments already stand so. `padding_P` is True at the places after
    the end of a segment, which hold any token; None where there are none.
    """

    lengths: tuple[tuple[int, int], ...]
    order_T: Tensor | None = None
    back_T: Tensor | None = None
    padding_P: Tensor | None = None


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
