"""Sequences end to end: the one form in which the model reads tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.encoded import Encoded, Grid, Outline
from finesight.vision.patches import end_to_end

if TYPE_CHECKING:
    from finesight.encode.slice import Slice

EVEN = 64
"""What `filled` makes sizes multiples of."""

FEW = 4
"""Where texts part, samples share a multiple of so many tokens, so that packs are of few kinds."""

WORTH = 50
"""A beginning is shared where that spares at least one of so many tokens."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end, with the patches of all their pictures in the order of the tokens.

    `lengths` are the tokens of each sequence, `bounds_S1` their running sum from 0 (int32). Where
    `shared`, the first sequence is what all samples begin with, and each of the others goes on from
    there: it is computed once.
    `visual_at_M` says where in the pack the placeholder tokens stand, one for each merged feature.
    `patches_ND` holds one frame of each patch where all its frames are alike, as a still's are.
    `predict_L` says which tokens predict a learned token and `target_L` which token that is. What
    `filled` adds has no name in `sample_ids` and no target. `inputs` is what else a model
    of a family without native code reads, by name, of the one sample that it is given at a time.
    `share` is that of a sample which several processes share: then all of this is the share's.
    """

    sample_ids: tuple[str, ...]
    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    ids_T: Tensor
    positions_3T: Tensor
    bounds_S1: Tensor
    patches_ND: Tensor
    visual_at_M: Tensor
    predict_L: Tensor
    target_L: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    share: Slice | None = None
    shared: bool = False

    @property
    def samples(self) -> int:
        """Of those that several processes share, the first one's."""
        return len(self.sample_ids) if self.share is None or self.share.number == 0 else 0

    @property
    def beginning(self) -> int:
        """Tokens that are shared."""
        return self.lengths[0] if self.shared else 0

    @property
    def tokens(self) -> int:
        """Of all samples, each with what it shares."""
        return sum(self.lengths) + self.beginning * max(0, len(self.sample_ids) - 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with what it shares."""
        return self.beginning + max(self.lengths[self.shared :])

    @property
    def supervised(self) -> int:
        return len(self.target_L)

    def to(self, device: torch.device) -> PackedBatch:
        """The same pack on `device`; copies from pinned memory do not wait."""
        return replace(
            self,
            ids_T=self.ids_T.to(device, non_blocking=True),
            positions_3T=self.positions_3T.to(device, non_blocking=True),
            bounds_S1=self.bounds_S1.to(device, non_blocking=True),
            patches_ND=self.patches_ND.to(device, non_blocking=True),
            visual_at_M=self.visual_at_M.to(device, non_blocking=True),
            predict_L=self.predict_L.to(device, non_blocking=True),
            target_L=self.target_L.to(device, non_blocking=True),
            inputs={n: value.to(device, non_blocking=True) for n, value in self.inputs.items()},
        )


def beginning(outline: Outline) -> NDArray[np.int32]:
    """The tokens [P] of a sample that others may share: those before its first picture, and before
    those that predict learned ones."""
    learned = int(outline.learned_T.argmax()) if outline.learned_T.any() else outline.tokens
    picture = outline.spans[0].start if outline.spans else outline.tokens
    return outline.ids_T[: max(0, min(learned - 1, picture))]


def common(one_P: NDArray[np.int32], other_P: NDArray[np.int32]) -> NDArray[np.int32]:
    """What both begin with. Where they part, a multiple of `FEW`."""
    end = min(len(one_P), len(other_P))
    unlike = np.flatnonzero(one_P[:end] != other_P[:end])
    return one_P[: unlike[0] // FEW * FEW if len(unlike) else end]


def worth(shared: int, samples: int, tokens: int) -> int:
    """`shared`, or 0 where sharing it spares next to nothing of so many samples and tokens."""
    return shared if shared * (samples - 1) * WORTH >= tokens else 0


def shareable(outlines: Sequence[Outline]) -> int:
    """How many tokens all these samples share."""
    if not outlines:
        return 0
    # Positions of text before the first picture hang on nothing but the place.
    shared = len(reduce(common, map(beginning, outlines)))
    return worth(shared, len(outlines), sum(outline.tokens for outline in outlines))


def pack(
    encoded: Sequence[Encoded], patches: NDArray[np.uint8] | None = None, shared: int = 0
) -> PackedBatch:
    """Lay samples end to end, in the order given, on the CPU; their patches into the array
    `patches` of their common shape, where there is one. Of several samples, the first `shared`
    tokens are laid once (`shareable`).

    A learned token is predicted by the token before it in its own sequence; the first token of a
    sequence has none and never counts. Ids, positions and indices are int64, `bounds_S1` int32
    (what variable-length attention takes), patches stay uint8.
    """
    assert encoded, "a pack of no samples"
    first = encoded[0]
    assert len(encoded) == 1 or not first.inputs, f"{first.outline.id} has to stand alone"
    outlines = [one.outline for one in encoded]
    shared = shared if len(outlines) > 1 else 0
    stretches = [(outline, slice(shared, None)) for outline in outlines]
    if shared:
        stretches.insert(0, (outlines[0], slice(shared)))
    lengths = [len(outline.ids_T[own]) for outline, own in stretches]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    # Where a sample's first token would lie, if what it shares lay right before its own.
    starts = bounds[-len(outlines) - 1 : -1] - shared
    ids_T = np.concatenate([outline.ids_T[own] for outline, own in stretches]).astype(np.int64)
    learned_T = np.concatenate([outline.learned_T[own] for outline, own in stretches])
    learned_T[bounds[:-1]] = False
    targets_at = np.flatnonzero(learned_T)
    visual_at = [
        np.arange(start + span.start, start + span.stop)
        for start, outline in zip(starts, outlines, strict=True)
        for span in outline.spans
    ]
    none = np.empty(0, dtype=np.int64)
    positions_3T = np.concatenate([outline.positions_3T[:, own] for outline, own in stretches], 1)
    return PackedBatch(
        sample_ids=tuple(outline.id for outline in outlines),
        lengths=tuple(lengths),
        grids=tuple(span.grid for outline in outlines for span in outline.spans),
        ids_T=torch.from_numpy(ids_T),
        positions_3T=torch.from_numpy(positions_3T.astype(np.int64)),
        bounds_S1=torch.from_numpy(bounds.astype(np.int32)),
        patches_ND=torch.from_numpy(end_to_end([one.patches_ND for one in encoded], patches)),
        visual_at_M=torch.from_numpy(np.concatenate([none, *visual_at])),
        predict_L=torch.from_numpy(targets_at - 1),
        target_L=torch.from_numpy(ids_T[targets_at]),
        inputs=first.inputs,
        shared=shared > 0,
    )


def filled(batch: PackedBatch, merge: int | None) -> PackedBatch:
    """The pack with a sequence of nothing after its own, so that tokens, patches (`merge` x `merge`
    of them become a token) and predicting tokens come to multiples of `EVEN`. It has no targets:
    `predict_L` grows longer than `target_L`. Without `merge`, of a tower whose pictures all have
    one size, patches stay as they are: few numbers of them come.
    """
    patches_ND, grids = batch.patches_ND, batch.grids
    if merge is not None:
        patches_ND, grids = evened(patches_ND, grids, merge)
    features = (len(patches_ND) - len(batch.patches_ND)) // (merge or 1) ** 2
    tokens = features + 1
    tokens += -(len(batch.ids_T) + tokens) % EVEN
    longer = _followed(batch, tokens, features, patches_ND, grids)
    return replace(longer, predict_L=F.pad(batch.predict_L, (0, -len(batch.predict_L) % EVEN)))


def with_blank(batch: PackedBatch, grid: Grid, features: int, numbers: int) -> PackedBatch:
    """The pack, which has no picture, with a sequence of nothing after its own that shows a blank
    one: of this grid, so many features and so many numbers a patch."""
    assert not batch.grids, f"a blank picture beside {len(batch.grids)}"
    patches_ND = batch.patches_ND.new_zeros(math.prod(grid), numbers)
    return _followed(batch, features + 1, features, patches_ND, (grid,))


def nothing() -> PackedBatch:
    """A pack of a token of nothing that predicts itself."""
    one = torch.zeros(1, dtype=torch.int64)
    return PackedBatch(
        sample_ids=(),
        lengths=(1,),
        grids=(),
        ids_T=one,
        positions_3T=one.expand(3, 1),
        bounds_S1=torch.tensor([0, 1], dtype=torch.int32),
        patches_ND=torch.empty(0, 0, dtype=torch.uint8),
        visual_at_M=one[:0],
        predict_L=one,
        target_L=one,
    )


def _followed(
    batch: PackedBatch, tokens: int, features: int, patches_ND: Tensor, grids: tuple[Grid, ...]
) -> PackedBatch:
    """The pack with a sequence of nothing after its own, of so many tokens, the first ones those of
    the pictures that `patches_ND` and `grids` have beyond its own."""
    end, blank = len(batch.ids_T), batch.ids_T.new_zeros(tokens)
    own = torch.arange(tokens, device=blank.device)
    return replace(
        batch,
        lengths=(*batch.lengths, tokens),
        grids=grids,
        ids_T=torch.cat([batch.ids_T, blank]),
        positions_3T=torch.cat([batch.positions_3T, own.expand(3, -1)], dim=1),
        bounds_S1=torch.cat([batch.bounds_S1, batch.bounds_S1[-1:] + tokens]),
        patches_ND=patches_ND,
        visual_at_M=torch.cat([batch.visual_at_M, end + own[:features]]),
    )


def evened(
    patches_ND: Tensor, grids: tuple[Grid, ...], merge: int
) -> tuple[Tensor, tuple[Grid, ...]]:
    """Patches and grids of pictures with one of nothing after them, so that the patches come to a
    multiple of `EVEN`."""
    squares = -len(patches_ND) % math.lcm(EVEN, merge**2) // merge**2
    blank = ((1, merge, squares * merge),) if squares else ()
    return F.pad(patches_ND, (0, 0, 0, squares * merge**2)), grids + blank


def plan_packs(lengths: Sequence[int], budget: int, shared: int = 0) -> list[list[int]]:
    """Share samples of these lengths out to packs of at most `budget` tokens: lists of indices.
    The first `shared` tokens of all samples of a pack count once.

    First fit: each sample, in order, joins the first pack with room for it. A pure function of
    its arguments; within a pack the order is kept, and packs are in the order of their first
    sample. A sample longer than the budget stands alone.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    budget -= shared
    for index, length in enumerate(length - shared for length in lengths):
        fitting = (pack for pack, left in enumerate(room) if left >= length)
        chosen = next(fitting, len(packs))
        if chosen == len(packs):
            packs.append([])
            room.append(budget)
        packs[chosen].append(index)
        room[chosen] -= length
    return packs
