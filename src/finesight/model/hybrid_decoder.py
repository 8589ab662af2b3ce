"""Hybrid decoder of Gated DeltaNet and gated attention layers.

Some decoder layers are linear attention layers (Gated DeltaNet, Yang et al. 2024).

Shapes: T tokens, D hidden size, H heads, K key heads, V value dimension, L tokens that need logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model.attention import AttentionBackend
from finesight.model.config import DecoderConfig, LinearAttentionConfig
from finesight.model.decoder import Decoder, FusibleLayer, LayerAttention
from finesight.model.fused_ops import has_kernels, norm_rotary, sigmoid_gate
from finesight.model.gated_delta_net import DeltaNetInputs, gated_rms_norm
from finesight.model.layers import (
    RmsNorm,
    RotaryCosSin,
    ZeroCenteredRmsNorm,
    apply_partial_rotary_pos_emb,
)
from finesight.model.linear import FusedLinear


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
    """Decoder with a zero-centered final norm, as in Qwen3.5."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config, HybridDecoderLayer)
        self.norm = ZeroCenteredRmsNorm(config.hidden_size, eps=config.rms_norm_eps)
