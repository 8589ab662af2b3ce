"""Sequences end to end: the one form in which the model reads tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finesight.encode.encoded import Grid


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences end to end, with the patches of all their pictures in the order of the tokens.

    `lengths` are the tokens of each sequence, `bounds_S1` their running sum from 0 (int32).
    `visual_at_M` says where in the pack the placeholder tokens stand, one for each merged feature.
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
