"""Decoder of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Qwen2 decoders have a bias on queries, keys and values; Qwen3 decoders normalize queries and keys.

Shapes: T tokens, D hidden size, H heads, K key heads, M image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model import fused_decoder
from finesight.model.attention import AttentionBackend
from finesight.model.config import DecoderConfig
from finesight.model.layers import (
    GatedMlp,
    LinearBlock,
    RmsNorm,
    RotaryCosSin,
    apply_rotary_pos_emb,
    build_mlp,
    compute_mrope,
    empty_embedding,
    num_checkpointed_layers,
    run_layer,
)
from finesight.model.linear import FusedLinear, single_output


@dataclass(frozen=True, slots=True)
class DeepstackFeatures:
    """Image features added to hidden states after the first layers (Meng et al. 2024)."""

    visual_indices_M: Tensor
    features_MKD: Tensor

    def add_after_layer(self, layer_index: int, x_TD: Tensor) -> Tensor:
        """Add the features of one layer to the hidden states of the image tokens."""
        if layer_index >= self.features_MKD.shape[1]:
            return x_TD
        return x_TD.index_add(0, self.visual_indices_M, self.features_MKD[:, layer_index])


class LayerAttention(LinearBlock):
    """Attention of a decoder layer, between its two linears.

    It maps the outputs of the first linear to the inputs of the second one. With
    `fused_head_dim`, `fused_decoder` rotates heads and then passes no rotary embedding.
    """

    fused_head_dim: int | None = None
    is_fusible = True


class DecoderAttention(LayerAttention):
    """Grouped-query attention of a decoder layer (Ainslie et al. 2023)."""

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.is_fusible = not config.use_qk_norm
        self.head_dim = self.fused_head_dim = config.head_dim
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        output_sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = FusedLinear(config.hidden_size, output_sizes, bias=not config.use_qk_norm)
        self.q_norm: RmsNorm | None = None
        self.k_norm: RmsNorm | None = None
        if config.use_qk_norm:
            self.q_norm = RmsNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RmsNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_proj = FusedLinear(q_size, {"o_proj": config.hidden_size}, bias=False)

    def forward(
        self,
        projected: tuple[Tensor, ...],
        rotary: RotaryCosSin | None,
        attention: AttentionBackend,
    ) -> Tensor:
        q_THD, k_TKD, v_TKD = (y.view(len(y), -1, self.head_dim) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD = self.q_norm(q_THD)
            k_TKD = self.k_norm(k_TKD)
        if rotary is not None:
            q_THD = apply_rotary_pos_emb(q_THD, rotary)
            k_TKD = apply_rotary_pos_emb(k_TKD, rotary)
        return attention(self.layer_index, q_THD, k_TKD, v_TKD).flatten(1)


class FusibleLayer(nn.Module):
    """Pre-norm decoder layer for `fused_decoder`: attention, then an MLP or experts."""

    def __init__(
        self,
        config: DecoderConfig,
        layer_index: int,
        norm: type[RmsNorm],
        attn_name: str,
        attn: LayerAttention,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.eps = config.rms_norm_eps
        self.input_layernorm = norm(config.hidden_size, eps=self.eps)
        self.add_module(attn_name, attn)
        self.post_attention_layernorm = norm(config.hidden_size, eps=self.eps)
        self.mlp = build_mlp(config)

    @property
    def attn(self) -> LayerAttention:
        return next(x for x in self.children() if isinstance(x, LayerAttention))

    @property
    def fusible_linears(self) -> tuple[FusedLinear, ...]:
        """Linear layers that `fused_decoder` computes; empty if it does not support this layer."""
        if not (isinstance(self.mlp, GatedMlp) and self.attn.is_fusible):
            return ()
        linears = (*self.attn.linears, *self.mlp.linears)
        if not all(map(fused_decoder.is_fusible, linears)):
            return ()
        return linears

    def can_fuse(self, x_TD: Tensor) -> bool:
        """Return True if `fused_decoder` can compute this layer for these hidden states."""
        if not x_TD.is_cuda or not self.fusible_linears:
            return False
        return fused_decoder.supports_fused_layers(x_TD)

    def forward(
        self,
        x_TD: Tensor,
        rotary: RotaryCosSin,
        attention: AttentionBackend,
        logit_indices_L: Tensor | None = None,
    ) -> Tensor:
        """Map hidden states [T, D] to [T, D]."""
        if attention.fuses_layers and self.can_fuse(x_TD):
            return self._forward_fused(x_TD, rotary, attention, logit_indices_L)
        attn = self.attn
        in_proj, out_proj = attn.linears
        projected = in_proj(self.input_layernorm(x_TD))
        x_TD = x_TD + single_output(out_proj(attn(projected, rotary, attention)))
        if logit_indices_L is not None:
            x_TD = x_TD.index_select(0, logit_indices_L)
        y_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return y_TD

    def _forward_fused(
        self,
        x_TD: Tensor,
        rotary: RotaryCosSin,
        attention: AttentionBackend,
        logit_indices_L: Tensor | None,
    ) -> Tensor:
        """Compute `forward` with the kernels of `fused_decoder`."""
        attn = self.attn
        in_proj, out_proj = attn.linears
        layer_dropout = fused_decoder.LayerDropout(self.layer_index, attention.dropout_seed_1)
        x_TD, projected = fused_decoder.norm_linear(
            x_TD,
            self.input_layernorm.scale(x_TD.dtype),
            self.eps,
            in_proj,
            layer_dropout,
            attn.fused_head_dim,
            rotary,
        )
        o_TI = attn(projected, None if attn.fused_head_dim else rotary, attention)
        if logit_indices_L is not None:
            x_TD = x_TD.index_select(0, logit_indices_L)
            o_TI = o_TI.index_select(0, logit_indices_L)
        scale_D = self.post_attention_layernorm.scale(x_TD.dtype)
        mlp = self.mlp
        assert isinstance(mlp, GatedMlp), f"a fused layer with {type(mlp).__name__}"
        return fused_decoder.out_proj_mlp(
            x_TD, o_TI, out_proj, scale_D, self.eps, mlp.gate_up_proj, mlp.down_proj, layer_dropout
        )


class DecoderLayer(FusibleLayer):
    """Decoder layer of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

    self_attn: DecoderAttention

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        attn = DecoderAttention(config, layer_index)
        super().__init__(config, layer_index, RmsNorm, "self_attn", attn)


