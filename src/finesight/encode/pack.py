"""Sequences end to end: the one form in which the model reads tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

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
"""A beginning is laid once where that spares at least one of so many tokens."""

READ = 4
"""Times as many tokens as a pack has that all of its sequences read at most: where they are long,
keys and values of their beginning are copied for each."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end, with the patches of all their pictures in the order of the tokens.

    `lengths` are the tokens of each sequence, `bounds_S1` their running sum from 0 (int32). A
    sequence is a sample; or else all samples have a `beginning` of so many tokens in common, which
    is the first sequence, and all others go on from there.
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
    beginning: int = 0

    @property
    def samples(self) -> int:
        """Of those that several processes share, the first one's."""
        return len(self.sample_ids) if self.share is None or self.share.number == 0 else 0

    @property
    def tokens(self) -> int:
        """Those of all samples that are needed, each with its beginning."""
        return sum(self.lengths) + self.beginning * max(0, len(self.sample_ids) - 1)

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


class Common(NamedTuple):
    """What samples begin with: the tokens [P] that are the same in all of them, and how many the
    one could share that can share the fewest."""

    ids_P: NDArray[np.int32]
    least: int

    @classmethod
    def of(cls, outline: Outline) -> Common:
        """What others may share of a sample: the tokens before its first picture, and before those
        that predict learned ones. Their positions hang on nothing but their place."""
        learned = int(outline.learned_T.argmax()) if outline.learned_T.any() else outline.tokens
        picture = outline.spans[0].start if outline.spans else outline.tokens
        ids_P = outline.ids_T[: max(0, min(learned - 1, picture))]
        return cls(ids_P, len(ids_P))

    def meet(self, other: Common) -> Common:
        """What both have in common."""
        least = min(self.least, other.least)
        end = min(len(self.ids_P), len(other.ids_P))
        unlike = np.flatnonzero(self.ids_P[:end] != other.ids_P[:end])
        return Common(self.ids_P[: unlike[0] if len(unlike) else end], least)

    @property
    def tokens(self) -> int:
        """How many are shared: where texts part, a multiple of `FEW`."""
        same = len(self.ids_P)
        return same if same == self.least else same - same % FEW


def worth(beginning: int, lengths: Sequence[int]) -> int:
    """Of so many tokens that all these samples begin with, as many, or none where to compute them
    once would spare next to nothing."""
    return beginning if beginning * (len(lengths) - 1) * WORTH >= sum(lengths) else 0


def beginning_of(outlines: Sequence[Outline]) -> int:
    """How many tokens all these samples share."""
    if not outlines:
        return 0
    shared = reduce(Common.meet, map(Common.of, outlines)).tokens
    return worth(shared, [outline.needed for outline in outlines])


def contexts(lengths: Sequence[int], beginning: int) -> tuple[int, ...]:
    """What the sequences of these lengths read: where the first one is the `beginning` of all
    others, it stands before each of them."""
    first, *others = lengths
    return first, *(beginning + length for length in others)


def pack(
    encoded: Sequence[Encoded], patches: NDArray[np.uint8] | None = None, beginning: int = 0
) -> PackedBatch:
    """Lay samples end to end, in the order given, on the CPU, as many tokens of each as are
    `needed`; their patches into the array `patches` of their common shape, where there is one. The
    first tokens of several samples, as many as `beginning_of` says, are laid once.

    A learned token is predicted by the token before it in its own sample; the first token of a
    sample has none and never counts. Ids, positions and indices are int64, `bounds_S1` int32 (what
    variable-length attention takes), patches stay uint8.
    """
    assert encoded, "a pack of no samples"
    first = encoded[0]
    assert len(encoded) == 1 or not first.inputs, f"{first.outline.id} has to stand alone"
    outlines = [one.outline for one in encoded]
    beginning = beginning if len(outlines) > 1 else 0
    # What a family's own processor made goes with all tokens.
    ends = [outline.tokens if first.inputs else outline.needed for outline in outlines]
    stretches = [(one, beginning, end) for one, end in zip(outlines, ends, strict=True)]
    if beginning:
        same = len(reduce(Common.meet, map(Common.of, outlines)).ids_P)
        assert beginning <= same, f"{same} tokens are the same, not {beginning}"
        stretches.insert(0, (outlines[0], 0, beginning))
    lengths = [end - start for _, start, end in stretches]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    # Where a sample's first token would lie, if the beginning lay right before the rest.
    starts = bounds[-len(outlines) - 1 : -1] - beginning
    ids_T = np.concatenate([one.ids_T[a:b] for one, a, b in stretches])
    predict, target = [], []
    for (one, start, end), at in zip(stretches, bounds[:-1], strict=True):
        predicting = np.flatnonzero(one.learned_T[start + 1 : end + 1])
        predict.append(at + predicting)
        target.append(one.ids_T[start + 1 + predicting])
    visual_at = [
        np.arange(start + span.start, start + span.stop)
        for start, outline in zip(starts, outlines, strict=True)
        for span in outline.spans
    ]
    none = np.empty(0, dtype=np.int64)
    positions_3T = np.concatenate([one.positions_3T[:, a:b] for one, a, b in stretches], 1)
    return PackedBatch(
        sample_ids=tuple(outline.id for outline in outlines),
        lengths=tuple(lengths),
        grids=tuple(span.grid for outline in outlines for span in outline.spans),
        ids_T=torch.from_numpy(ids_T.astype(np.int64)),
        positions_3T=torch.from_numpy(positions_3T.astype(np.int64)),
        bounds_S1=torch.from_numpy(bounds.astype(np.int32)),
        patches_ND=torch.from_numpy(end_to_end([one.patches_ND for one in encoded], patches)),
        visual_at_M=torch.from_numpy(np.concatenate([none, *visual_at])),
        predict_L=torch.from_numpy(np.concatenate(predict)),
        target_L=torch.from_numpy(np.concatenate(target).astype(np.int64)),
        inputs=first.inputs,
        beginning=beginning,
    )


def filled(batch: PackedBatch, merge: int | None) -> PackedBatch:
    """The pack with a sequence of nothing after its own, so that tokens, patches (`merge` x `merge`
    of them become a token) and predicting tokens come to multiples of `EVEN`. It goes on from the
    beginning, too, if there is one, and has no targets: `predict_L` grows longer than `target_L`.
    Without `merge`, of a tower whose pictures all have one size, patches stay as they are: few
    numbers of them come.
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


def plan_packs(lengths: Sequence[int], budget: int, beginning: int = 0) -> list[list[int]]:
    """Share samples of these lengths out to packs of at most `budget` tokens: lists of indices.
    The `beginning` of all samples counts once in a pack; but each of them counts as one of at least
    a fourth (1 / `READ`) of its tokens (`together`).

    First fit: each sample, in order, joins the first pack with room for it. A pure function of
    its arguments; within a pack the order is kept, and packs are in the order of their first
    sample. A sample longer than the budget stands alone.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index, whole in enumerate(lengths):
        length = _counted(whole, beginning)
        fitting = (pack for pack, left in enumerate(room) if left >= length)
        chosen = next(fitting, len(packs))
        if chosen == len(packs):
            packs.append([])
            room.append(budget - beginning)
        packs[chosen].append(index)
        room[chosen] -= length
    return packs


def together(lengths: Sequence[int], beginning: int = 0) -> int:
    """The least budget with which `plan_packs` makes one pack of these samples."""
    return beginning + sum(_counted(length, beginning) for length in lengths)


def _counted(length: int, beginning: int) -> int:
    return max(length - beginning, length // READ) if beginning else length
