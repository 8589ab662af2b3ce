"""Layers one after the other: what they keep of a pack, and their fullest moments, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from finesight.model.language import DecoderLayer
from finesight.model.layers import recomputed
from finesight.plan.fused_layer import FusedLayer
from finesight.plan.kept import Computing, Kept, Place
from finesight.plan.layer import of_layer

Layer: TypeAlias = Kept | FusedLayer


def layer_of(layer: nn.Module, reached: bool, computing: Computing) -> Layer:
    """A layer as the model would compute it; `reached`: its input has a gradient."""
    if computing.fused and isinstance(layer, DecoderLayer) and layer.fusible:
        return FusedLayer.of(layer, reached, computing)
    return of_layer(layer, reached, computing)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers, of which the first `again` are recomputed."""

    layers: tuple[Layer, ...]
    again: int

    @classmethod
    def of(
        cls, layers: Iterable[nn.Module], reached: bool, computing: Computing, recompute: float
    ) -> Stack:
        """Their gradients begin where the first of them learns."""
        found: list[Layer] = []
        for layer in layers:
            found.append(layer_of(layer, reached, computing))
            reached = found[-1].leaves
        return cls(tuple(found), recomputed(recompute, len(found)))

    @property
    def leaves(self) -> bool:
        """Whether a gradient comes to the last one's output."""
        return self.layers[-1].leaves

    @property
    def looks(self) -> bool:
        """Whether any keeps what its attention needs; recomputed ones hold the angles too."""
        return any(layer.looks for layer in self.layers)

    def sorting(self, lengths: Sequence[int], computing: Computing) -> int:
        """Bytes of the places that tokens are sorted by, which all layers share."""
        layers = (layer for layer in self.layers if isinstance(layer, Kept))
        looks = (layer.look for layer in layers if layer.look is not None)
        return max((look.sorting(lengths, computing) for look in looks), default=0)

    @property
    def stays(self) -> int:
        """What is there from the first pack on beside the weights."""
        return sum(layer.stays for layer in self.layers)

    def kept(self, places: Sequence[Place]) -> list[int]:
        """Bytes of each layer."""
        return [
            place.tokens * layer.entering if number < self.again else layer.of_pack(place)
            for number, (layer, place) in enumerate(zip(self.layers, places, strict=True))
        ]

    def leading(self) -> list[int]:
        """Layers whose way forward may be the fullest moment: the last ones that are not made again
        on the way back, beside a gradient."""
        last = len(self.layers) - 1
        return [number for number in (last - 1, last) if number >= self.again]

    def telling(self) -> list[int]:
        """Layers whose way back may be the fullest moment: the first ones that it meets, the first
        that is made again and the one before it, and the last one, when all gradients have come."""
        last = len(self.layers) - 1
        found = {last, last - 1, self.again, self.again - 1, 0}
        return [number for number in sorted(found, reverse=True) if 0 <= number <= last]

    def going_forth(self, number: int, places: Sequence[Place]) -> int:
        """Bytes that the forward pass of a layer works with beside what it keeps."""
        return max(0, self.layers[number].going_forth(places[number]))

    def going_back(self, number: int, places: Sequence[Place]) -> int:
        """Bytes that the backward pass of a layer works with, less what it has freed by then."""
        layer, place = self.layers[number], places[number]
        working = layer.going_back(place)
        if number < self.again:
            again = layer.going_forth(place) + place.rows * layer.entering
            # Its input is there already.
            anew = layer.of_pack(place) - place.tokens * layer.entering * layer.has_input
            working = anew + max(working, again)
        return max(0, working)
