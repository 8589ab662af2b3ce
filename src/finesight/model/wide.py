"""The products of a group of linear layers side by side, with what adapters add, forwards and
backwards: what `model.fused_layer` is made of.

Shapes: T rows, I inputs, O outputs of a group's layers side by side, S ranks of a group, R ranks of
a layer, J columns of an input and of what is joined to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.fp8 import Rows, takes_rows
from finesight.model.frozen import FrozenWeight
from finesight.model.joined import Joined, joined
from finesight.model.linear import GroupedLinear, joint_product, joint_product_back
from finesight.model.lora import LoraGroup
from finesight.model.updates import add_update

_PLACES: list[Callable[[Tensor], Tensor | None]] = []
"""Of all threads: autograd goes back in its own."""


@contextmanager
def gradients_laid(place: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within the block, gradients by weights are written where `place` says for the weight; None
    for one that gets a tensor of its own. No weight may be read by two products of a pass: the
    second gradient would stand where the first one is."""
    _PLACES.append(place)
    try:
        yield
    finally:
        _PLACES.pop()


def joined_of(group: GroupedLinear) -> Joined | None:
    """Where a weight lies beside the up-projections of its adapter, if it is one that can."""
    adapter = group.adapter
    dense = isinstance(group.weight, nn.Parameter) and not group.apart
    if dense and isinstance(adapter, LoraGroup):
        return joined(group, len(adapter.a), adapter.beside())
    return None


class Wide(NamedTuple):
    """A group of so many linear layers of inputs of this width: the weight, the up-projections of
    its adapter, and both in one matrix where they can be (see `model.joined`)."""

    width: int
    layers: int
    weight: Tensor | FrozenWeight
    bias: Tensor | None
    joined_OJ: Tensor | None
    ups_OR: tuple[Tensor, ...]

    @classmethod
    def of(cls, group: GroupedLinear) -> Wide:
        """That of this group."""
        fixed = group.inputs, len(group.outputs), group.weight, group.bias
        if not isinstance(group.adapter, LoraGroup):
            return cls(*fixed, None, ())
        beside = joined_of(group)
        whole = None if beside is None else beside.weight_OJ
        return cls(*fixed, whole, tuple(group.adapter.b.values()))

    @property
    def learns(self) -> bool:
        """Whether its weight does."""
        return isinstance(self.weight, Tensor) and self.weight.requires_grad

    @property
    def room(self) -> int:
        """Columns behind those of an input, for what the adapter makes of it."""
        return 0 if self.joined_OJ is None else self.joined_OJ.shape[1] - self.width

    @property
    def takes_rows(self) -> bool:
        """Whether the input of `forth` may be in FP8 already."""
        return takes_rows(self.weight)

    @property
    def inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as autograd has to see them: where they learn."""
        weight = self.weight if isinstance(self.weight, Tensor) and self.learns else None
        return weight, self.bias if self.bias is not None and self.bias.requires_grad else None

    def forth(self, x_TJ: Tensor | Rows, low_TS: Tensor | None) -> Tensor:
        """x W^T + bias of all layers side by side, and what the adapter adds."""
        if self.joined_OJ is not None and isinstance(x_TJ, Tensor):
            return F.linear(x_TJ, self.joined_OJ, self.bias)
        y_TO = joint_product(x_TJ, self.weight, self.bias)
        for y, low_TR, b_OR in self._layers(y_TO, low_TS):
            add_update(y, low_TR, b_OR)
        return y_TO

    def added(self, x_TO: Tensor, h_TJ: Tensor, low_TS: Tensor | None) -> Tensor:
        """x plus what `forth` gives for `h`."""
        weight = self.weight if self.joined_OJ is None else self.joined_OJ
        whole = self.joined_OJ is not None or not self.ups_OR
        if whole and self.bias is None and isinstance(weight, Tensor):
            return torch.addmm(x_TO, h_TJ, weight.T)
        return self.forth(h_TJ, low_TS).add_(x_TO)

    def back(self, dy_TO: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients by the input and by what the adapter made of it."""
        if self.joined_OJ is None:
            return joint_product_back(dy_TO, self.weight), self.low_back(dy_TO)
        ranks = sum(b_OR.shape[1] for b_OR in self.ups_OR)
        dx_TJ = dy_TO @ self.joined_OJ
        return dx_TJ[:, : self.width], dx_TJ[:, self.width : self.width + ranks]

    def low_back(self, dy_TO: Tensor) -> Tensor | None:
        """The second of `back` alone."""
        sides = [dy @ b_OR for dy, _, b_OR in self._layers(dy_TO, None)]
        return torch.cat(sides, 1) if sides else None

    def up_grads(self, dy_TO: Tensor, low_TS: Tensor | None) -> list[Tensor] | list[None]:
        """The gradients by `ups_OR`, or as many times nothing."""
        if not self.ups_OR:
            return [None] * self.layers
        return [dy.T @ low_TR for dy, low_TR, _ in self._layers(dy_TO, low_TS)]

    def _layers(
        self, y_TO: Tensor, low_TS: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A layer's columns, those of its ranks (of `y`, where there is no `low`), and its B."""
        if not self.ups_OR:
            return
        ys = torch.split(y_TO, [len(b_OR) for b_OR in self.ups_OR], 1)
        lows = ys if low_TS is None else low_TS.chunk(len(self.ups_OR), 1)
        yield from zip(ys, lows, self.ups_OR, strict=True)

    def gradients(self, dy_TO: Tensor, x_TI: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Those of `inputs`: dy^T x, and the sum of dy."""
        weight, bias = self.inputs
        assert weight is None or x_TI is not None, "a weight learns of an input that is not kept"
        dw_OI = None if weight is None or x_TI is None else _weights(weight, dy_TO, x_TI)
        # As a product: torch's sum of many rows takes more memory than the rows.
        return dw_OI, None if bias is None else (dy_TO.new_ones(1, len(dy_TO)) @ dy_TO)[0]


def _weights(weight: Tensor, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """The gradient by a weight, in its place if it has one."""
    place_OI = _PLACES[-1](weight) if _PLACES else None
    return torch.mm(dy_TO.T, x_TI, out=place_OI)
