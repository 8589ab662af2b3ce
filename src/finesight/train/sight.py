"""What a recording of packs reads of their pictures, where the tower learns and is recorded, too.

What fills a pack's patches up are segments of nothing after its own: their features go to the
sequence of nothing, from which no gradient comes back.

Shapes: N patches, B bytes of a patch, M squares of merged patches, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.encode.encoded import Grid
from finesight.encode.pack import EVEN, PackedBatch
from finesight.model.attention import Segments
from finesight.model.lora import LoraGroup
from finesight.model.network import VisionLanguageModel
from finesight.model.tower import Route, VisionTower, each_once

MOST_PATCHES = 4096
"""Of a pack whose kernels in a tower take no longer than their launches, on an H200 and a quick
host. With more there is little to gain, and a recording holds all that the tower keeps."""

HEADS = 8
"""Of which the numbers of a head are a multiple where `model.attention.has_varlen`."""


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def watches(model: VisionLanguageModel) -> bool:
    """Whether recordings may have the tower in them: one that learns, of whose pass nothing but its
    route hangs on the pictures' sizes, that draws no random numbers, and whose attention takes the
    lengths of segments from the device."""
    tower = model.visual
    if not tower.recordable or tower.geometry.head_width % HEADS:
        return False
    groups = (module for module in tower.modules() if isinstance(module, LoraGroup))
    draws = any(group.dropout for group in groups)
    return not draws and any(parameter.requires_grad for parameter in tower.parameters())


def sees(patches: int, recompute: float) -> bool:
    """Whether such a tower is in the recording of a pack with so many patches, this share of its
    layers being made again on the way back."""
    return 0 < patches <= MOST_PATCHES and not recompute


class SightKind(NamedTuple):
    """Sizes of what is read: patches, the bytes of one, and for each way in which they are divided
    into segments how many there are, and the longest."""

    patches: int
    bytes: int
    ways: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, batch: PackedBatch, tower: VisionTower) -> SightKind:
        """That of a pack's pictures."""
        patches, numbers = batch.patches_ND.shape
        return cls.around(tower, batch.grids, patches, numbers)

    @classmethod
    def around(
        cls, tower: VisionTower, grids: Sequence[Grid], patches: int, numbers: int
    ) -> SightKind:
        """That of pictures of these grids, which have so many patches of so many bytes."""
        step, ways = EVEN * tower.geometry.merge**2, []
        for lengths in each_once(tower.divided(grids)):
            longest = up(max(lengths), EVEN)
            most = len(lengths) + -(-step // longest)
            ways.append((up(most, max(8, (1 << most.bit_length()) // 16)), longest))
        return cls(up(patches, step), numbers, tuple(ways))


@dataclass(frozen=True)
class Sight:
    """Room for the patches of a pack and their way."""

    kind: SightKind
    patches_NB: Tensor
    route: Route

    @classmethod
    def room(cls, kind: SightKind, batch: PackedBatch, tower: VisionTower) -> Sight:
        """For packs of this kind, of which this is one."""
        patches, device = kind.patches, batch.patches_ND.device
        route = tower.route(batch.grids, device)
        ways = [
            Segments((longest,) * count, _whole(count + 1, device, torch.int32), longest)
            for count, longest in kind.ways
        ]
        places = [id(segments) for segments in each_once(route.segments)]
        order_M = None
        if route.order_M is not None:
            order_M = _whole(patches // tower.geometry.merge**2, device, torch.int64)
        return cls(
            kind,
            batch.patches_ND.new_zeros(patches, kind.bytes),
            Route(
                positions_N2=_whole(patches, device, route.positions_N2.dtype, 2),
                segments=tuple(ways[places.index(id(own))] for own in route.segments),
                order_M=order_M,
                back_M=None if order_M is None else torch.zeros_like(order_M),
            ),
        )

    @torch.no_grad()
    def lay(self, batch: PackedBatch, tower: VisionTower) -> None:
        """Put a pack's pictures where the recording reads them; nothing waits."""
        patches, route = len(batch.patches_ND), tower.route(batch.grids, batch.patches_ND.device)
        self.patches_NB[:patches].copy_(batch.patches_ND)
        self.patches_NB[patches:].zero_()
        self.route.positions_N2[:patches].copy_(route.positions_N2)
        self.route.positions_N2[patches:].zero_()
        ways = each_once(self.route.segments), each_once(route.segments)
        for held, own in zip(*ways, strict=True):
            _divide(held, own, patches, self.kind.patches)
        pairs = (self.route.order_M, route.order_M), (self.route.back_M, route.back_M)
        for room, order_M in pairs:
            if room is not None and order_M is not None:
                squares = len(order_M)
                room[:squares].copy_(order_M)
                room[squares:].copy_(torch.arange(squares, len(room), device=room.device))

    def features(self, tower: VisionTower) -> Tensor:
        """Of all squares, those of what fills them up last [M, K, D]."""
        features_MKD: Tensor = tower(self.patches_NB, (), route=self.route)
        return features_MKD


def _divide(held: Segments, own: Segments, patches: int, whole: int) -> None:
    """The bounds of a pack's segments, of such of nothing as long as they may be, and of empty
    ones."""
    count = len(own.lengths)
    held.bounds_S1[: count + 1].copy_(own.bounds_S1)
    rest = len(held.bounds_S1) - count - 1
    ends = torch.arange(1, rest + 1, device=held.bounds_S1.device, dtype=torch.int32)
    held.bounds_S1[count + 1 :].copy_((ends * held.longest + patches).clamp_(max=whole))


def _whole(rows: int, device: torch.device, dtype: torch.dtype, *more: int) -> Tensor:
    return torch.zeros(rows, *more, dtype=dtype, device=device)
