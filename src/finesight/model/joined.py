"""A frozen weight and the up-projections of its adapter in one matrix: one product computes both.

[x | low] [W | B]^T = x W^T + low B^T, and dy [W | B] = [dx | dlow], where `low` is what the adapter
makes of `x`. Shapes: O outputs, I inputs, S ranks of all layers of the weight, R of one of them,
J inputs and room for ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finesight.model.frozen import KERNELS
from finesight.model.runs import upload

if KERNELS:
    from finesight.model import lora_kernels

_ROOM = 64
"""Of which the columns beside a weight are a multiple: tensor cores read rows that begin at
multiples of 128 bytes."""


def room(ranks: int) -> int:
    """Columns beside a weight for so many ranks."""
    return -(-ranks // _ROOM) * _ROOM


class Beside(NamedTuple):
    """An up-projection [O, R], the rows of its layer and the columns of its ranks."""

    b_OR: Tensor
    outputs: slice
    ranks: slice


class Pair(NamedTuple):
    """An up-projection and the place of its copy."""

    b_OR: Tensor
    place_OR: Tensor


class Joined:
    """[W | B]. A layer's B stands in its rows and in the columns of its ranks; elsewhere there are
    zeros. The weight lies here from now on; B learns elsewhere, and is copied by `lay`."""

    @torch.no_grad()
    def __init__(self, weight: nn.Parameter, ranks: int, beside: Sequence[Beside]) -> None:
        outputs, inputs = weight.shape
        self.weight_OJ = weight.new_zeros(outputs, inputs + room(ranks))
        self.weight_OJ[:, :inputs] = weight
        weight.data = self.weight_OJ[:, :inputs]
        self.pairs: list[Pair] = []
        for b_OR, rows, columns in beside:
            place_OR = self.weight_OJ[rows, inputs:][:, columns]
            place_OR.copy_(b_OR)
            assert b_OR.dtype == weight.dtype, f"an adapter in {b_OR.dtype}"
            self.pairs.append(Pair(b_OR, place_OR))

    def holds(self, weight: Tensor) -> bool:
        """Whether this weight lies here."""
        return self.weight_OJ.data_ptr() == weight.data_ptr()


class Laying:
    """Copies what was learned since to its places, of all weights in one kernel, before a pass."""

    def __init__(self) -> None:
        self._key: list[int] = []
        self._table_P5 = torch.empty(0)
        self._most = 0, 0

    @torch.no_grad()
    def lay(self, all_joined: Sequence[Joined]) -> None:
        """The up-projections of these, wherever they lie now."""
        pairs = [pair for joined in all_joined for pair in joined.pairs]
        if not pairs:
            return
        key = [tensor.data_ptr() for pair in pairs for tensor in pair]
        if key != self._key:
            self._key = key
            self._most = tuple(
                max(sizes) for sizes in zip(*(pair.b_OR.shape for pair in pairs), strict=True)
            )
            ends = zip(key[::2], key[1::2], strict=True)
            rows = [
                (*own, *pair.b_OR.shape, pair.place_OR.stride(0))
                for own, pair in zip(ends, pairs, strict=True)
            ]
            self._table_P5 = upload(np.array(rows, dtype=np.int64), pairs[0].b_OR.device)
        lora_kernels.laid(self._table_P5, *self._most, pairs[0].b_OR)
