"""Fused decoding step of the Qwen2, Qwen3 and Qwen3.5 decoders.

Computes the same as `Decoder.forward` for one new token per sequence. At small batch sizes a step
is bound by reading the weights and by kernel launches, so operations are fused to reduce the
number of launches.

Shapes: R rows, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.infer.kv_cache import DecodeAttention
from finesight.model.decoder import DecoderAttention, DecoderLayer
from finesight.model.families.qwen3_5 import GatedAttention, GatedDeltaNet, HybridDecoderLayer
from finesight.model.fused_ops import sigmoid_gate
from finesight.model.gated_delta_net import L2_NORM_EPS, supports_kernels
from finesight.model.kernels import decoding
from finesight.model.kernels import gated_delta_net as delta_net_kernels
from finesight.model.kernels.runtime import HAS_TRITON
from finesight.model.layers import (
    GatedMlp,
    RmsNorm,
    RotaryCosSin,
    SparseMoeBlock,
    ZeroCenteredRmsNorm,
)
from finesight.model.linear import FusedLinear, add_lora_delta, single_output
from finesight.model.lora.multi import MultiLoraLinear
from finesight.model.quant.base import Packed4BitMatrix, QuantizedWeight, RmsNormParams, pack_inputs
from finesight.model.vlm import VisionLanguageModel

_LAYER_TYPES = DecoderLayer, HybridDecoderLayer


def supports_fused_decode(model: VisionLanguageModel) -> bool:
    """Return whether `fused_decode_step` supports a model.

    It requires Triton, a CUDA GPU, 16-bit weights and known decoder layers.
    """
    weight = model.model.embed_tokens.weight
    is_16_bit = weight.dtype in (torch.bfloat16, torch.float16)
    layer_types, linear_attention = _LAYER_TYPES, model.config.decoder.linear_attention
    has_known_layers = all(isinstance(layer, layer_types) for layer in model.model.layers)
    if linear_attention is not None and not supports_kernels(linear_attention, weight):
        return False
    return HAS_TRITON and weight.is_cuda and is_16_bit and has_known_layers


def fused_decode_step(
    model: VisionLanguageModel, ids_R: Tensor, position_ids_3R: Tensor, attention: DecodeAttention
) -> Tensor:
    """Compute the next-token logits [R, V] of one decoding step with fused kernels."""
    decoder = model.model
    x_RD = decoder.embed(ids_R)
    rotary = decoder.compute_rotary(position_ids_3R, attention, x_RD.dtype)
    assert isinstance(rotary, RotaryCosSin), f"unsupported rotary embedding {type(rotary).__name__}"
    for layer in decoder.layers:
        assert isinstance(layer, _LAYER_TYPES), f"unsupported layer {type(layer).__name__}"
        norm, attn = layer.input_layernorm, layer.self_attn
        if attn is not None:
            x_RD = _attention_block(norm, attn, x_RD, rotary, attention)
        else:
            assert isinstance(layer.attn, GatedDeltaNet), "a layer without attention"
            x_RD = _linear_attention_block(norm, layer.attn, x_RD, attention)
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        if isinstance(mlp, SparseMoeBlock):
            x_RD = x_RD + mlp(norm(x_RD))
        else:
            x_RD = _linear_add(mlp.down_proj, _swiglu_mlp(norm, mlp, x_RD), x_RD)
    if model.lm_head is None:
        return _compute_tied_logits(model, x_RD)
    if not _supports_gemv(model.lm_head):
        return model.compute_logits(model.apply_final_norm(x_RD))
    return _norm_linear(model.lm_head, x_RD, decoder.norm)


def _compute_tied_logits(model: VisionLanguageModel, x_RD: Tensor) -> Tensor:
    norm, weight = model.model.norm, model.model.embed_tokens.weight
    if len(x_RD) > 1:
        return F.linear(norm(x_RD), weight)
    logits_1V: Tensor = decoding.fused_gemv(x_RD, weight, **_get_norm_args(norm))
    return logits_1V


def _attention_block(
    norm: RmsNorm,
    self_attn: DecoderAttention | GatedAttention,
    x_RD: Tensor,
    rotary: RotaryCosSin,
    attention: DecodeAttention,
) -> Tensor:
    head_dim, cache = self_attn.head_dim, attention.cache
    q_RE, k_RE, v_RE = _project(self_attn.qkv_proj, norm, x_RD)
    k_RKD, v_RKD = (torch.unflatten(y_RE, 1, (-1, head_dim)) for y_RE in (k_RE, v_RE))
    gate_RHD = None
    if isinstance(self_attn, GatedAttention):
        layer_index = self_attn.attention_index
        q_RHD, gate_RHD = torch.unflatten(q_RE, 1, (-1, 2 * head_dim)).chunk(2, dim=-1)
    else:
        layer_index = self_attn.layer_index
        q_RHD = torch.unflatten(q_RE, 1, (-1, head_dim))
    qk_norms = None
    if self_attn.q_norm is not None and self_attn.k_norm is not None:
        eps, offset = _get_norm_eps(self_attn.q_norm), 0.0 if gate_RHD is None else 1.0
        qk_norms = decoding.QKNorms(self_attn.q_norm.weight, self_attn.k_norm.weight, eps, offset)
    q_RHD = decoding.rope_and_cache(
        q_RHD, k_RKD, v_RKD, qk_norms, rotary.cos_T1D, rotary.sin_T1D, attention.slot_mapping_R,
        cache.keys_LPSKD[layer_index], cache.values_LPSKD[layer_index],
    )  # fmt: skip
    o_RHD = attention.attend(layer_index, q_RHD)
    if gate_RHD is not None:
        o_RHD = sigmoid_gate(o_RHD, gate_RHD)
    return _linear_add(self_attn.o_proj, o_RHD.flatten(1), x_RD)


def _linear_attention_block(
    norm: RmsNorm, attn: GatedDeltaNet, x_RD: Tensor, attention: DecodeAttention
) -> Tensor:
    qkv_RN, z_RE, b_RH, a_RH = _project(attn.in_proj, norm, x_RD)
    states, config = attention.cache.linear_states, attn.config
    assert states is not None, "a cache without linear attention states"
    conv_SWN, delta_SHDV = states.get_layer(attn.attention_index)
    slots_R = states.slots_R[: len(x_RD)]
    qkv_RN = delta_net_kernels.causal_conv_step(
        qkv_RN, attn.conv1d.weight.squeeze(1), conv_SWN, slots_R, config.num_key_heads,
        config.num_value_heads, config.value_head_dim, L2_NORM_EPS,
    )  # fmt: skip
    o_RE = delta_net_kernels.gated_delta_step(
        qkv_RN, a_RH, b_RH, attn.A_log, attn.dt_bias, z_RE, attn.norm.weight, delta_SHDV, slots_R,
        config.num_key_heads, _get_norm_eps(attn.norm),
    )  # fmt: skip
    return _linear_add(attn.out_proj, o_RE, x_RD)


def _project(linear: FusedLinear, norm: RmsNorm, x_RD: Tensor) -> tuple[Tensor, ...]:
    """Apply RMSNorm and a fused linear layer; the rows of the outputs may be strided."""
    if not _supports_gemv(linear):
        projected: tuple[Tensor, ...] = linear(norm(x_RD))
        return projected
    sizes = list(linear.output_sizes.values())
    return torch.split(_norm_linear(linear, x_RD, norm), sizes, dim=1)


def _swiglu_mlp(norm: RmsNorm, mlp: GatedMlp, x_RD: Tensor) -> Tensor:
    gate_up_proj = mlp.gate_up_proj
    if not _supports_gemv(gate_up_proj):
        gate_RI, up_RI = gate_up_proj(norm(x_RD))
        return F.silu(gate_RI).mul_(up_RI)
    if len(x_RD) == 1:
        return _linear_single_row(gate_up_proj, x_RD, norm=norm, is_gated=True)
    y_RI: Tensor = decoding.swiglu(_norm_linear(gate_up_proj, x_RD, norm))
    return y_RI


def _norm_linear(linear: FusedLinear, x_RD: Tensor, norm: RmsNorm) -> Tensor:
    """Apply RMSNorm and a fused linear layer, and return the concatenated outputs."""
    if len(x_RD) == 1:
        return _linear_single_row(linear, x_RD, norm=norm)
    normed_RD = norm(x_RD)
    if isinstance(linear.weight, QuantizedWeight):
        return torch.cat(linear(normed_RD), 1)
    y_RO = F.linear(normed_RD, linear.weight, linear.bias)
    multi_lora = linear.adapter
    return (
        multi_lora.add_delta(y_RO, normed_RD) if isinstance(multi_lora, MultiLoraLinear) else y_RO
    )


def _linear_add(linear: FusedLinear, x_RI: Tensor, residual_RD: Tensor) -> Tensor:
    """Apply a linear layer and add the residual: residual + x W^T."""
    if not _supports_gemv(linear) or linear.bias is not None:
        return residual_RD + single_output(linear(x_RI))
    if len(x_RI) == 1:
        return _linear_single_row(linear, x_RI, residual=residual_RD)
    if isinstance(linear.weight, QuantizedWeight):
        return residual_RD + single_output(linear(x_RI))
    y_RD, multi_lora = torch.addmm(residual_RD, x_RI, linear.weight.T), linear.adapter
    return multi_lora.add_delta(y_RD, x_RI) if isinstance(multi_lora, MultiLoraLinear) else y_RD


def _linear_single_row(
    linear: FusedLinear,
    x_1I: Tensor,
    *,
    norm: RmsNorm | None = None,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Apply a fused linear layer and its multi-LoRA delta to a single row."""
    norm_kwargs: dict[str, Any] = {}
    if norm is not None:
        norm_kwargs = _get_norm_args(norm)
    lora_delta, multi_lora = None, linear.adapter
    if isinstance(multi_lora, MultiLoraLinear):
        low_1S = decoding.fused_gemv(
            x_1I, multi_lora.lora_A_SI, output_scale_1O=multi_lora.rank_scales_TS, **norm_kwargs
        )
        lora_delta = decoding.GemvLoraDelta(low_1S, multi_lora.lora_B_OS)
    if isinstance(linear.weight, QuantizedWeight):
        y_1O = _linear_4bit(linear.weight, x_1I, linear.bias, norm, residual)
        if lora_delta is not None:
            add_lora_delta(y_1O, lora_delta.low_1S, lora_delta.lora_B_OS)
        return decoding.swiglu(y_1O) if is_gated else y_1O
    out_1O: Tensor = decoding.fused_gemv(
        x_1I,
        linear.weight,
        bias_O=linear.bias,
        lora_delta=lora_delta,
        residual_1O=residual,
        is_gated=is_gated,
        **norm_kwargs,
    )
    return out_1O


