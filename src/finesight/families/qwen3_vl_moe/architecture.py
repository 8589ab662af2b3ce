"""Qwen3-VL with experts: every MLP of the decoder is a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from finesight.families.qwen3_vl.architecture import (
    build_vision_encoder,
    parse_qwen3_decoder_config,
)
from finesight.model.config import ConfigReader, DecoderConfig, MoeConfig, get_text_config
from finesight.model.families import TRANSFORMERS_V5_PREFIXES, Architecture


def parse_moe_config(text: ConfigReader) -> MoeConfig:
    """Parse and validate the settings of the experts, without a shared one."""
    text.require_supported("mlp_only_layers", (), ((), []))
    # transformers 5 uses the second name.
    num_experts_key = "num_experts" if text.has("num_experts") else "num_local_experts"
    moe_config = MoeConfig(
        num_experts=text.get_int(num_experts_key),
        num_experts_per_tok=text.get_int("num_experts_per_tok"),
        intermediate_size=text.get_int("moe_intermediate_size"),
    )
    if moe_config.num_experts_per_tok > moe_config.num_experts:
        text.raise_invalid("num_experts_per_tok", f"at most the {moe_config.num_experts} experts")
    if moe_config.intermediate_size % 8 or text.get_int("hidden_size") % 8:
        text.raise_invalid(
            "moe_intermediate_size", "a multiple of 8, as hidden_size, for grouped matmuls"
        )
    return moe_config


def parse_qwen3_moe_decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    text = get_text_config(hf_config)
    text.require_supported("decoder_sparse_step", 1, (1,))
    text.require_supported("norm_topk_prob", True, (True,))
    return replace(parse_qwen3_decoder_config(hf_config), moe=parse_moe_config(text))


ARCHITECTURE = Architecture(
    parse_qwen3_moe_decoder_config, build_vision_encoder, TRANSFORMERS_V5_PREFIXES
)
