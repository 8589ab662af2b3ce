"""Qwen3-VL with a mixture of experts in every decoder layer."""

from __future__ import annotations

from dataclasses import replace

from finesight.model.config import ConfigReader, DecoderConfig, MoeConfig, get_text_config
from finesight.model.families import qwen3_vl
from finesight.model.families.architecture import TRANSFORMERS_V5_PREFIXES, Architecture


def parse_qwen3_moe_decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Parse the config of the Qwen3 decoder with experts from `text_config`."""
    text = get_text_config(hf_config)
    text.require_supported("decoder_sparse_step", 1, (1,))
    text.require_supported("mlp_only_layers", (), ((), []))
    text.require_supported("norm_topk_prob", True, (True,))
    moe_config = MoeConfig(
        # transformers 5 uses the second name.
        num_experts=text.get_int("num_experts" if text.has("num_experts") else "num_local_experts"),
        num_experts_per_tok=text.get_int("num_experts_per_tok"),
        intermediate_size=text.get_int("moe_intermediate_size"),
    )
    if moe_config.num_experts_per_tok > moe_config.num_experts:
        text.raise_invalid("num_experts_per_tok", f"at most the {moe_config.num_experts} experts")
    if moe_config.intermediate_size % 8 or text.get_int("hidden_size") % 8:
        text.raise_invalid(
            "moe_intermediate_size", "a multiple of 8, as hidden_size, for grouped matmuls"
        )
    return replace(qwen3_vl.parse_qwen3_decoder_config(hf_config), moe=moe_config)


ARCHITECTURE = Architecture(
    parse_qwen3_moe_decoder_config, qwen3_vl.build_vision_encoder, TRANSFORMERS_V5_PREFIXES
)