class Decoder(nn.Module):
    """Token embeddings and decoder layers, without the final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        layer_class: Callable[[DecoderConfig, int], nn.Module] = DecoderLayer,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer_class(config, n) for n in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps)

    def compute_rotary(
        self, position_ids_3T: Tensor, attention: AttentionBackend, dtype: torch.dtype
    ) -> object:
        """Compute the rotary embeddings of the tokens, which all layers receive."""
        return compute_mrope(position_ids_3T, self.config, dtype)

    def embed(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.embed_tokens.weight)

    def forward(
        self,
        x_TD: Tensor,
        position_ids_3T: Tensor,
        attention: AttentionBackend,
        activation_checkpointing: float = 0.0,
        logit_indices_L: Tensor | None = None,
        deepstack: DeepstackFeatures | None = None,
    ) -> Tensor:
        """Compute hidden states before the final norm."""
        rotary = self.compute_rotary(position_ids_3T, attention, x_TD.dtype)
        num_checkpointed = num_checkpointed_layers(activation_checkpointing, len(self.layers))
        for layer_index, layer in enumerate(self.layers):
            is_last = layer_index == len(self.layers) - 1
            can_fuse = isinstance(layer, FusibleLayer) and layer.can_fuse(x_TD)
            x_TD = run_layer(
                layer,
                layer_index < num_checkpointed,
                x_TD,
                rotary,
                attention,
                logit_indices_L if is_last else None,
                # Recomputing a fused layer does not use torch's RNG.
                preserve_rng_state=not can_fuse,
            )
            if deepstack is not None:
                x_TD = deepstack.add_after_layer(layer_index, x_TD)
        return x_TD
