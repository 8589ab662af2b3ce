"""What vision towers share: patches in, blocks, merger, features in the order of the patches.

Shapes: N patches, D width, M squares of merged patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.model.attention import Segments
from finesight.model.geometry import Pixels, VisionGeometry
from finesight.model.layers import PatchEmbed, PatchMerger, run_layer
from finesight.model.rope import vision_rotation
from finesight.model.runs import upload


@dataclass(frozen=True)
class Route:
    """How the patches of some pictures go through a tower.

    `positions_N2` are rows and columns in the order in which the blocks see the patches,
    `segments` those of each block. `order_M` brings squares of merged patches into that order and
    `back_M` undoes it; both None where it is the order of the pack.
    """

    positions_N2: Tensor
    segments: tuple[Segments, ...]
    order_M: Tensor | None = None
    back_M: Tensor | None = None


class VisionTower(nn.Module):
    """Pictures to features. A family gives its blocks, its norm, and its own `route`."""

    def __init__(
        self,
        geometry: VisionGeometry,
        pixels: Pixels,
        block: Callable[[VisionGeometry], nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.patch_embed = PatchEmbed(geometry, pixels)
        self.blocks = nn.ModuleList(block(geometry) for _ in range(geometry.depth))
        self.merger = PatchMerger(geometry, norm(geometry.width))

    def route(self, grids: Sequence[Grid], device: torch.device) -> Route:
        """Frame by frame, in the order of the pack."""
        merge = self.geometry.merge
        positions = np.concatenate([positions_by_square(grid, merge) for grid in grids])
        frames = frame_segments(grids, device)
        return Route(upload(positions.reshape(-1, 2), device), (frames,) * self.geometry.depth)

    @property
    def trains(self) -> bool:
        """Whether anything before the merger has a gradient, adapters included."""
        parts = (self.patch_embed, self.blocks)
        return any(p.requires_grad for part in parts for p in part.parameters())

    def forward(self, patches_ND: Tensor, grids: Sequence[Grid], recompute: bool = False) -> Tensor:
        """uint8 patches of pictures end to end to their features [M, out_width]."""
        expected = sum(t * h * w for t, h, w in grids)
        assert len(patches_ND) == expected, f"{len(patches_ND)} patches for grids of {expected}"
        route = self.route(grids, patches_ND.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            # Reordered as bytes, where a patch is smallest.
            x_ND = self.patch_embed(self._by_square(patches_ND, route.order_M))
            rotation = vision_rotation(route.positions_N2, self.geometry)
            for block, segments in zip(self.blocks, route.segments, strict=True):
                x_ND = run_layer(block, recompute, x_ND, rotation, segments)
        features_MD: Tensor = self.merger(x_ND)
        return features_MD if route.back_M is None else features_MD.index_select(0, route.back_M)

    def _by_square(self, patches_ND: Tensor, order_M: Tensor | None) -> Tensor:
        if order_M is None:
            return patches_ND
        squares = torch.unflatten(patches_ND, 0, (-1, self.geometry.merge**2))
        return squares.index_select(0, order_M).flatten(0, 1)


def frame_segments(grids: Sequence[Grid], device: torch.device) -> Segments:
    """Each frame of each picture or video on its own."""
    return Segments.of((h * w for t, h, w in grids for _ in range(t)), device)


@lru_cache(maxsize=256)
def positions_by_square(grid: Grid, merge: int) -> NDArray[np.int32]:
    """Row and column of each patch, [M, merge x merge, 2]: squares of merged patches in reading
    order, the patches of a square next to each other."""
    frames, height, width = grid
    row_column = np.moveaxis(np.indices((height, width), dtype=np.int32), 0, -1)
    squares = row_column.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2)
    return np.tile(squares.reshape(-1, merge**2, 2), (frames, 1, 1))
