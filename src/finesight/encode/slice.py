"""One long sample shared out to several processes (sequence parallelism): each reads two stretches
of its tokens and looks at some of its pictures' frames.

The stretches are one from the front and one as far from the back, so that causal attention is as
much work for all (Llama Team 2024, arXiv:2407.21783, section 3.3.2).

Shapes: T tokens of the whole sample, M placeholder tokens of its pictures.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from finesight.encode.encoded import Grid, Outline
from finesight.encode.pack import PackedBatch

Stretch = tuple[int, int]
"""From the first one up to the last one, which is not in it."""


class Alone(NamedTuple):
    """A sample by itself, as its arithmetic hangs on it: its needed tokens, the grids of its
    pictures, and how many tokens are learned."""

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    supervised: int

    @property
    def beginning(self) -> int:
        """Nobody else goes on from there."""
        return 0


class _Frame(NamedTuple):
    """What a tower looks at by itself: one point in time of the picture number `picture`."""

    picture: int
    grid: Grid
    features: int

    @property
    def patches(self) -> int:
        _, height, width = self.grid
        return height * width


@dataclass(frozen=True, slots=True)
class Slice:
    """The share of process `number` of `count` in the sample `whole`.

    It reads the tokens `stretches` and looks at the patches `patches`, which have these `grids`.
    `features` counts those that each process makes of its own patches, in the sample's order, and
    `wanted` says which of all of them this one's tokens stand for.
    """

    number: int
    count: int
    whole: Alone
    stretches: tuple[Stretch, Stretch]
    patches: Stretch
    grids: tuple[Grid, ...]
    features: tuple[int, ...]
    wanted: tuple[Stretch, Stretch]

    @classmethod
    def of(cls, outline: Outline, number: int, count: int) -> Slice:
        """The share of a sample."""
        grids = tuple(span.grid for span in outline.spans)
        frames = [*_frames(outline)]
        shares = _even([frame.patches for frame in frames], count)
        starts = [0, *accumulate(frame.patches for frame in frames)]
        first, end = shares[number]
        own = frames[first:end]
        stretches = _stretches(outline.needed, number, count)
        at = [place for span in outline.spans for place in range(span.start, span.stop)]
        front, back = ((bisect_left(at, a), bisect_left(at, b)) for a, b in stretches)
        return cls(
            number=number,
            count=count,
            whole=Alone((outline.needed,), grids, outline.supervised),
            stretches=stretches,
            patches=(starts[first], starts[end]),
            grids=tuple(_joined(own)),
            features=tuple(sum(frame.features for frame in frames[a:b]) for a, b in shares),
            wanted=(front, back),
        )

    @property
    def tokens(self) -> int:
        """T of the whole sample, those that are needed."""
        return self.whole.lengths[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of this share's stretches."""
        return [stop - start for start, stop in self.stretches]

    @property
    def longest(self) -> int:
        """Tokens of the longest stretch of any process."""
        return -(-self.tokens // (2 * self.count))

    def cut(self, batch: PackedBatch) -> PackedBatch:
        """This share of a pack of the sample alone, whose patches are this share's already."""
        at_T = torch.cat([torch.arange(*stretch) for stretch in self.stretches])
        place_T = torch.full((self.tokens,), -1)
        place_T[at_T] = torch.arange(len(at_T))
        predict_L, visual_at_M = place_T[batch.predict_L], place_T[batch.visual_at_M]
        learned_L = predict_L >= 0
        predict_L, target_L = predict_L[learned_L], batch.target_L[learned_L]
        if not len(predict_L):
            # A token without a target takes the way that all others' gradients come back on.
            predict_L = F.pad(predict_L, (0, 1))
        return replace(
            batch,
            lengths=(len(at_T),),
            grids=self.grids,
            ids_T=batch.ids_T[at_T],
            positions_3T=batch.positions_3T[:, at_T],
            bounds_S1=torch.tensor([0, len(at_T)], dtype=torch.int32),
            visual_at_M=visual_at_M[visual_at_M >= 0],
            predict_L=predict_L,
            target_L=target_L,
            share=self,
        )


def _stretches(tokens: int, number: int, count: int) -> tuple[Stretch, Stretch]:
    size = -(-tokens // (2 * count))
    first, second = (
        (min(tokens, place * size), min(tokens, (place + 1) * size))
        for place in (number, 2 * count - 1 - number)
    )
    return first, second


def _frames(outline: Outline) -> Iterator[_Frame]:
    for picture, span in enumerate(outline.spans):
        times, height, width = span.grid
        features = (span.stop - span.start) // times
        for _ in range(times):
            yield _Frame(picture, (1, height, width), features)


def _even(costs: list[int], count: int) -> list[Stretch]:
    """Neighbours together, each process's about as costly as any other's."""
    middles = [end - cost / 2 for end, cost in zip(accumulate(costs), costs, strict=True)]
    whole = sum(costs)
    bounds = [bisect_left(middles, whole * number / count) for number in range(count)]
    return list(zip(bounds, [*bounds[1:], len(costs)], strict=True))


def _joined(frames: list[_Frame]) -> Iterator[Grid]:
    """The grids of neighbouring frames, those of one video in one."""
    for _, same in groupby(frames, lambda frame: frame.picture):
        some = [*same]
        _, height, width = some[0].grid
        yield len(some), height, width
