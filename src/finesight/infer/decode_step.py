"""Fused decoding step of the Qwen2 and Qwen3 decoders.

Computes the same as `Decoder.forward` for one new token per sequence. At small batch sizes a step
is bound by reading the weights and by kernel launches, so operations are fused to reduce the
number of launches.

Shapes: R rows, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.infer.kv_cache import DecodeAttention
from finesight.model.decoder import DecoderAttention, DecoderLayer
from finesight.model.fused_linear import FusedLinear, add_lora_delta, single_output
from finesight.model.layers import GatedMlp, RmsNorm
from finesight.model.lora.multi import MultiLoraLinear
from finesight.model.moe import SparseMoeBlock
from finesight.model.quant.base import Packed4BitMatrix, QuantizedWeight, RmsNormParams, pack_inputs
from finesight.model.rope import RotaryCosSin
from finesight.model.vlm import VisionLanguageModel

_HAS_TRITON = find_spec("triton") is not None

if _HAS_TRITON:
    from finesight.infer import decode_kernels


def supports_fused_decode(model: VisionLanguageModel) -> bool:
    """Return whether `fused_decode_step` supports a model.

    It requires Triton, a CUDA GPU, 16-bit weights and standard decoder layers.
    """
    weight = model.model.embed_tokens.weight
    is_16_bit = weight.dtype in (torch.bfloat16, torch.float16)
    has_known_layers = all(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    return _HAS_TRITON and weight.is_cuda and is_16_bit and has_known_layers


def fused_decode_step(
    model: VisionLanguageModel, ids_R: Tensor, position_ids_3R: Tensor, attention: DecodeAttention
) -> Tensor:
    """Compute the next-token logits [R, V] of one decoding step with fused kernels."""
    decoder = model.model
    x_RD = decoder.embed(ids_R)
    rotary = decoder.compute_rotary(position_ids_3R, attention, x_RD.dtype)
    assert isinstance(rotary, RotaryCosSin), f"unsupported rotary embedding {type(rotary).__name__}"
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer), f"unsupported layer {type(layer).__name__}"
        x_RD = _attention_block(layer.input_layernorm, layer.self_attn, x_RD, rotary, attention)
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
    logits_1V: Tensor = decode_kernels.fused_gemv(
        x_RD, weight, norm_I=norm.weight, eps=_get_norm_eps(norm)
    )
    return logits_1V


def _attention_block(
    norm: RmsNorm,
    self_attn: DecoderAttention,
    x_RD: Tensor,
    rotary: RotaryCosSin,
    attention: DecodeAttention,
) -> Tensor:
    shape = (len(x_RD), -1, self_attn.head_dim)
    qkv_proj = self_attn.qkv_proj
    if _supports_gemv(qkv_proj):
        qkv = torch.split(
            _norm_linear(qkv_proj, x_RD, norm), list(qkv_proj.output_sizes.values()), dim=1
        )
        q_RHD, k_RKD, v_RKD = (torch.unflatten(y, 1, shape[1:]) for y in qkv)
    else:
        q_RHD, k_RKD, v_RKD = (y.view(shape) for y in qkv_proj(norm(x_RD)))
    qk_norms = None
    if self_attn.q_norm is not None and self_attn.k_norm is not None:
        qk_norms = self_attn.q_norm.weight, self_attn.k_norm.weight, _get_norm_eps(self_attn.q_norm)
    cache = attention.cache
    q_RHD = decode_kernels.rope_and_cache(
        q_RHD, k_RKD, v_RKD, qk_norms, rotary.cos_T1D, rotary.sin_T1D, attention.slot_mapping_R,
        cache.keys_LPSKD[self_attn.layer_index], cache.values_LPSKD[self_attn.layer_index],
    )  # fmt: skip
    return _linear_add(
        self_attn.o_proj, attention.attend(self_attn.layer_index, q_RHD).flatten(1), x_RD
    )


def _swiglu_mlp(norm: RmsNorm, mlp: GatedMlp, x_RD: Tensor) -> Tensor:
    gate_up_proj = mlp.gate_up_proj
    if not _supports_gemv(gate_up_proj):
        gate_RI, up_RI = gate_up_proj(norm(x_RD))
        return F.silu(gate_RI).mul_(up_RI)
    if len(x_RD) == 1:
        return _linear_single_row(gate_up_proj, x_RD, norm=norm, is_gated=True)
    y_RI: Tensor = decode_kernels.swiglu(_norm_linear(gate_up_proj, x_RD, norm))
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
        norm_kwargs = {"norm_I": norm.weight, "eps": _get_norm_eps(norm)}
    lora_delta, multi_lora = None, linear.adapter
    if isinstance(multi_lora, MultiLoraLinear):
        low_1S = decode_kernels.fused_gemv(
            x_1I, multi_lora.lora_A_SI, output_scale_1O=multi_lora.rank_scales_TS, **norm_kwargs
        )
        lora_delta = decode_kernels.GemvLoraDelta(low_1S, multi_lora.lora_B_OS)
    if isinstance(linear.weight, QuantizedWeight):
        y_1O = _linear_4bit(linear.weight, x_1I, linear.bias, norm, residual)
        if lora_delta is not None:
            add_lora_delta(y_1O, lora_delta.low_1S, lora_delta.lora_B_OS)
        return decode_kernels.swiglu(y_1O) if is_gated else y_1O
    out_1O: Tensor = decode_kernels.fused_gemv(
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
    rms_norm = None if norm is None else RmsNormParams(norm.weight, _get_norm_eps(norm))
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
