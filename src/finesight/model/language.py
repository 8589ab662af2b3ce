"""The decoder that Qwen2 and Qwen3 share: they differ in what they do to queries and keys.

Shapes: T tokens, D width, H heads, K key heads, M features of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.model import fused_layer
from finesight.model.attention import Attention, PackedAttention
from finesight.model.experts import SparseMlp
from finesight.model.geometry import LanguageGeometry
from finesight.model.layers import GatedMlp, RmsNorm, empty_table, recomputed, run_layer
from finesight.model.linear import GroupedLinear, only
from finesight.model.rope import Rotation, language_rotation, rotate


@dataclass(frozen=True, slots=True)
class Deepstack:
    """Features of pictures that join the hidden states of their places `at_M` after the first
    decoder layers, the k-th row after layer k (Meng et al. 2024, DeepStack)."""

    at_M: Tensor
    features_MKD: Tensor

    def after(self, layer: int, x_TD: Tensor) -> Tensor:
        """The hidden states of that layer with the features that are due."""
        if layer >= self.features_MKD.shape[1]:
            return x_TD
        return x_TD.index_add(0, self.at_M, self.features_MKD[:, layer])


class SelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); `layer` is its number in the decoder.

    Qwen2 adds a bias to queries, keys and values; Qwen3 norms each head of queries and keys.
    """

    def __init__(self, geometry: LanguageGeometry, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = geometry.head_width
        inner, shared = (n * geometry.head_width for n in (geometry.heads, geometry.kv_heads))
        outputs = {"q_proj": inner, "k_proj": shared, "v_proj": shared}
        self.qkv_proj = GroupedLinear(geometry.width, outputs, bias=not geometry.normed_heads)
        self.q_norm, self.k_norm = (
            RmsNorm(self.head_width, eps=geometry.norm_eps) if geometry.normed_heads else None
            for _ in range(2)
        )
        self.o_proj = GroupedLinear(inner, {"o_proj": geometry.width}, bias=False)

    def forward(self, x_TD: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """[T, width] to [T, width]."""
        shape = (len(x_TD), -1, self.head_width)
        q_THD, k_TKD, v_TKD = (y.view(shape) for y in self.qkv_proj(x_TD))
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        q_THD, k_TKD = rotate(q_THD, rotation), rotate(k_TKD, rotation)
        o_THD = attention(self.layer, q_THD, k_TKD, v_TKD)
        return only(self.o_proj(o_THD.flatten(1)))


class DecoderLayer(nn.Module):
    """Attention, then the MLP, each on the norm of what it is added to."""

    def __init__(self, geometry: LanguageGeometry, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(geometry.width, eps=geometry.norm_eps)
        self.self_attn = SelfAttention(geometry, layer)
        self.post_attention_layernorm = RmsNorm(geometry.width, eps=geometry.norm_eps)
        self.mlp = (
            GatedMlp(geometry.width, geometry.mlp_width, bias=False)
            if geometry.experts is None
            else SparseMlp(geometry.width, geometry.experts)
        )

    def forward(
        self, x_TD: Tensor, rotation: Rotation, attention: Attention, only_L: Tensor | None = None
    ) -> Tensor:
        """[T, width] to [T, width], or to [L, width] for the tokens `only_L`."""
        if isinstance(attention, PackedAttention) and self.fused(x_TD):
            return self._quickly(x_TD, rotation, attention, only_L)
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rotation, attention)
        if only_L is not None:
            x_TD = x_TD.index_select(0, only_L)
        y_TD: Tensor = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        return y_TD

    def fused(self, x_TD: Tensor) -> bool:
        """Whether `fused_layer` computes the layer."""
        return bool(self.fusible) and fused_layer.takes(x_TD)

    @property
    def fusible(self) -> tuple[GroupedLinear, ...]:
        """The groups of a layer that is one of those that `fused_layer` computes, or none."""
        mlp, attn = self.mlp, self.self_attn
        if not isinstance(mlp, GatedMlp) or attn.q_norm is not None:
            return ()
        groups = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        return groups if all(map(fused_layer.fits, groups)) else ()

    def _quickly(
        self, x_TD: Tensor, rotation: Rotation, attention: PackedAttention, only_L: Tensor | None
    ) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        at = fused_layer.Pass(attn.layer, attention.seed_1)
        assert isinstance(mlp, GatedMlp), f"no gated MLP but a {type(mlp).__name__}"
        x_TD, q_THD, k_TKD, v_TKD = fused_layer.enter(
            x_TD, self.input_layernorm, attn.qkv_proj, attn.head_width, rotation, at
        )
        o_TI = attention(attn.layer, q_THD, k_TKD, v_TKD).flatten(1)
        if only_L is not None:
            x_TD, o_TI = x_TD.index_select(0, only_L), o_TI.index_select(0, only_L)
        return fused_layer.leave(
            x_TD,
            o_TI,
            attn.o_proj,
            self.post_attention_layernorm,
            mlp.gate_up_proj,
            mlp.down_proj,
            at,
        )


class Decoder(nn.Module):
    """Embedded tokens to hidden states; the last norm is a step of its own, so that it runs only
    where logits are wanted. A family with layers of its own gives `layer` and `rotations`."""

    def __init__(
        self,
        geometry: LanguageGeometry,
        layer: Callable[[LanguageGeometry, int], nn.Module] = DecoderLayer,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.embed_tokens = empty_table(geometry.vocabulary, geometry.width)
        self.layers = nn.ModuleList(layer(geometry, n) for n in range(geometry.depth))
        self.norm = RmsNorm(geometry.width, eps=geometry.norm_eps)

    def rotations(self, positions_3T: Tensor, attention: Attention, dtype: torch.dtype) -> object:
        """What the layers turn queries and keys by."""
        return language_rotation(positions_3T, self.geometry, dtype)

    def embed(self, ids_T: Tensor) -> Tensor:
        """Ids to [T, D]."""
        return F.embedding(ids_T, self.embed_tokens.weight)

    def forward(
        self,
        x_TD: Tensor,
        positions_3T: Tensor,
        attention: Attention,
        recompute: float = 0.0,
        only_L: Tensor | None = None,
        deepstack: Deepstack | None = None,
    ) -> Tensor:
        """[T, D] to [T, D], before the last norm; to [L, D] where only the tokens `only_L` are
        wanted: the others need not go through the last MLP. Nothing is added after the last layer.
        `recompute` is the share of layers whose inner activations are made again in the backward
        pass, the first ones.
        """
        rotations = self.rotations(positions_3T, attention, x_TD.dtype)
        again = recomputed(recompute, len(self.layers))
        *layers, last = self.layers
        for number, layer in enumerate(layers):
            draws = _draws(layer, x_TD)
            inputs = x_TD, rotations, attention
            x_TD = run_layer(layer, number < again, *inputs, draws=draws)
            if deepstack is not None:
                x_TD = deepstack.after(number, x_TD)
        last_again = again > len(layers)
        inputs = x_TD, rotations, attention
        draws = _draws(last, x_TD)
        y_TD: Tensor = run_layer(last, last_again, *inputs, only_L, draws=draws)
        return y_TD


def _draws(layer: nn.Module, x_TD: Tensor) -> bool:
    """Whether the layer draws random numbers: kernels have theirs from a seed."""
    return not (isinstance(layer, DecoderLayer) and layer.fused(x_TD))
