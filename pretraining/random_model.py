"""Models with random weights or grown from a smaller one, for pretraining, tests, benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from finesight.families.qwen.architecture import AttentionPool
from finesight.files.storage import write_folder
from finesight.model.config import ConfigReader
from finesight.model.hybrid_decoder import GatedDeltaNet
from finesight.model.vlm import VisionLanguageModel, build_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder

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


EXTRA_LAYERS, SYMMETRY_NOISE = 3, 0.5
"""Decoder layers that `grow_model` appends; relative noise of the weights of duplicated inputs."""


def grow_model(folder: ModelFolder, output_dir: Path, seed: int = 0) -> Path:
    """Write a Qwen2-VL of twice the width that computes the same function (Chen et al. 2016).

    Every hidden unit and attention head is duplicated, and the weights of the two copies of an
    input add up to the original weight. They differ by random noise, so that training separates the
    copies. Appended decoder layers copy the last one with zero output projections.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for path in folder.path.glob("*.safetensors"):
        weights |= load_file(path)
    config = json.loads((folder.path / "config.json").read_text())
    grown = {name: _widen(name, weight.float(), generator) for name, weight in weights.items()}
    last = config["num_hidden_layers"] - 1
    for number in range(last + 1, last + 1 + EXTRA_LAYERS):
        for name in [name for name in grown if name.startswith(f"model.layers.{last}.")]:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            copied = torch.zeros_like(grown[name]) if is_output else grown[name].clone()
            grown[name.replace(f".{last}.", f".{number}.", 1)] = copied
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        config[key] *= 2
    for key in ("embed_dim", "hidden_size", "num_heads"):
        config["vision_config"][key] *= 2
    config["num_hidden_layers"] += EXTRA_LAYERS
    config["max_window_layers"] = config["num_hidden_layers"]
    with write_folder(output_dir) as written:
        for path in folder.path.glob("*.json"):
            if path.name not in ("sha256.json", "model.safetensors.index.json"):
                (written / path.name).write_bytes(path.read_bytes())
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: weight.bfloat16().contiguous() for name, weight in grown.items()}
        save_file(tensors, written / "model.safetensors", {"format": "pt"})
    return output_dir


def _widen(name: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Duplicate the outputs of a weight, and split it between the two copies of its inputs."""
    groups = 3 if ".qkv." in name else 1
    outputs = weight.unflatten(0, (groups, -1))
    wide = torch.cat([outputs, outputs], dim=1).flatten(0, 1)
    if name == "model.norm.weight":
        # The tied output head adds both copies.
        return wide / 2
    if name == "model.embed_tokens.weight":
        return torch.cat([weight, weight], dim=1)
    if weight.dim() != 2:
        return wide
    # The first layer of the merger reads four patches, each with its own copies.
    blocks = 4 if name == "visual.merger.mlp.0.weight" else 1
    halves = wide.unflatten(1, (blocks, -1)) / 2
    noise = torch.randn(halves.shape, generator=generator) * (SYMMETRY_NOISE * halves.std())
    return torch.cat([halves + noise, halves - noise], dim=2).flatten(1)
