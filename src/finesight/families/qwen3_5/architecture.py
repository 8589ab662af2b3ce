"""Qwen3.5, Qwen3.6 and Qwen3.8: hybrid decoder of Gated DeltaNet and gated attention layers.

Three of four decoder layers are linear attention layers (Gated DeltaNet, Yang et al. 2024). The
vision encoder is that of Qwen3-VL without DeepStack. Weights of multi-token prediction (MTP) are
copied unchanged from the source folder when a model is saved.
"""

from __future__ import annotations

from dataclasses import replace

from finesight.families.qwen3_vl.architecture import build_vision_encoder, interleaved_mrope_axes
from finesight.model.config import (
    ConfigReader,
    DecoderConfig,
    LinearAttentionConfig,
    get_rope_config,
    get_text_config,
    parse_decoder_config,
)
from finesight.model.families import TRANSFORMERS_V5_PREFIXES, Architecture
from finesight.model.hybrid_decoder import HybridDecoder

_LAYER_TYPES = ("linear_attention", "full_attention")


def parse_hybrid_decoder_config(
    hf_config: ConfigReader, intermediate_size: int | None = None
) -> DecoderConfig:
    text = get_text_config(hf_config)
    rope = get_rope_config(text)
    text.require_supported("attention_bias", False, (False,))
    text.require_supported("attn_output_gate", True, (True,))
    # Gate of the linear attention layers; full attention always has a sigmoid gate.
    text.require_supported("output_gate_type", "swish", ("swish", "silu"))
    rope.require_supported("mrope_interleaved", True, (True,))
    head_dim = text.get_int("head_dim", 256)
    rotary_factor = rope.get_float(
        "partial_rotary_factor", text.get_float("partial_rotary_factor", 0.25)
    )
    rotary_dim = int(head_dim * rotary_factor)
    if rotary_factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        rope.raise_invalid(
            "partial_rotary_factor", f"a fraction that makes head_dim {head_dim} an even number"
        )
    config = parse_decoder_config(
        hf_config,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        intermediate_size=intermediate_size,
        use_qk_norm=True,
        mrope_axes=interleaved_mrope_axes,
    )
    return replace(config, linear_attention=_parse_linear_attention(text, config.num_layers))


def _parse_linear_attention(text: ConfigReader, num_layers: int) -> LinearAttentionConfig:
    if text.has("layer_types"):
        layer_types = text.get_strs("layer_types")
        full_layers = tuple(n for n, name in enumerate(layer_types) if name == "full_attention")
        if len(layer_types) != num_layers or not {*layer_types} <= {*_LAYER_TYPES}:
            text.raise_invalid("layer_types", f"{num_layers} of {' or '.join(_LAYER_TYPES)}")
    else:
        interval = text.get_int("full_attention_interval", 4)
        full_layers = tuple(range(interval - 1, num_layers, interval))
    if not full_layers:
        text.raise_invalid("layer_types", "at least one layer with full attention")
    config = LinearAttentionConfig(
        full_attention_layers=full_layers,
        num_key_heads=text.get_int("linear_num_key_heads"),
        num_value_heads=text.get_int("linear_num_value_heads"),
        key_head_dim=text.get_int("linear_key_head_dim"),
        value_head_dim=text.get_int("linear_value_head_dim"),
        conv_kernel_size=text.get_int("linear_conv_kernel_dim", 4),
    )
    if config.num_value_heads % config.num_key_heads:
        text.raise_invalid(
            "linear_num_value_heads", f"a multiple of {config.num_key_heads} key heads"
        )
    return config


ARCHITECTURE = Architecture(
    parse_hybrid_decoder_config,
    build_vision_encoder,
    TRANSFORMERS_V5_PREFIXES,
    HybridDecoder,
    fp32_suffixes=(".linear_attn.A_log", ".linear_attn.norm.weight"),
    copied_prefixes=("mtp.",),
)
