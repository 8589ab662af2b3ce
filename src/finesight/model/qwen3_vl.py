"""Qwen3-VL (Bai et al. 2025, Qwen3-VL Technical Report): a tower with learned positions whose inner
blocks speak to the first decoder layers too (deepstack), and the Qwen3 decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.model.architecture import TRANSFORMERS_5, Architecture
from finesight.model.array_cache import array_cache
from finesight.model.epilogue import TANH
from finesight.model.fp8 import Rows
from finesight.model.geometry import (
    LanguageGeometry,
    Pixels,
    Settings,
    VisionGeometry,
    read_language,
    read_vision,
    rope_settings,
    text_settings,
)
from finesight.model.layers import FeedForward, VisionBlock, empty_table
from finesight.model.linear import GroupedLinear, only
from finesight.model.runs import upload
from finesight.model.tower import VisionTower, positions_by_square

_norm = partial(nn.LayerNorm, eps=1e-6)


class Mlp(FeedForward):
    """fc2(gelu(fc1(x))), gelu by its approximation with tanh."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.linear_fc1 = GroupedLinear(width, {"linear_fc1": mlp_width}, bias=True)
        self.linear_fc2 = GroupedLinear(mlp_width, {"linear_fc2": width}, bias=True)

    @property
    def first(self) -> GroupedLinear:
        """That inside."""
        return self.linear_fc1

    def forward(self, x_ND: Tensor | Rows) -> Tensor:
        """[N, width] to [N, width]."""
        return only(self.linear_fc2(TANH.of(self.linear_fc1, x_ND)))


class Merger(nn.Module):
    """merge x merge neighbouring patches to one feature of the language model's width, normed patch
    by patch or, with `together`, as one."""

    def __init__(self, geometry: VisionGeometry, *, together: bool) -> None:
        super().__init__()
        self.merged_width = geometry.width * geometry.merge**2
        self.normed_width = self.merged_width if together else geometry.width
        self.norm = _norm(self.normed_width)
        width = self.merged_width
        self.linear_fc1 = GroupedLinear(width, {"linear_fc1": width}, bias=True)
        self.linear_fc2 = GroupedLinear(width, {"linear_fc2": geometry.out_width}, bias=True)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, width], patches of a square next to each other, to [M, out_width]."""
        normed = self.norm(x_ND.view(-1, self.normed_width)).view(-1, self.merged_width)
        return only(self.linear_fc2(F.gelu(only(self.linear_fc1(normed)))))


class DeepstackTower(VisionTower):
    """Adds to each patch what a square table of `side` x `side` learned places says of its own, and
    merges the outputs of the blocks `deepstack` as well as the last one's."""

    def __init__(
        self, geometry: VisionGeometry, pixels: Pixels, side: int, deepstack: tuple[int, ...]
    ) -> None:
        def block() -> VisionBlock:
            return VisionBlock(geometry, _norm, Mlp(geometry.width, geometry.mlp_width))

        merger = Merger(geometry, together=False)
        super().__init__(geometry, pixels, block, merger, patch_bias=True)
        self.side = side
        self.pos_embed = empty_table(side**2, geometry.width)
        self.deepstack = deepstack
        self.deepstack_merger_list.extend(Merger(geometry, together=True) for _ in deepstack)

    def placed(self, x_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        """The table stretched over each picture, corners on corners, between its four nearest."""
        places = [table_places(grid, self.geometry.merge, self.side) for grid in grids]
        at_N4, shares_N4 = (
            upload(np.concatenate(arrays), x_ND.device) for arrays in zip(*places, strict=True)
        )
        # In fp32: the four shares are what bf16 would round first.
        table_PD = self.pos_embed.weight.to(shares_N4.dtype)
        added_ND = F.embedding_bag(at_N4, table_PD, per_sample_weights=shares_N4, mode="sum")
        return x_ND + added_ND.to(x_ND.dtype)


@array_cache()
def table_places(
    grid: Grid, merge: int, side: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each patch, in the tower's order, the four nearest places of the table and their shares
    (bilinear interpolation), both [N, 4]."""
    row_column = positions_by_square(grid, merge).reshape(-1, 2)
    lasts = np.array([grid[1] - 1, grid[2] - 1])
    # A grid of one row or column looks at the table's first.
    at_N2 = row_column * ((side - 1) / np.maximum(lasts, 1))
    low_N2 = np.minimum(at_N2.astype(np.int64), side - 1)
    high_N2 = np.minimum(low_N2 + 1, side - 1)
    share_N2 = at_N2 - low_N2
    rows = np.stack([low_N2[:, 0], low_N2[:, 0], high_N2[:, 0], high_N2[:, 0]], 1)
    columns = np.stack([low_N2[:, 1], high_N2[:, 1]] * 2, 1)
    down, across = share_N2[:, :1], share_N2[:, 1:]
    shares = np.concatenate(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], 1
    )
    return rows * side + columns, shares.astype(np.float32)


def interleaved(sections: tuple[int, ...]) -> tuple[int, ...]:
    """Frequencies in turn to time, height and width, as long as height and width have any left of
    theirs; the others to time."""
    return tuple(n % 3 if n < 3 * sections[n % 3] else 0 for n in range(sum(sections)))


def language(config: Settings) -> LanguageGeometry:
    """From `text_config`."""
    text = text_settings(config)
    text.require("attention_bias", False, (False,))
    rope_settings(text).require("mrope_interleaved", True, (True,))
    return read_language(
        config, head_width=text.whole("head_dim", 128), normed_heads=True, rows=interleaved
    )


def vision_tower(config: Settings, pixels: Pixels) -> VisionTower:
    """From `vision_config`."""
    vision = config.section("vision_config")
    vision.require("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    geometry = read_vision(vision)
    places = vision.whole("num_position_embeddings")
    side = round(places**0.5)
    if side**2 != places:
        vision.refuse("num_position_embeddings", "a square number")
    deepstack = vision.wholes("deepstack_visual_indexes")
    if sorted(set(deepstack)) != list(deepstack) or any(n >= geometry.depth for n in deepstack):
        vision.refuse("deepstack_visual_indexes", f"rising numbers below {geometry.depth}")
    depth = text_settings(config).whole("num_hidden_layers")
    if len(deepstack) >= depth:
        vision.refuse("deepstack_visual_indexes", f"fewer than the {depth} decoder layers")
    return DeepstackTower(geometry, pixels, side, deepstack)


ARCHITECTURE = Architecture(language, vision_tower, TRANSFORMERS_5)
