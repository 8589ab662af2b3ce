"""Sequences end to end: the one form in which the model reads tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finesight.encode.encoded import Encoded, Grid
from finesight.vision.patches import CHANNELS


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end, with the patches of all their pictures in the order of the tokens.

    `lengths` are the tokens of each sequence, `bounds_S1` their running sum from 0 (int32).
    `visual_at_M` says where in the pack the placeholder tokens stand, one for each merged feature.
    `patches_ND` holds one frame of each patch where all its frames are alike, as a still's are.
    `predict_L` says which tokens predict a learned token and `target_L` which token that is.
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
        )


def pack(encoded: Sequence[Encoded]) -> PackedBatch:
    """Lay samples end to end, in the order given, on the CPU.

    A learned token is predicted by the token before it in its own sequence; the first token of a
    sequence has none and never counts. Ids, positions and indices are int64, `bounds_S1` int32
    (what variable-length attention takes), patches stay uint8.
    """
    assert encoded, "a pack of no samples"
    outlines = [one.outline for one in encoded]
    lengths = [outline.tokens for outline in outlines]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = bounds[:-1]
    ids_T = np.concatenate([outline.ids_T for outline in outlines]).astype(np.int64)
    learned_T = np.concatenate([outline.learned_T for outline in outlines])
    learned_T[starts] = False
    targets_at = np.flatnonzero(learned_T)
    visual_at = [
        np.arange(start + span.start, start + span.stop)
        for start, outline in zip(starts, outlines, strict=True)
        for span in outline.spans
    ]
    none = np.empty(0, dtype=np.int64)
    positions_3T = np.concatenate([outline.positions_3T for outline in outlines], axis=1)
    return PackedBatch(
        sample_ids=tuple(outline.id for outline in outlines),
        lengths=tuple(lengths),
        grids=tuple(span.grid for outline in outlines for span in outline.spans),
        ids_T=torch.from_numpy(ids_T),
        positions_3T=torch.from_numpy(positions_3T.astype(np.int64)),
        bounds_S1=torch.from_numpy(bounds.astype(np.int32)),
        patches_ND=torch.from_numpy(_patches(encoded)),
        visual_at_M=torch.from_numpy(np.concatenate([none, *visual_at])),
        predict_L=torch.from_numpy(targets_at - 1),
        target_L=torch.from_numpy(ids_T[targets_at]),
    )


def _patches(encoded: Sequence[Encoded]) -> NDArray[np.uint8]:
    """Patches end to end; of stills alone one frame, which is half of what travels to a card."""
    spans = [span for one in encoded for span in one.outline.spans]
    if not spans or any(span.kind != "image" for span in spans):
        return np.concatenate([one.patches_ND for one in encoded])
    first_NCP = np.concatenate([_framed(one)[:, :, 0] for one in encoded])
    number, channels, pixels = first_NCP.shape
    return first_NCP.reshape(number, channels * pixels)


def _framed(one: Encoded) -> NDArray[np.uint8]:
    """Patches as [N, channels, frames, pixels of a frame]."""
    number, width = one.patches_ND.shape
    return one.patches_ND.reshape(number, CHANNELS, one.depth, width // (CHANNELS * one.depth))


def plan_packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Share samples of these lengths out to packs of at most `budget` tokens: lists of indices.

    First fit: each sample, in order, joins the first pack with room for it. A pure function of
    its arguments; within a pack the order is kept, and packs are in the order of their first
    sample. A sample longer than the budget stands alone.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        fitting = (pack for pack, left in enumerate(room) if left >= length)
        chosen = next(fitting, len(packs))
        if chosen == len(packs):
            packs.append([])
            room.append(budget)
        packs[chosen].append(index)
        room[chosen] -= length
    return packs
