"""What a layer that computes one step after the other keeps for its way back, in bytes."""

from __future__ import annotations

from torch import nn

from finesight.model.language import DecoderLayer, SelfAttention
from finesight.model.layers import VisionBlock
from finesight.model.linear import GroupedLinear
from finesight.model.qwen_language import QwenLayer
from finesight.model.qwen_vl import Block
from finesight.plan.kept import (
    Computing,
    Kept,
    Look,
    learns,
    of_group,
    of_norm,
    shares_input,
    turned,
)
from finesight.plan.mlp import of_mlp


def of_layer(layer: nn.Module, reached: bool, computing: Computing) -> Kept:
    """A layer of the decoder or of a tower that computes one step after the other."""
    if isinstance(layer, DecoderLayer):
        attention = layer.self_attn
        return _of_block(
            (layer.input_layernorm, layer.post_attention_layernorm),
            (attention.qkv_proj, attention.o_proj),
            layer.mlp,
            look_of(attention),
            reached,
            computing,
            _of_head_norms(attention, computing),
        )
    if isinstance(layer, QwenLayer):
        attn = layer.attn
        heads = attn.c_attn.inputs // attn.head_width
        return _of_block(
            (layer.ln_1, layer.ln_2),
            (attn.c_attn, attn.c_proj),
            layer.mlp,
            Look(attn.c_attn.inputs, attn.c_attn.inputs, heads, 5 * attn.c_attn.inputs, True),
            reached,
            computing,
        )
    if isinstance(layer, VisionBlock):
        width, inner = layer.attn.qkv.inputs, layer.attn
        return _of_block(
            (layer.norm1, layer.norm2),
            (inner.qkv, inner.proj),
            layer.mlp,
            Look(width, width, inner.heads, 5 * width, False),
            reached,
            computing,
        )
    assert isinstance(layer, Block), f"what a {type(layer).__name__} keeps is not known"
    width = layer.attn.in_proj.inputs
    return _of_block(
        (layer.ln_1, layer.ln_2),
        (layer.attn.in_proj, layer.attn.out_proj),
        layer.mlp,
        Look(width, width, layer.attn.heads, 3 * width, False),
        reached,
        computing,
    )


def look_of(attention: SelfAttention) -> Look:
    """Queries and keys are rotated into memory of their own, values are a product's."""
    queries, shared, _ = attention.qkv_proj.outputs.values()
    heads = queries // attention.head_width
    return Look(queries, shared, heads, queries + 2 * shared, True)


def _of_head_norms(attention: SelfAttention, computing: Computing) -> int:
    """Queries and keys before the norm of their heads, and each head's scale."""
    if attention.q_norm is None:
        return 0
    queries, shared, _ = attention.qkv_proj.outputs.values()
    width = attention.head_width
    heads = (queries + shared) // width
    return heads * of_norm(attention.q_norm, width, True, computing)


def _of_block(
    norms: tuple[nn.Module, nn.Module],
    products: tuple[GroupedLinear, GroupedLinear],
    mlp: nn.Module,
    look: Look,
    reached: bool,
    computing: Computing,
    normed: int = 0,
) -> Kept:
    """Attention between two products, then an MLP, each behind a norm; `normed` bytes are kept
    between the first product and the attention."""
    into, out = products
    width, number = into.inputs, computing.number
    beside = of_norm(norms[0], width, reached, computing) + of_group(into, computing)
    seen = reached or learns(norms[0]) or learns(into)
    if seen:
        beside += normed
    last = of_group(out, computing)
    if seen and computing.flash and shares_input(out):
        # What attention keeps of its output is what comes to the product.
        last -= out.inputs * number
    after = seen or learns(out)
    inside = of_mlp(mlp, after or learns(norms[1]), computing)
    entered = reached or learns(norms[0])
    return Kept(
        computing=computing,
        beside=beside + last,
        out=last,
        look=look if seen else None,
        mlp=of_norm(norms[1], width, after, computing) + inside.row,
        entering=width * number,
        has_input=entered,
        back=2 * width * number + inside.back,
        freed=inside.freed,
        gradients=2 * number * max(p.numel() * p.requires_grad for p in mlp.parameters()),
        leaves=after or learns(norms[1]) or learns(mlp),
        stays=turned(into) * entered + turned(out) * seen + inside.stays,
        copied=inside.copied,
    )
