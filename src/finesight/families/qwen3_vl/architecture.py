"""Qwen3-VL (Bai et al. 2025, Qwen3-VL Technical Report): vision encoder and Qwen3 decoder.

The vision encoder has trained position embeddings. Features of intermediate blocks are added to the
first decoder layers (DeepStack).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.batch import copy_to_device
from finesight.model.config import (
    ConfigReader,
    DecoderConfig,
    PixelNormalization,
    VisionConfig,
    get_rope_config,
    get_text_config,
    parse_decoder_config,
    parse_vision_config,
)
from finesight.model.families import TRANSFORMERS_V5_PREFIXES, Architecture
from finesight.model.layers import TANH_GELU, GeluMlp, VisionBlock, empty_embedding
from finesight.model.linear import FusedLinear, single_output
from finesight.model.vision_encoder import MAX_CACHED_GRIDS, VisionEncoder, patch_coordinates
from finesight.vision.image_processing import GridTHW

_norm = partial(nn.LayerNorm, eps=1e-6)


class DeepstackMerger(nn.Module):
    """Merger of `merge_size` x `merge_size` adjacent patches into one feature."""

    def __init__(self, config: VisionConfig, *, use_postshuffle_norm: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.merge_size**2
        self.norm_size = self.merged_size if use_postshuffle_norm else config.hidden_size
        self.norm = _norm(self.norm_size)
        merged_size = self.merged_size
        self.linear_fc1 = FusedLinear(merged_size, {"linear_fc1": merged_size}, bias=True)
        self.linear_fc2 = FusedLinear(
            merged_size, {"linear_fc2": config.out_hidden_size}, bias=True
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        normed = self.norm(x_ND.view(-1, self.norm_size)).view(-1, self.merged_size)
        return single_output(self.linear_fc2(F.gelu(single_output(self.linear_fc1(normed)))))


class DeepstackVisionEncoder(VisionEncoder):
    """Vision encoder of Qwen3-VL, with interpolated position embeddings and DeepStack mergers."""

    def __init__(
        self,
        config: VisionConfig,
        normalization: PixelNormalization,
        grid_size: int,
        deepstack_indexes: tuple[int, ...],
    ) -> None:
        sizes = (config.hidden_size, config.intermediate_size, config.hidden_size)
        mlp = partial(GeluMlp, sizes, ("linear_fc1", "linear_fc2"), TANH_GELU)
        block = partial(VisionBlock, config, _norm, mlp)
        merger = DeepstackMerger(config, use_postshuffle_norm=False)
        super().__init__(config, normalization, block, merger, patch_bias=True)
        self.position_grid_size = grid_size
        self.pos_embed = empty_embedding(grid_size**2, config.hidden_size)
        self.deepstack_indexes = deepstack_indexes
        self.deepstack_merger_list.extend(
            DeepstackMerger(config, use_postshuffle_norm=True) for _ in deepstack_indexes
        )

    def add_position_embeddings(self, x_ND: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        """Add position embeddings, interpolated bilinearly from the trained table to each image."""
        interpolations = [
            interpolate_positions(grid, self.config.merge_size, self.position_grid_size)
            for grid in grid_thw
        ]
        indices_N4, weights_N4 = (
            copy_to_device(np.concatenate(arrays), x_ND.device)
            for arrays in zip(*interpolations, strict=True)
        )
        # Interpolate in fp32: bf16 would round the four weights first.
        table_PD = self.pos_embed.weight.to(weights_N4.dtype)
        position_embeddings_ND = F.embedding_bag(
            indices_N4, table_PD, per_sample_weights=weights_N4, mode="sum"
        )
        return x_ND + position_embeddings_ND.to(x_ND.dtype)


@lru_cache(maxsize=MAX_CACHED_GRIDS)
def interpolate_positions(
    grid: GridTHW, merge_size: int, grid_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the four table entries around each patch and their bilinear weights."""
    row_column = patch_coordinates(grid, merge_size).reshape(-1, 2)
    last_indices = np.array([grid[1] - 1, grid[2] - 1])
    # A single row or column would be at 0 * inf = NaN. It is at 0, as by `torch.linspace` in
    # transformers.
    coordinates_N2 = row_column * ((grid_size - 1) / np.maximum(last_indices, 1))
    low_N2 = np.minimum(coordinates_N2.astype(np.int64), grid_size - 1)
    high_N2 = np.minimum(low_N2 + 1, grid_size - 1)
    fraction_N2 = coordinates_N2 - low_N2
    rows = np.stack([low_N2[:, 0], low_N2[:, 0], high_N2[:, 0], high_N2[:, 0]], 1)
    columns = np.stack([low_N2[:, 1], high_N2[:, 1], low_N2[:, 1], high_N2[:, 1]], 1)
    row_fraction = fraction_N2[:, :1]
    column_fraction = fraction_N2[:, 1:]
    weights = np.concatenate(
        [
            (1 - row_fraction) * (1 - column_fraction),
            (1 - row_fraction) * column_fraction,
            row_fraction * (1 - column_fraction),
            row_fraction * column_fraction,
        ],
        1,
    )
    return rows * grid_size + columns, weights.astype(np.float32)


def interleaved_mrope_axes(sections: tuple[int, ...]) -> tuple[int, ...]:
    """Assign rotary frequencies to the axes time, height and width in turn (interleaved M-RoPE)."""
    axes = []
    for index in range(sum(sections)):
        axis = index % 3
        # Frequencies after the end of a shorter section belong to time.
        axes.append(axis if index < 3 * sections[axis] else 0)
    return tuple(axes)


def parse_qwen3_decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    text = get_text_config(hf_config)
    text.require_supported("attention_bias", False, (False,))
    get_rope_config(text).require_supported("mrope_interleaved", True, (True,))
    return parse_decoder_config(
        hf_config,
        head_dim=text.get_int("head_dim", 128),
        use_qk_norm=True,
        mrope_axes=interleaved_mrope_axes,
    )


def build_vision_encoder(
    hf_config: ConfigReader, normalization: PixelNormalization
) -> VisionEncoder:
    vision = hf_config.section("vision_config")
    vision.require_supported("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
    config = parse_vision_config(vision)
    num_positions = vision.get_int("num_position_embeddings")
    grid_size = round(num_positions**0.5)
    if grid_size**2 != num_positions:
        vision.raise_invalid("num_position_embeddings", "a square number")
    # The config class of Qwen3.5 in transformers has no DeepStack.
    deepstack_indexes: tuple[int, ...] = ()
    if vision.has("deepstack_visual_indexes"):
        deepstack_indexes = vision.get_ints("deepstack_visual_indexes")
    is_ascending = sorted(set(deepstack_indexes)) == list(deepstack_indexes)
    if not is_ascending or max(deepstack_indexes, default=-1) >= config.num_layers:
        vision.raise_invalid(
            "deepstack_visual_indexes", f"ascending indices below {config.num_layers}"
        )
    num_decoder_layers = get_text_config(hf_config).get_int("num_hidden_layers")
    if len(deepstack_indexes) >= num_decoder_layers:
        vision.raise_invalid(
            "deepstack_visual_indexes", f"fewer than the {num_decoder_layers} decoder layers"
        )
    return DeepstackVisionEncoder(config, normalization, grid_size, deepstack_indexes)


ARCHITECTURE = Architecture(
    parse_qwen3_decoder_config, build_vision_encoder, TRANSFORMERS_V5_PREFIXES
)
