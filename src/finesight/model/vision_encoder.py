"""Base class of vision encoders: patch embedding, blocks, mergers and patch layout.

Shapes: N patches, D hidden size, M merged patch squares, K features of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.batch import copy_to_device
from finesight.model.attention import Segments
from finesight.model.config import PixelNormalization, VisionConfig
from finesight.model.layers import (
    PatchEmbed,
    compute_vision_rope,
    num_checkpointed_layers,
    run_layer,
)
from finesight.vision.image_processing import GridTHW

MAX_CACHED_GRIDS = 128
"""Number of image sizes whose patch indices are cached. Callers must not modify the arrays."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class PatchLayout:
    """Patch order and attention segments for the images of a packed batch."""

    position_ids_N2: Tensor
    segments: tuple[Segments, ...]
    window_index_M: Tensor | None = None
    reverse_index_M: Tensor | None = None


class VisionEncoder(nn.Module):
    """Base class of vision encoders."""

    supports_cuda_graphs = False
    """True if training steps can capture the encoder as a CUDA graph (see
    `train.graph_buffers`). This requires that only the patch layout depends on image sizes:
    position embeddings ignore the grids, and segments are frames or windows."""

    supports_padding = True
    """True if a packed batch may end with padding patches, which form an image of any size."""

    window_attention = (0, 0)
    """Number of blocks with window attention, and patches per window; 0 without windows."""

    def __init__(
        self,
        config: VisionConfig,
        normalization: PixelNormalization,
        block_factory: Callable[[], nn.Module],
        merger: nn.Module,
        *,
        patch_bias: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, normalization, bias=patch_bias)
        self.blocks = nn.ModuleList(block_factory() for _ in range(config.num_layers))
        self.merger = merger
        self.deepstack_indexes: tuple[int, ...] = ()
        """Indices of the blocks whose outputs are also merged, by `deepstack_merger_list`
        (DeepStack)."""
        self.deepstack_merger_list = nn.ModuleList()

    def compute_patch_layout(
        self, grid_thw: Sequence[GridTHW], device: torch.device
    ) -> PatchLayout:
        """Return the patch layout of images or videos: frame by frame, in packed order."""
        merge_size = self.config.merge_size
        coordinates = np.concatenate([patch_coordinates(grid, merge_size) for grid in grid_thw])
        return PatchLayout(
            copy_to_device(coordinates.reshape(-1, 2), device),
            self.build_segments(grid_thw, device),
        )

    def segment_lengths(self, grid_thw: Sequence[GridTHW]) -> tuple[tuple[int, ...], ...]:
        """Return the attention segment lengths of each block, by default one segment per frame."""
        return (frame_lengths(grid_thw),) * self.config.num_layers

    def build_segments(
        self, grid_thw: Sequence[GridTHW], device: torch.device
    ) -> tuple[Segments, ...]:
        lengths_by_block = self.segment_lengths(grid_thw)
        # A CUDA graph has one buffer per distinct tuple of lengths, so blocks with the same tuple
        # must have the same segments.
        segments_by_id: dict[int, Segments] = {}
        for block_lengths in unique_objects(lengths_by_block):
            segments_by_id[id(block_lengths)] = Segments.from_lengths(block_lengths, device)
        return tuple(segments_by_id[id(lengths)] for lengths in lengths_by_block)

    def add_position_embeddings(self, x_ND: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        """Add the position embeddings of the family to the embedded patches; none by default."""
        return x_ND

    @property
    def features_per_token(self) -> int:
        return 1 + len(self.deepstack_indexes)

    @property
    def min_grid(self) -> GridTHW:
        return 1, self.config.merge_size, self.config.merge_size

    @property
    def is_encoder_trainable(self) -> bool:
        """True if any parameter before the mergers is trainable, including adapters."""
        mergers = chain(self.merger.parameters(), self.deepstack_merger_list.parameters())
        merger_ids = {id(p) for p in mergers}
        return any(p.requires_grad for p in self.parameters() if id(p) not in merger_ids)

    def forward(
        self,
        patches_ND: Tensor,
        grid_thw: Sequence[GridTHW],
        activation_checkpointing: float = 0.0,
        layout: PatchLayout | None = None,
    ) -> Tensor:
        """Encode packed image patches.

        Returns:
            Features [M, K, out_width]: those of the last block, then those of the DeepStack blocks.
        """
        if layout is None:
            expected = sum(map(math.prod, grid_thw))
            assert len(patches_ND) == expected, f"{len(patches_ND)} patches for grids of {expected}"
            layout = self.compute_patch_layout(grid_thw, patches_ND.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_encoder_trainable):
            # Reorder uint8 patches, the smallest representation; the copy is freed afterwards.
            x_ND = self.patch_embed(self._reorder_patches(patches_ND, layout.window_index_M))
            x_ND = self.add_position_embeddings(x_ND, grid_thw)
            rotary = compute_vision_rope(layout.position_ids_N2, self.config)
            deepstack_hidden = []
            y_ND = None
            num_checkpointed = num_checkpointed_layers(activation_checkpointing, len(self.blocks))
            for block_index, segments in enumerate(layout.segments):
                block = self.blocks[block_index]
                x_ND, y_ND = run_layer(
                    block, block_index < num_checkpointed, x_ND, y_ND, rotary, segments
                )
                if block_index in self.deepstack_indexes:
                    x_ND = x_ND + y_ND
                    y_ND = None
                    deepstack_hidden.append(x_ND)
            if y_ND is not None:
                x_ND = x_ND + y_ND
        merged = [self.merger(x_ND)]
        for merger, h_ND in zip(self.deepstack_merger_list, deepstack_hidden, strict=True):
            merged.append(merger(h_ND))
        features_MKD = torch.stack(merged, 1)
        if layout.reverse_index_M is None:
            return features_MKD
        return features_MKD.index_select(0, layout.reverse_index_M)

    def _reorder_patches(self, patches_ND: Tensor, window_index_M: Tensor | None) -> Tensor:
        if window_index_M is None:
            return patches_ND
        squares = torch.unflatten(patches_ND, 0, (-1, self.config.merge_size**2))
        return squares.index_select(0, window_index_M).flatten(0, 1)


def frame_lengths(grid_thw: Sequence[GridTHW]) -> tuple[int, ...]:
    """Return the number of patches of each frame."""
    lengths: list[int] = []
    for num_frames, height, width in grid_thw:
        lengths += [height * width] * num_frames
    return tuple(lengths)


def unique_objects(objects: Iterable[ItemT]) -> list[ItemT]:
    """Return the distinct objects by identity, in order."""
    return list({id(item): item for item in objects}.values())


@lru_cache(maxsize=MAX_CACHED_GRIDS)
def patch_coordinates(grid: GridTHW, merge_size: int) -> NDArray[np.int32]:
    """Return row and column of each patch, [M, merge x merge, 2]."""
    frames, height, width = grid
    row_column = np.moveaxis(np.indices((height, width), dtype=np.int32), 0, -1)
    squares = row_column.reshape(
        height // merge_size, merge_size, width // merge_size, merge_size, 2
    ).swapaxes(1, 2)
    return np.tile(squares.reshape(-1, merge_size**2, 2), (frames, 1, 1))
