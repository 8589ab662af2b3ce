"""Models with random weights, for pretraining, tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finesight.model.config import ConfigReader
from finesight.model.families.qwen3_5 import GatedDeltaNet
from finesight.model.families.qwen_vl import AttentionPool
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS

MIN_DECAY = 0.01
"""Smallest initial decay of the heads of linear attention; the largest is 1."""


@torch.no_grad()
def init_random_model(
    config: Mapping[str, object],
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    preprocessor: Mapping[str, object] = PREPROCESSOR_DEFAULTS,
) -> VisionLanguageModel:
    """Build a model with random weights, which depend on seed, dtype and device type.

    Weights and biases are normal with standard deviation 0.02, norm weights one, norm biases zero.
    """
    model = build_model(
        ConfigReader(config), ConfigReader(preprocessor, "preprocessor_config.json"), dtype, device
    )
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
                parameter.normal_(0.0, 0.02, generator=generator)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        if isinstance(module, AttentionPool):
            num_queries, hidden_size = module.pos_embed.shape
            positions = sincos_positions(math.isqrt(num_queries), hidden_size)
            module.pos_embed.copy_(torch.from_numpy(positions))
        if isinstance(module, GatedDeltaNet):
            log_decay_H = torch.linspace(math.log(MIN_DECAY), 0.0, len(module.A_log))
            module.A_log.copy_(log_decay_H)
    return model


def sincos_positions(grid_size: int, embedding_dim: int) -> NDArray[np.float32]:
    """Return 2-D sine-cosine position embeddings, [grid_size x grid_size, embedding_dim]."""
    frequencies = 10000.0 ** (
        -np.arange(embedding_dim // 4, dtype=np.float32) / (embedding_dim / 4)
    )
    angles_SF = np.arange(grid_size, dtype=np.float32)[:, None] * frequencies
    axis_SD = np.concatenate([np.sin(angles_SF), np.cos(angles_SF)], axis=1)
    columns, rows = np.tile(axis_SD, (grid_size, 1)), np.repeat(axis_SD, grid_size, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)
