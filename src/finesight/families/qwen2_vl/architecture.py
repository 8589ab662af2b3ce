"""Qwen2-VL vision encoder (Wang et al. 2024): pre-norm blocks with attention over full frames."""

from __future__ import annotations

from functools import partial

from torch import nn

from finesight.model.config import (
    ConfigReader,
    PixelNormalization,
    parse_decoder_config,
    parse_vision_config,
)
from finesight.model.families import Architecture
from finesight.model.layers import QUICK_GELU, GeluMlp, PatchMerger, VisionBlock
from finesight.model.vision_encoder import VisionEncoder

_norm = partial(nn.LayerNorm, eps=1e-6)


def build_vision_encoder(
    hf_config: ConfigReader, normalization: PixelNormalization
) -> VisionEncoder:
    vision = hf_config.section("vision_config")
    vision.require_supported("hidden_act", "quick_gelu", ("quick_gelu",))
    config = parse_vision_config(
        vision,
        hidden_size_key="embed_dim",
        out_hidden_size_key="hidden_size",
        intermediate_size=int(vision.get_int("embed_dim") * vision.get_float("mlp_ratio")),
    )
    sizes = (config.hidden_size, config.intermediate_size, config.hidden_size)
    mlp = partial(GeluMlp, sizes, ("fc1", "fc2"), QUICK_GELU)
    block = partial(VisionBlock, config, _norm, mlp)
    merger = PatchMerger(config, _norm(config.hidden_size))
    encoder = VisionEncoder(config, normalization, block, merger)
    encoder.supports_cuda_graphs = True
    return encoder


ARCHITECTURE = Architecture(parse_decoder_config, build_vision_encoder)
