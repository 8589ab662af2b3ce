"""Estimate the activation memory of unfused decoder layers and vision encoder blocks, in bytes."""

from __future__ import annotations

from torch import nn

from finesight.model.decoder import DecoderAttention, DecoderLayer
from finesight.model.families.qwen_vl import QwenDecoderLayer, QwenVisionBlock
from finesight.model.fused_linear import FusedLinear
from finesight.model.layers import VisionBlock
from finesight.plan.mlp_memory import compute_mlp_memory
from finesight.plan.saved_activations import (
    AttentionMemory,
    ComputeConfig,
    LayerMemory,
    is_trainable,
    saved_linear_bytes,
    saved_norm_bytes,
    saves_original_input,
    transposed_fp8_bytes,
)


def compute_unfused_layer_memory(
    layer: nn.Module, has_input_grad: bool, compute: ComputeConfig
) -> LayerMemory:
    """Estimate the memory of an unfused decoder layer or vision encoder block.

    Args:
        layer: Decoder layer or vision encoder block.
        has_input_grad: Whether the input of the layer needs a gradient.
        compute: Device properties.
    """
    if isinstance(layer, DecoderLayer):
        self_attn = layer.self_attn
        return _compute_block_memory(
            (layer.input_layernorm, layer.post_attention_layernorm),
            (self_attn.qkv_proj, self_attn.o_proj),
            layer.mlp,
            decoder_attention_memory(self_attn),
            has_input_grad,
            compute,
            _qk_norm_bytes(self_attn, compute),
        )
    if isinstance(layer, QwenDecoderLayer):
        attn = layer.attn
        num_heads = attn.c_attn.in_features // attn.head_dim
        return _compute_block_memory(
            (layer.ln_1, layer.ln_2),
            (attn.c_attn, attn.c_proj),
            layer.mlp,
            AttentionMemory(
                attn.c_attn.in_features,
                attn.c_attn.in_features,
                num_heads,
                5 * attn.c_attn.in_features,
                True,
            ),
            has_input_grad,
            compute,
        )
    if isinstance(layer, VisionBlock):
        hidden_size, vision_attention = layer.attn.qkv.in_features, layer.attn
        return _compute_block_memory(
            (layer.norm1, layer.norm2),
            (vision_attention.qkv, vision_attention.proj),
            layer.mlp,
            AttentionMemory(
                hidden_size, hidden_size, vision_attention.num_heads, 5 * hidden_size, False
            ),
            has_input_grad,
            compute,
        )
    assert isinstance(layer, QwenVisionBlock), (
        f"saved activations of {type(layer).__name__} are unknown"
    )
    hidden_size = layer.attn.in_proj.in_features
    return _compute_block_memory(
        (layer.ln_1, layer.ln_2),
        (layer.attn.in_proj, layer.attn.out_proj),
        layer.mlp,
        AttentionMemory(hidden_size, hidden_size, layer.attn.num_heads, 3 * hidden_size, False),
        has_input_grad,
        compute,
    )


def decoder_attention_memory(attention: DecoderAttention) -> AttentionMemory:
    """Estimate the attention memory of a decoder layer.

    Rotary embedding creates new query and key tensors. Values remain a slice of the QKV product.
    """
    query_dim, kv_dim, _ = attention.qkv_proj.output_sizes.values()
    num_heads = query_dim // attention.head_dim
    return AttentionMemory(query_dim, kv_dim, num_heads, query_dim + 2 * kv_dim, True)


def _qk_norm_bytes(attention: DecoderAttention, compute: ComputeConfig) -> int:
    """Return the bytes per token that the query and key norms save.

    Returns 0 for models without these norms.
    """
    if attention.q_norm is None:
        return 0
    query_dim, kv_dim, _ = attention.qkv_proj.output_sizes.values()
    head_dim = attention.head_dim
    num_heads = (query_dim + kv_dim) // head_dim
    return num_heads * saved_norm_bytes(attention.q_norm, head_dim, True, compute)


def _compute_block_memory(
    norms: tuple[nn.Module, nn.Module],
    linears: tuple[FusedLinear, FusedLinear],
    mlp: nn.Module,
    attention: AttentionMemory,
    has_input_grad: bool,
    compute: ComputeConfig,
    qk_norm_bytes: int = 0,
) -> LayerMemory:
    """Estimate the memory of attention and MLP with a norm before each.

    Args:
        norms: Norms before attention and before the MLP.
        linears: QKV projection and output projection.
        mlp: MLP module.
        attention: Memory of the attention.
        has_input_grad: Whether the input of the block needs a gradient.
        compute: Device properties.
        qk_norm_bytes: Bytes per token saved by the query and key norms.
    """
    qkv_proj, o_proj = linears
    hidden_size, element_size = qkv_proj.in_features, compute.element_size
    attention_bytes = saved_norm_bytes(
        norms[0], hidden_size, has_input_grad, compute
    ) + saved_linear_bytes(qkv_proj, compute)
    has_qkv_grad = has_input_grad or is_trainable(norms[0]) or is_trainable(qkv_proj)
    if has_qkv_grad:
        attention_bytes += qk_norm_bytes
    o_proj_bytes = saved_linear_bytes(o_proj, compute)
    if has_qkv_grad and compute.has_varlen_attention and saves_original_input(o_proj):
        # The attention saves its output, which is the input of the output projection.
        o_proj_bytes -= o_proj.in_features * element_size
    has_attention_grad = has_qkv_grad or is_trainable(o_proj)
    mlp_memory = compute_mlp_memory(mlp, has_attention_grad or is_trainable(norms[1]), compute)
    saves_input = has_input_grad or is_trainable(norms[0])
    return LayerMemory(
        compute=compute,
        attention_row_bytes=attention_bytes + o_proj_bytes,
        o_proj_row_bytes=o_proj_bytes,
        attention=attention if has_qkv_grad else None,
        mlp_row_bytes=saved_norm_bytes(norms[1], hidden_size, has_attention_grad, compute)
        + mlp_memory.row_bytes,
        input_row_bytes=hidden_size * element_size,
        saves_input=saves_input,
        mlp_backward_row_bytes=2 * hidden_size * element_size + mlp_memory.backward_row_bytes,
        mlp_freed_row_bytes=mlp_memory.freed_row_bytes,
        weight_grad_bytes=2
        * element_size
        * max(p.numel() * p.requires_grad for p in mlp.parameters()),
        has_output_grad=has_attention_grad or is_trainable(norms[1]) or is_trainable(mlp),
        persistent_bytes=transposed_fp8_bytes(qkv_proj) * saves_input
        + transposed_fp8_bytes(o_proj) * has_qkv_grad
        + mlp_memory.persistent_bytes,
        weight_copy_bytes=mlp_memory.weight_copy_bytes,
    )
