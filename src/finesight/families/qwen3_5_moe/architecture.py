"""Qwen3.5, Qwen3.6 and Qwen3.8 with experts, one of which is shared by all tokens."""

from __future__ import annotations

from dataclasses import replace

from finesight.families.qwen3_5 import architecture as dense
from finesight.families.qwen3_vl_moe.architecture import parse_moe_config
from finesight.model.config import ConfigReader, DecoderConfig, get_text_config


def parse_hybrid_moe_decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    text = get_text_config(hf_config)
    shared_size = text.get_int("shared_expert_intermediate_size")
    moe_config = replace(parse_moe_config(text), shared_intermediate_size=shared_size)
    decoder_config = dense.parse_hybrid_decoder_config(hf_config, moe_config.intermediate_size)
    return replace(decoder_config, moe=moe_config)


ARCHITECTURE = replace(dense.ARCHITECTURE, parse_decoder_config=parse_hybrid_moe_decoder_config)
