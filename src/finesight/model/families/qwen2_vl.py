"""Qwen2-VL vision encoder (Wang et al. 2024): pre-norm blocks with attention over full frames."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from finesight.model.config import (
    ConfigReader,
    PixelNormalization,
    parse_decoder_config,
    parse_vision_config,
)
from finesight.model.families import Architecture
from finesight.model.layers import QUICK_GELU, FeedForward, PatchMerger, VisionBlock
from finesight.model.linear import FusedLinear, single_output
from finesight.model.quant.base import Fp8Rows
from finesight.model.quant.fp8 import quantize_fp8
from finesight.model.vision_encoder import VisionEncoder

_norm = partial(nn.LayerNorm, eps=1e-6)


class Qwen2VisionMlp(FeedForward):
    """MLP of a vision block: fc2(quick_gelu(fc1(x))), with quick_gelu(x) = x sigmoid(1.702 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = FusedLinear(hidden_size, {"fc1": intermediate_size}, bias=True)
        self.fc2 = FusedLinear(intermediate_size, {"fc2": hidden_size}, bias=True)

    def forward(self, x_ND: Tensor | Fp8Rows) -> Tensor:
        if self.fc2.accepts_fp8_input:
            hidden_ND = single_output(self.fc1(x_ND))
            return single_output(self.fc2(quantize_fp8(hidden_ND, gelu=True)))
        return single_output(self.fc2(QUICK_GELU.apply_linear(self.fc1, x_ND)))


def build_vision_encoder(
    hf_config: ConfigReader, normalization: PixelNormalization
) -> VisionEncoder:
    vision = hf_config.section("vision_config")
    vision.require_supported("hidden_act", "quick_gelu", ("quick_gelu",))
    intermediate_size = int(vision.get_int("embed_dim") * vision.get_float("mlp_ratio"))
    config = parse_vision_config(
        vision,
        hidden_size_key="embed_dim",
        out_hidden_size_key="hidden_size",
        intermediate_size=intermediate_size,
    )

    def block() -> VisionBlock:
        return VisionBlock(config, _norm, Qwen2VisionMlp(config.hidden_size, intermediate_size))

    encoder = VisionEncoder(
        config, normalization, block, PatchMerger(config, _norm(config.hidden_size))
    )
    encoder.supports_cuda_graphs = True
    return encoder


ARCHITECTURE = Architecture(parse_decoder_config, build_vision_encoder)
