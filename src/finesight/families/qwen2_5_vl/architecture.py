"""Qwen2.5-VL vision encoder (Bai et al. 2025): gated MLPs, RMS norms and window attention.

Most blocks attend within windows of 112 x 112 pixels, a few to the full frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from finesight.encode.batch import copy_to_device
from finesight.model.config import (
    ConfigReader,
    PixelNormalization,
    VisionConfig,
    parse_decoder_config,
    parse_vision_config,
)
from finesight.model.families import Architecture
from finesight.model.layers import GatedMlp, PatchMerger, RmsNorm, VisionBlock
from finesight.model.vision_encoder import (
    MAX_CACHED_GRIDS,
    PatchLayout,
    VisionEncoder,
    frame_lengths,
    patch_coordinates,
)
from finesight.vision.image_processing import GridTHW

_norm = partial(RmsNorm, eps=1e-6)


class WindowVisionEncoder(VisionEncoder):
    """Vision encoder of Qwen2.5-VL with window attention."""

    supports_cuda_graphs = True

    def __init__(
        self,
        config: VisionConfig,
        normalization: PixelNormalization,
        window_size: int,
        full_attention_blocks: tuple[int, ...],
    ) -> None:
        mlp = partial(GatedMlp, config.hidden_size, config.intermediate_size, bias=True)
        block = partial(VisionBlock, config, _norm, mlp)
        merger = PatchMerger(config, _norm(config.hidden_size))
        super().__init__(config, normalization, block, merger)
        self.window_size = window_size
        self.full_attention_blocks = full_attention_blocks
        num_windowed = config.num_layers - len(full_attention_blocks)
        patches_per_window = (window_size * config.merge_size) ** 2
        self.window_attention = (num_windowed, patches_per_window)

    def compute_patch_layout(
        self, grid_thw: Sequence[GridTHW], device: torch.device
    ) -> PatchLayout:
        merge_size = self.config.merge_size
        orders = []
        positions = []
        num_squares = 0
        for grid in grid_thw:
            order, _ = window_order(grid, merge_size, self.window_size)
            positions.append(patch_coordinates(grid, merge_size)[order])
            orders.append(order + num_squares)
            num_squares += len(order)
        order = np.concatenate(orders)
        return PatchLayout(
            copy_to_device(np.concatenate(positions).reshape(-1, 2), device),
            self.build_segments(grid_thw, device),
            copy_to_device(order, device),
            copy_to_device(np.argsort(order), device),
        )

    def segment_lengths(self, grid_thw: Sequence[GridTHW]) -> tuple[tuple[int, ...], ...]:
        merge_size = self.config.merge_size
        window_patches: list[int] = []
        for grid in grid_thw:
            _, window_squares = window_order(grid, merge_size, self.window_size)
            window_patches += (window_squares * merge_size**2).tolist()
        # Blocks of one kind share their tuple, and with it their segments.
        window_lengths = tuple(window_patches)
        full_lengths = frame_lengths(grid_thw)
        return tuple(
            full_lengths if block_index in self.full_attention_blocks else window_lengths
            for block_index in range(self.config.num_layers)
        )


@lru_cache(maxsize=MAX_CACHED_GRIDS)
def window_order(
    grid: GridTHW, merge_size: int, window_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order of merged patch squares by window, and the window sizes."""
    num_frames, patch_rows, patch_columns = grid
    height = patch_rows // merge_size
    width = patch_columns // merge_size
    frame, row, column = np.indices((num_frames, height, width)).reshape(3, -1)
    num_window_rows = -(-height // window_size)
    num_window_columns = -(-width // window_size)
    window_row = frame * num_window_rows + row // window_size
    window_ids = window_row * num_window_columns + column // window_size
    return np.argsort(window_ids, kind="stable"), np.bincount(window_ids)


def build_vision_encoder(
    hf_config: ConfigReader, normalization: PixelNormalization
) -> VisionEncoder:
    vision = hf_config.section("vision_config")
    vision.require_supported("hidden_act", "silu", ("silu",))
    config = parse_vision_config(vision)
    square_pixels = config.patch_size * config.merge_size
    window_size = vision.get_int("window_size") // square_pixels
    if window_size < 1:
        vision.raise_invalid("window_size", f"at least {square_pixels} pixels")
    return WindowVisionEncoder(
        config, normalization, window_size, vision.get_ints("fullatt_block_indexes")
    )


ARCHITECTURE = Architecture(parse_decoder_config, build_vision_encoder)
