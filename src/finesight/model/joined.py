"""A frozen weight and the up-projections of its adapter in one matrix: one product computes both.

[x | low] [W | B]^T = x W^T + low B^T, and dy [W | B] = [dx | dlow], where `low` is what the adapter
makes of `x`. Without an adapter, a matrix whose rows begin where tensor cores want them.

Shapes: O outputs, I inputs, S ranks of all layers of the weight, R of one of them, J inputs, ranks
and room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finesight.model.frozen import KERNELS
from finesight.model.linear import GroupedLinear
from finesight.model.runs import upload

if KERNELS:
    from finesight.model.kernels import lora as lora_kernels

_MULTIPLE = 64
"""Of which the columns are a multiple: tensor cores read rows that begin at multiples of 16 bytes,
and quickest where of 128."""


def room(inputs: int, ranks: int) -> int:
    """Columns beside a weight of so many inputs for so many ranks."""
    return -(-(inputs + ranks) // _MULTIPLE) * _MULTIPLE - inputs


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

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, weight: nn.Parameter, ranks: int, beside: Sequence[Beside]) -> None:
        outputs, inputs = weight.shape
        self.weight_OJ = weight.new_zeros(outputs, inputs + room(inputs, ranks))
        self.weight_OJ[:, :inputs] = weight
        weight.data = self.weight_OJ[:, :inputs]
        self.pairs: list[Pair] = []
        for b_OR, rows, own in beside:
            place_OR = self.weight_OJ[rows, inputs:][:, own]
            place_OR.copy_(b_OR)
            assert b_OR.dtype == weight.dtype, f"an adapter in {b_OR.dtype}"
            self.pairs.append(Pair(b_OR, place_OR))

    def holds(self, weight: Tensor, beside: Sequence[Beside]) -> bool:
        """Whether this weight lies here, beside these very up-projections."""
        own = [pair.b_OR for pair in self.pairs]
        same = len(own) == len(beside) and all(
            one is other.b_OR for one, other in zip(own, beside, strict=True)
        )
        return same and self.weight_OJ.data_ptr() == weight.data_ptr()


def joined(group: GroupedLinear, ranks: int = 0, beside: Sequence[Beside] = ()) -> Joined:
    """Where the frozen weight of a group lies beside these up-projections, from the first call on.
    Whoever changes them lays them there again."""
    weight = group.weight
    assert isinstance(weight, nn.Parameter), f"{type(weight).__name__} beside up-projections"
    known = group.joined
    if not (isinstance(known, Joined) and known.holds(weight, beside)):
        known = group.joined = Joined(weight, ranks, beside)
    return known


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
