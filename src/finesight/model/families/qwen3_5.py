"""Qwen3.5, Qwen3.6 and Qwen3.8: hybrid decoder of Gated DeltaNet and gated attention layers.

Three of four decoder layers are linear attention layers (Gated DeltaNet, Yang et al. 2024). The
vision encoder is that of Qwen3-VL without DeepStack. Weights of multi-token prediction (MTP) are
copied unchanged from the source folder when a model is saved.

Shapes: T tokens, D hidden size, H heads, K key heads, V value dimension, L tokens that need logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.attention import AttentionBackend
from finesight.model.config import (
    ConfigReader,
    DecoderConfig,
    LinearAttentionConfig,
    get_rope_config,
    get_text_config,
    parse_decoder_config,
)
from finesight.model.decoder import Decoder, FusibleLayer, LayerAttention
from finesight.model.families import TRANSFORMERS_V5_PREFIXES, Architecture
from finesight.model.families.qwen3_vl import (
    build_vision_encoder,
    interleaved_mrope_axes,
    parse_moe_config,
)
from finesight.model.fused_ops import has_kernels, norm_rotary, sigmoid_gate
from finesight.model.gated_delta_net import DeltaNetInputs, gated_rms_norm
from finesight.model.layers import (
    RmsNorm,
    RotaryCosSin,
    ZeroCenteredRmsNorm,
    apply_partial_rotary_pos_emb,
)
from finesight.model.linear import FusedLinear

_LAYER_TYPES = ("linear_attention", "full_attention")


class GatedAttention(LayerAttention):
    """Grouped-query attention with an output gate per query head and partial rotary embedding."""

    def __init__(self, config: DecoderConfig, attention_index: int) -> None:
        super().__init__()
        self.attention_index = attention_index
        self.head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        # Each head of q_proj has its query first and its gate last.
        output_sizes = {"q_proj": 2 * q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = FusedLinear(config.hidden_size, output_sizes, bias=False)
        self.q_norm = ZeroCenteredRmsNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = ZeroCenteredRmsNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = FusedLinear(q_size, {"o_proj": config.hidden_size}, bias=False)

    def forward(
        self, projected: tuple[Tensor, ...], rotary: RotaryCosSin, attention: AttentionBackend
    ) -> Tensor:
        q_gate_TE, k_TE, v_TE = projected
        q_THD, gate_THD = torch.unflatten(q_gate_TE, 1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        k_TKD = torch.unflatten(k_TE, 1, (-1, self.head_dim))
        v_TKD = torch.unflatten(v_TE, 1, (-1, self.head_dim))
        q_THD = _norm_rotary(self.q_norm, q_THD, rotary)
        k_TKD = _norm_rotary(self.k_norm, k_TKD, rotary)
        o_THD = attention(self.attention_index, q_THD, k_TKD, v_TKD)
        return sigmoid_gate(o_THD, gate_THD).flatten(1)


def _norm_rotary(norm: ZeroCenteredRmsNorm, x_THD: Tensor, rotary: RotaryCosSin) -> Tensor:
    if not has_kernels(x_THD):
        return apply_partial_rotary_pos_emb(norm(x_THD), rotary)
    return norm_rotary(x_THD, norm.weight, norm.eps, 1.0, rotary.cos_T1D, rotary.sin_T1D)


class DepthwiseConv(nn.Module):
    """Weight of the depthwise causal convolution, [N, 1, W] as in `nn.Conv1d`."""

    def __init__(self, num_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, kernel_size))


class GatedDeltaNet(LayerAttention):
    """Linear attention with the gated delta rule.

    `A_log` and the weight of the norm are in fp32 for any dtype of the model.
    """

    def __init__(self, config: LinearAttentionConfig, decoder: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.attention_index = index
        output_sizes = {
            "in_proj_qkv": config.conv_size,
            "in_proj_z": config.value_size,
            "in_proj_b": config.num_value_heads,
            "in_proj_a": config.num_value_heads,
        }
        self.in_proj = FusedLinear(decoder.hidden_size, output_sizes, bias=False)
        self.conv1d = DepthwiseConv(config.conv_size, config.conv_kernel_size)
        self.dt_bias = nn.Parameter(torch.empty(config.num_value_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_value_heads))
        self.norm = RmsNorm(config.value_head_dim, eps=decoder.rms_norm_eps)
        self.out_proj = FusedLinear(
            config.value_size, {"out_proj": decoder.hidden_size}, bias=False
        )

    def forward(
        self, projected: tuple[Tensor, ...], _: RotaryCosSin, attention: AttentionBackend
    ) -> Tensor:
        qkv_TN, z_TE, b_TH, a_TH = projected
        dtype = torch.promote_types(qkv_TN.dtype, torch.float32)
        step_TH = F.softplus(a_TH.to(dtype) + self.dt_bias.to(dtype))
        inputs = DeltaNetInputs(
            self.config,
            qkv_TN,
            self.conv1d.weight.squeeze(1),
            -self.A_log.to(dtype).exp() * step_TH,
            b_TH.to(dtype).sigmoid(),
        )
        o_THV = attention.linear_attention(self.attention_index, inputs)
        z_THV = z_TE.view(o_THV.shape)
        norm = self.norm
        return gated_rms_norm(o_THV, z_THV, norm.weight, norm.eps).flatten(1)


class HybridDecoderLayer(FusibleLayer):
    """Decoder layer with full or linear attention."""

    self_attn: GatedAttention | None

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        norm = ZeroCenteredRmsNorm
        linear_attention = config.linear_attention
        assert linear_attention is not None, "a config without linear attention"
        full_layers = linear_attention.full_attention_layers
        num_full = sum(n < layer_index for n in full_layers)
        if layer_index in full_layers:
            attn = GatedAttention(config, num_full)
            super().__init__(config, layer_index, norm, "self_attn", attn)
        else:
            delta_net = GatedDeltaNet(linear_attention, config, layer_index - num_full)
            super().__init__(config, layer_index, norm, "linear_attn", delta_net)
            self.self_attn = None


class HybridDecoder(Decoder):
    """Decoder of Qwen3.5."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, HybridDecoderLayer)
        self.norm = ZeroCenteredRmsNorm(config.hidden_size, eps=config.rms_norm_eps)


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


def parse_hybrid_moe_decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    text = get_text_config(hf_config)
    shared_size = text.get_int("shared_expert_intermediate_size")
    moe_config = replace(parse_moe_config(text), shared_intermediate_size=shared_size)
    decoder_config = parse_hybrid_decoder_config(hf_config, moe_config.intermediate_size)
    return replace(decoder_config, moe=moe_config)


ARCHITECTURE = Architecture(
    parse_hybrid_decoder_config,
    build_vision_encoder,
    TRANSFORMERS_V5_PREFIXES,
    HybridDecoder,
    fp32_suffixes=(".linear_attn.A_log", ".linear_attn.norm.weight"),
    copied_prefixes=("mtp.",),
)

MOE_ARCHITECTURE = replace(ARCHITECTURE, parse_decoder_config=parse_hybrid_moe_decoder_config)