def _linear_4bit(
    weight: QuantizedWeight,
    x_1I: Tensor,
    bias_O: Tensor | None,
    norm: RmsNorm | None,
    residual: Tensor | None,
) -> Tensor:
    """Apply a fused linear layer with 4-bit weights to a single row.

    One kernel packs the input, and one kernel per matrix computes the product.
    """
    rms_norm = None
    if norm is not None:
        weight_I: Tensor = norm.weight
        if isinstance(norm, ZeroCenteredRmsNorm):
            weight_I = norm.scale(x_1I.dtype)
        rms_norm = RmsNormParams(weight_I, _get_norm_eps(norm))
    matrices = [matrix for matrix in weight.matrices if isinstance(matrix, Packed4BitMatrix)]
    output_sizes = [matrix.out_features for matrix in matrices]
    y_1O = x_1I.new_empty(1, sum(output_sizes))
    biases, residuals = (
        [None] * len(output_sizes) if x is None else torch.split(x.view(-1), output_sizes)
        for x in (bias_O, residual)
    )
    packed_inputs = pack_inputs(matrices, x_1I, rms_norm)
    for matrix, x, y_O, bias, layer_residual in zip(
        matrices, packed_inputs, torch.split(y_1O[0], output_sizes), biases, residuals, strict=True
    ):
        matrix.gemv_packed(x, y_O, bias, layer_residual)
    return y_1O


def _get_norm_args(norm: RmsNorm) -> dict[str, Any]:
    """Return the arguments of `fused_gemv` for a norm."""
    offset = 1.0 if isinstance(norm, ZeroCenteredRmsNorm) else 0.0
    return {"norm_I": norm.weight, "eps": _get_norm_eps(norm), "norm_offset": offset}


def _get_norm_eps(norm: RmsNorm) -> float:
    assert norm.eps is not None, "RMSNorm without eps"
    return norm.eps


def _supports_gemv(linear: FusedLinear) -> bool:
    """Return True if the GEMV kernels support a linear layer.

    They support unquantized and packed 4-bit weights without a training adapter.
    """
    if linear.adapter is not None and not isinstance(linear.adapter, MultiLoraLinear):
        return False
    weight = linear.weight
    return not isinstance(weight, QuantizedWeight) or all(
        isinstance(matrix, Packed4BitMatrix) and matrix.supports_kernels()
        for matrix in weight.matrices
    )
