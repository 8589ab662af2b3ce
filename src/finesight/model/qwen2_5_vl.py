"""Qwen2.5-VL's vision tower (Bai et al. 2025): gated MLPs, RMS norms, and attention within windows
of 112 x 112 pixels except in a few blocks that see the whole frame."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from finesight.encode.encoded import Grid
from finesight.model.architecture import Architecture
from finesight.model.array_cache import array_cache
from finesight.model.geometry import Pixels, Settings, VisionGeometry, read_language, read_vision
from finesight.model.layers import GatedMlp, PatchMerger, RmsNorm, VisionBlock
from finesight.model.runs import upload
from finesight.model.tower import Route, VisionTower, frames, positions_by_square

_norm = partial(RmsNorm, eps=1e-6)


class WindowedTower(VisionTower):
    """`window` is the side of a window in squares of merged patches; the blocks numbered in
    `whole_frame` attend over frames instead."""

    recordable = True

    def __init__(
        self, geometry: VisionGeometry, pixels: Pixels, window: int, whole_frame: tuple[int, ...]
    ) -> None:
        def block() -> VisionBlock:
            mlp = GatedMlp(geometry.width, geometry.mlp_width, bias=True)
            return VisionBlock(geometry, _norm, mlp)

        super().__init__(geometry, pixels, block, PatchMerger(geometry, _norm(geometry.width)))
        self.window = window
        self.whole_frame = whole_frame

    def route(self, grids: Sequence[Grid], device: torch.device) -> Route:
        """Squares of a window next to each other; frames stay whole in that order."""
        merge, orders, positions, seen = self.geometry.merge, [], [], 0
        for grid in grids:
            order, _ = windows(grid, merge, self.window)
            positions.append(positions_by_square(grid, merge)[order])
            orders.append(order + seen)
            seen += len(order)
        order = np.concatenate(orders)
        return Route(
            upload(np.concatenate(positions).reshape(-1, 2), device),
            self.segments(grids, device),
            upload(order, device),
            upload(np.argsort(order), device),
        )

    def divided(self, grids: Sequence[Grid]) -> tuple[tuple[int, ...], ...]:
        """Windows, and frames for the blocks that attend over them."""
        merge = self.geometry.merge
        squares = [windows(grid, merge, self.window)[1] for grid in grids]
        inside = tuple((np.concatenate(squares) * merge**2).tolist()) if squares else ()
        whole = frames(grids)
        depth = range(self.geometry.depth)
        return tuple(whole if block in self.whole_frame else inside for block in depth)


@array_cache()
def windows(grid: Grid, merge: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The squares of a picture or video window by window (frame, then windows in reading order,
    then squares in reading order), and how many each window holds; those at the right and bottom
    edge hold what is left."""
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    frame, row, column = np.indices((frames, height, width)).reshape(3, -1)
    across, down = -(-width // window), -(-height // window)
    number = (frame * down + row // window) * across + column // window
    return np.argsort(number, kind="stable"), np.bincount(number)


def vision_tower(config: Settings, pixels: Pixels) -> VisionTower:
    """From `vision_config`; window_size is in pixels."""
    vision = config.section("vision_config")
    vision.require("hidden_act", "silu", ("silu",))
    geometry = read_vision(vision)
    square = geometry.patch * geometry.merge
    window = vision.whole("window_size") // square
    if window < 1:
        vision.refuse("window_size", f"at least {square} pixels")
    return WindowedTower(geometry, pixels, window, vision.wholes("fullatt_block_indexes"))


ARCHITECTURE = Architecture(read_language, vision_tower)
