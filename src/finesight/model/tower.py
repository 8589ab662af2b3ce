"""What vision towers share: patches in, blocks, mergers, features in the order of the patches.

Shapes: N patches, D width, M squares of merged patches, K features of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.model.array_cache import array_cache
from finesight.model.attention import Segments
from finesight.model.geometry import Pixels, VisionGeometry
from finesight.model.layers import PatchEmbed, recomputed, run_layer
from finesight.model.rope import vision_rotation
from finesight.model.runs import upload

Thing = TypeVar("Thing")


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
    """Pictures to features. A family gives its blocks and its merger, and where it has them its own
    `route`, positions that are added to patches (`placed`), and blocks that are merged on the way.
    """

    recordable = False
    """Whether of a pass nothing but the `route` hangs on the pictures' sizes: `placed` reads no
    grids, and segments are frames or windows (see `train.sight`)."""

    def __init__(
        self,
        geometry: VisionGeometry,
        pixels: Pixels,
        block: Callable[[], nn.Module],
        merger: nn.Module,
        *,
        patch_bias: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.patch_embed = PatchEmbed(geometry, pixels, bias=patch_bias)
        self.blocks = nn.ModuleList(block() for _ in range(geometry.depth))
        self.merger = merger
        self.deepstack: tuple[int, ...] = ()
        """Numbers of the blocks whose outputs have a merger in `deepstack_merger_list`."""
        self.deepstack_merger_list = nn.ModuleList()

    def route(self, grids: Sequence[Grid], device: torch.device) -> Route:
        """Frame by frame, in the order of the pack."""
        merge = self.geometry.merge
        positions = np.concatenate([positions_by_square(grid, merge) for grid in grids])
        return Route(upload(positions.reshape(-1, 2), device), self.segments(grids, device))

    def divided(self, grids: Sequence[Grid]) -> tuple[tuple[int, ...], ...]:
        """Patches of the segments that each block looks at: here each frame of each picture or
        video on its own. Blocks that look alike have the very same."""
        return (frames(grids),) * self.geometry.depth

    def segments(self, grids: Sequence[Grid], device: torch.device) -> tuple[Segments, ...]:
        """What `divided` says, on the device."""
        divided = self.divided(grids)
        made = {id(own): Segments.of(own, device) for own in each_once(divided)}
        return tuple(made[id(own)] for own in divided)

    def placed(self, x_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embedded patches with what the family adds for their places: here nothing."""
        return x_ND

    @property
    def features(self) -> int:
        """K, the features of each square."""
        return 1 + len(self.deepstack)

    @property
    def smallest(self) -> Grid:
        """The grid of the smallest picture that it takes."""
        return 1, self.geometry.merge, self.geometry.merge

    @property
    def trains(self) -> bool:
        """Whether anything before the mergers has a gradient, adapters included."""
        mergers = {id(p) for p in self.merger.parameters()}
        mergers |= {id(p) for p in self.deepstack_merger_list.parameters()}
        return any(p.requires_grad for p in self.parameters() if id(p) not in mergers)

    def forward(
        self,
        patches_ND: Tensor,
        grids: Sequence[Grid],
        recompute: float = 0.0,
        route: Route | None = None,
    ) -> Tensor:
        """uint8 patches of pictures end to end to their features [M, K, out_width]: that of the
        last block, then those of the blocks `deepstack`. `recompute` is the share of blocks whose
        inner activations are made again in the backward pass, the first ones. With a `route`, that
        of pictures whose grids nobody has to know (see `recordable`)."""
        if route is None:
            expected = sum(t * h * w for t, h, w in grids)
            assert len(patches_ND) == expected, f"{len(patches_ND)} patches for grids of {expected}"
            route = self.route(grids, patches_ND.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            # Reordered as bytes, where a patch is smallest.
            x_ND = self.patch_embed(self._by_square(patches_ND, route.order_M))
            x_ND = self.placed(x_ND, grids)
            rotation = vision_rotation(route.positions_N2, self.geometry)
            on_the_way, y_ND = [], None
            again = recomputed(recompute, len(self.blocks))
            for number, segments in enumerate(route.segments):
                block = self.blocks[number]
                x_ND, y_ND = run_layer(block, number < again, x_ND, y_ND, rotation, segments)
                if number in self.deepstack:
                    x_ND, y_ND = x_ND + y_ND, None
                    on_the_way.append(x_ND)
            x_ND = x_ND if y_ND is None else x_ND + y_ND
        mergers = zip(self.deepstack_merger_list, on_the_way, strict=True)
        merged = [self.merger(x_ND), *(merger(h_ND) for merger, h_ND in mergers)]
        features_MKD = torch.stack(merged, 1)
        return features_MKD if route.back_M is None else features_MKD.index_select(0, route.back_M)

    def _by_square(self, patches_ND: Tensor, order_M: Tensor | None) -> Tensor:
        if order_M is None:
            return patches_ND
        squares = torch.unflatten(patches_ND, 0, (-1, self.geometry.merge**2))
        return squares.index_select(0, order_M).flatten(0, 1)


def frames(grids: Sequence[Grid]) -> tuple[int, ...]:
    """Patches of each frame of each picture or video."""
    return tuple(h * w for t, h, w in grids for _ in range(t))


def each_once(things: Iterable[Thing]) -> list[Thing]:
    """The very same ones once, in their order."""
    return [*{id(thing): thing for thing in things}.values()]


@array_cache()
def positions_by_square(grid: Grid, merge: int) -> NDArray[np.int32]:
    """Row and column of each patch, [M, merge x merge, 2]: squares of merged patches in reading
    order, the patches of a square next to each other."""
    frames, height, width = grid
    row_column = np.moveaxis(np.indices((height, width), dtype=np.int32), 0, -1)
    squares = row_column.reshape(height // merge, merge, width // merge, merge, 2).swapaxes(1, 2)
    return np.tile(squares.reshape(-1, merge**2, 2), (frames, 1, 1))
