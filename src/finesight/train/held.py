"""What a recording of packs reads: sizes that are rounded up, so that packs are of few kinds, and
tensors in which everything lies that changes from pack to pack, the seed of drop-outs included.

Shapes: T tokens, S sequences, M places of pictures, K features of each, D width, L tokens that
predict a learned one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.encode.pack import EVEN, PackedBatch, contexts
from finesight.model import attention
from finesight.model.tower import VisionTower
from finesight.train.sight import Sight, SightKind, up

MOST_TOKENS = 6144
"""Of a pack whose kernels take no longer than their launches, on an H200 and its host."""

MOST_WHERE_KNOWN = 8192
"""Of one the features of whose pictures are known: no tower keeps the card busy while it is
launched. `plan` does not count what is beyond `MOST_TOKENS`."""

SPARE = 8
"""A pack goes into a recording that is not of its own kind where that has room for more tokens than
its own kind by one in so many at most."""


class Kind(NamedTuple):
    """Sizes of a recording; of its sequences, `longest` is the most that one reads, the
    `beginning` of all included."""

    tokens: int
    sequences: int
    beginning: int
    longest: int
    places: int
    labels: int
    sight: SightKind | None

    @classmethod
    def of(cls, batch: PackedBatch, sight: SightKind | None = None) -> Kind:
        """That of this pack."""
        places, labels = len(batch.visual_at_M), len(batch.predict_L)
        return cls.around(batch.lengths, batch.beginning, places, labels, sight)

    @classmethod
    def around(
        cls,
        lengths: Sequence[int],
        beginning: int,
        places: int,
        labels: int,
        sight: SightKind | None = None,
    ) -> Kind:
        """That of a pack of these sequences, with room for at least one token of nothing, in
        sequences no longer than others; `sight` that of its pictures, where the tower is recorded.
        """
        tokens = sum(lengths) + 1
        grain = EVEN if tokens <= MOST_WHERE_KNOWN + 1 else 4 * EVEN
        longest = up(max(contexts(lengths, beginning)), 4 * EVEN)
        return cls(
            tokens=up(tokens, grain),
            sequences=up(len(lengths) + -(-grain // (longest - beginning)), 8),
            beginning=beginning,
            longest=longest,
            places=up(places, EVEN if sight else 4 * EVEN),
            # Up to the next quarter of a power of two: their share of the work is small.
            labels=up(labels, max(EVEN, (1 << labels.bit_length()) // 8)),
            sight=sight,
        )

    @property
    def most(self) -> int:
        """Tokens of the largest recording that takes packs of this kind."""
        return self.tokens + self.tokens // SPARE

    def takes(self, other: Kind) -> bool:
        """Whether packs of the other kind fit in, with little nothing beside them."""
        more = self.tokens - other.tokens
        return (
            (self.beginning, self.sight) == (other.beginning, other.sight)
            and (self.places > 0) == (other.places > 0)
            and other.tokens <= self.tokens <= other.most
            and other.labels <= self.labels <= 2 * other.labels
            and other.longest <= self.longest
            # Long sequences have other kernels, which read what they begin with in copies.
            and (self.longest <= attention.SHORT) == (other.longest <= attention.SHORT)
            and other.places <= self.places
            and other.sequences + -(-more // self.own) <= self.sequences <= 2 * other.sequences
        )

    def among(self, met: Iterable[Kind]) -> Kind:
        """One that takes packs of this kind, and of as many others as go together with it and those
        before them."""
        kinds = [self]
        for other in met:
            wider = self._over([*kinds, other])
            if all(wider.takes(kind) for kind in (*kinds, other)):
                kinds.append(other)
        return self._over(kinds)

    def _over(self, kinds: Sequence[Kind]) -> Kind:
        tokens = max(kind.tokens for kind in kinds)
        longest = max(kind.longest for kind in kinds)
        own = longest - self.beginning
        return self._replace(
            tokens=tokens,
            sequences=max(k.sequences + -(-(tokens - k.tokens) // own) for k in kinds),
            longest=longest,
            places=max(kind.places for kind in kinds),
            labels=max(kind.labels for kind in kinds),
        )

    @property
    def own(self) -> int:
        """The most tokens of a sequence beside the beginning."""
        return self.longest - self.beginning

    @property
    def lengths(self) -> tuple[int, ...]:
        """The most that sequences may have. What lengths they have is known on the device alone."""
        return (self.beginning or self.own, *[self.own] * (self.sequences - 1))


@dataclass(frozen=True)
class Held:
    """What a recording reads: a pack of its kind, the features of its pictures, or what a tower
    makes them of; the factor of its loss, and the seed of its drop-outs; and where it leaves the
    gradient of features that learn elsewhere."""

    kind: Kind
    batch: PackedBatch
    sight: Sight | None
    features_MKD: Tensor | None
    share: Tensor
    seed_1: Tensor
    back_MKD: Tensor | None

    @classmethod
    def room(
        cls,
        kind: Kind,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        tower: VisionTower,
    ) -> Held:
        """Room for packs of this kind, of which this is one."""
        device = batch.ids_T.device

        def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        room = replace(
            batch,
            sample_ids=(),
            lengths=kind.lengths,
            grids=(),
            ids_T=whole(kind.tokens),
            positions_3T=whole(3, kind.tokens),
            bounds_S1=whole(kind.sequences + 1, dtype=torch.int32),
            patches_ND=batch.patches_ND.new_empty(0, batch.patches_ND.shape[1]),
            visual_at_M=whole(kind.places),
            predict_L=whole(kind.labels),
            target_L=whole(kind.labels),
        )
        features, back = None, None
        if features_MKD is not None:
            features = whole(kind.places, *features_MKD.shape[1:], dtype=features_MKD.dtype)
            if features_MKD.requires_grad:
                back = torch.zeros_like(features)
                features.requires_grad_()
        sight = None if kind.sight is None else Sight.room(kind.sight, batch, tower)
        share, seed_1 = torch.zeros((), device=device), whole(1).int()
        return cls(kind, room, sight, features, share, seed_1, back)

    @torch.no_grad()
    def lay(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None,
        share: Tensor,
        tower: VisionTower,
    ) -> None:
        """Put a pack where the recording reads it; nothing waits."""
        held, tokens = self.batch, len(batch.ids_T)
        own = torch.arange(self.kind.tokens - tokens, device=batch.ids_T.device)
        _fill(held.ids_T, batch.ids_T, 0)
        held.positions_3T[:, :tokens].copy_(batch.positions_3T)
        held.positions_3T[:, tokens:].copy_(own)
        # After sequences of nothing there are empty ones.
        bounds = len(batch.bounds_S1)
        ends = torch.arange(1, len(held.bounds_S1) - bounds + 1, device=own.device)
        held.bounds_S1[:bounds].copy_(batch.bounds_S1)
        held.bounds_S1[bounds:].copy_((ends * self.kind.own + tokens).clamp_(max=self.kind.tokens))
        _fill(held.predict_L, batch.predict_L, 0)
        _fill(held.target_L, batch.target_L, -1)
        _fill(held.visual_at_M, batch.visual_at_M, self.kind.tokens - 1)
        if features_MKD is not None and self.features_MKD is not None:
            _fill(self.features_MKD, features_MKD, 0)
        if self.sight is not None:
            self.sight.lay(batch, tower)
        self.share.copy_(share)
        self.seed_1.random_(2**31 - 1)

    @property
    def learned(self) -> list[tuple[Tensor, Tensor]]:
        """Features that learn, with the place of their gradient."""
        if self.features_MKD is None or self.back_MKD is None:
            return []
        return [(self.features_MKD, self.back_MKD)]

    def lead_back(self, features_MKD: Tensor | None) -> None:
        """What came back to the features that were laid here, to what made them."""
        if features_MKD is not None and self.back_MKD is not None:
            torch.autograd.backward(features_MKD, self.back_MKD[: len(features_MKD)])


def _fill(room: Tensor, values: Tensor, rest: int) -> None:
    room[: len(values)].copy_(values)
    room[len(values) :].fill_(rest)
