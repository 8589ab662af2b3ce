"""Qwen-7B decoder of the first Qwen-VL (Bai et al. 2023, arXiv 2309.16609).

It extends the context beyond the training length with dynamic NTK and LogN scaling.

Shapes: T tokens, D hidden size, H heads, F frequencies of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from finesight.model.attention import AttentionBackend
from finesight.model.config import ConfigReader, DecoderConfig
from finesight.model.decoder import Decoder
from finesight.model.fused_linear import FusedLinear, single_output
from finesight.model.fused_ops import swiglu
from finesight.model.layers import RmsNorm
from finesight.model.rope import RotaryCosSin, apply_rotary_pos_emb, inverse_frequencies

MAX_NTK_DOUBLINGS = 10
"""Maximum number of doublings of the training length: two million tokens for a length of 2048."""


@dataclass(frozen=True, kw_only=True)
class QwenDecoderConfig(DecoderConfig):
    """Config of the Qwen-7B decoder.

    The base model was trained on sequences of `train_length` tokens. Beyond this length, the rotary
    base grows with the sequence length (dynamic NTK), and queries are scaled by the logarithm of
    their position (LogN).
    """

    train_length: int
    use_dynamic_ntk: bool
    use_logn_attn: bool

    def prefix_cache_key(self, num_tokens: int) -> str:
        """Return a key of the rotary base that applies to this prompt length.

        Prompts with different rotary bases have different keys and values for the same prefix.
        """
        return (
            f"ntk {count_ntk_doublings(torch.tensor(num_tokens), self.train_length)}"
            if self.use_dynamic_ntk
            else ""
        )


@dataclass(frozen=True)
class QueryKeyRotary:
    """Rotary embeddings of queries and of keys; those of queries include the LogN scale."""

    queries: RotaryCosSin
    keys: RotaryCosSin


class QwenAttention(nn.Module):
    """Multi-head attention of the Qwen-7B decoder, without grouped-query attention."""

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.c_attn = FusedLinear(config.hidden_size, {"c_attn": 3 * config.hidden_size}, bias=True)
        self.c_proj = FusedLinear(config.hidden_size, {"c_proj": config.hidden_size}, bias=False)

    def forward(self, x_TD: Tensor, rotary: QueryKeyRotary, attention: AttentionBackend) -> Tensor:
        """Map hidden states [T, D] to attention outputs [T, D]."""
        heads_THD = single_output(self.c_attn(x_TD)).view(len(x_TD), -1, self.head_dim)
        q_THD, k_THD, v_THD = heads_THD.chunk(3, dim=1)
        q_THD, k_THD = (
            apply_rotary_pos_emb(q_THD, rotary.queries),
            apply_rotary_pos_emb(k_THD, rotary.keys),
        )
        o_THD = attention(self.layer_index, q_THD, k_THD, v_THD)
        return single_output(self.c_proj(o_THD.flatten(1)))


class QwenMlp(nn.Module):
    """Gated MLP of the Qwen-7B decoder: c_proj(w1(x) * silu(w2(x))) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w2_w1 = FusedLinear(
            hidden_size, {"w2": intermediate_size, "w1": intermediate_size}, bias=False
        )
        self.c_proj = FusedLinear(intermediate_size, {"c_proj": hidden_size}, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Apply the MLP to hidden states, [T, width] to [T, width]."""
        gate, up = self.w2_w1(x_TD)
        return single_output(self.c_proj(swiglu(gate, up)))


class QwenDecoderLayer(nn.Module):
    """Pre-norm layer of the Qwen-7B decoder: attention, then the MLP."""

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        self.ln_1 = RmsNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = QwenAttention(config, layer_index)
        self.ln_2 = RmsNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = QwenMlp(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_TD: Tensor,
        rotary: QueryKeyRotary,
        attention: AttentionBackend,
        logit_indices_L: Tensor | None = None,
    ) -> Tensor:
        """Map hidden states [T, D] to [T, D].

        With `logit_indices_L`, only these tokens pass the MLP and are returned, [L, D].
        """
        x_TD = x_TD + self.attn(self.ln_1(x_TD), rotary, attention)
        if logit_indices_L is not None:
            x_TD = x_TD.index_select(0, logit_indices_L)
        y_TD: Tensor = x_TD + self.mlp(self.ln_2(x_TD))
        return y_TD


class QwenDecoder(Decoder):
    """Qwen-7B decoder with 1-D position ids, which count text and image tokens.

    As in the published code, dynamic NTK and LogN scaling apply only in evaluation mode. During
    generation the prompt length determines the rotary base, and queries are scaled by their own
    positions.
    """

    config: QwenDecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        assert isinstance(config, QwenDecoderConfig), f"got a {type(config).__name__}"
        super().__init__(config, QwenDecoderLayer)

    @torch.no_grad()
    def compute_rotary(
        self, position_ids_3T: Tensor, attention: AttentionBackend, dtype: torch.dtype
    ) -> QueryKeyRotary:
        """Compute the rotary embeddings of queries and keys in fp32, as the published code does."""
        position_ids_T1 = position_ids_3T[0].unsqueeze(1)
        angles_TF = position_ids_T1.float() * self._inverse_frequencies(
            attention, position_ids_3T.device
        )
        keys = RotaryCosSin.from_angles(angles_TF, torch.float32)
        if self.training or not self.config.use_logn_attn:
            return QueryKeyRotary(keys, keys)
        scale_T11 = logn_scale(position_ids_T1.unsqueeze(1), self.config.train_length)
        return QueryKeyRotary(
            RotaryCosSin(keys.cos_T1D * scale_T11, keys.sin_T1D * scale_T11), keys
        )

    def _inverse_frequencies(self, attention: AttentionBackend, device: torch.device) -> Tensor:
        """Return inverse frequencies [F], or [T, F] if sequences have different rotary bases.

        No host-to-device copy is made, so that a decode step can be captured as a CUDA graph.
        """
        head_dim, rope_theta = self.config.head_dim, self.config.rope_theta
        if self.training or not self.config.use_dynamic_ntk:
            return inverse_frequencies(head_dim, rope_theta, device)
        doublings_T = count_ntk_doublings(attention.context_lengths_T, self.config.train_length)
        return _inverse_frequencies_by_doubling(head_dim, rope_theta, device).index_select(
            0, doublings_T
        )


def count_ntk_doublings(lengths: Tensor, train_length: int) -> Tensor:
    """Return the number of doublings of the training length that cover each sequence length."""
    doublings = [(lengths > train_length * 2**n).long() for n in range(MAX_NTK_DOUBLINGS)]
    return torch.stack(doublings).sum(0)


@lru_cache
def _inverse_frequencies_by_doubling(
    head_dim: int, rope_theta: float, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        bases = [
            ntk_base(rope_theta, head_dim, num_doublings)
            for num_doublings in range(MAX_NTK_DOUBLINGS + 1)
        ]
        return torch.stack([inverse_frequencies(head_dim, base, device) for base in bases])


def ntk_base(rope_theta: float, head_dim: int, num_doublings: int) -> float:
    """Return the rotary base of NTK-aware interpolation for a number of context doublings.

    It covers 2^(num_doublings + 1) - 1 training lengths (Bai et al. 2023, arXiv 2309.16609).
    """
    return rope_theta * math.pow(2 ** (num_doublings + 1) - 1, head_dim / (head_dim - 2))


def logn_scale(position_ids: Tensor, train_length: int) -> Tensor:
    """Return the LogN scale of the query at each position.

    The scale is log(n) / log(train_length) for positions beyond the training length and 1 up to it
    (Bai et al. 2023, arXiv 2309.16609). It is computed in fp64.
    """
    return ((position_ids + 1).double().log() / math.log(train_length)).clamp_min(1.0).float()


def parse_qwen_decoder_config(hf_config: ConfigReader) -> QwenDecoderConfig:
    """Parse the Qwen-7B decoder config from config.json.

    Raises UserError for missing and unsupported values.
    """
    hf_config.require_supported("rotary_pct", 1.0, (1.0,))
    hf_config.require_supported("no_bias", True, (True,))
    hf_config.require_supported("scale_attn_weights", True, (True,))
    hf_config.require_supported("attn_dropout_prob", 0.0, (0.0,))
    hf_config.require_supported("emb_dropout_prob", 0.0, (0.0,))
    hidden_size, num_heads = (
        hf_config.get_int("hidden_size"),
        hf_config.get_int("num_attention_heads"),
    )
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        hf_config.raise_invalid(
            "num_attention_heads", f"a divisor of hidden_size {hidden_size} with an even quotient"
        )
    hf_config.require_supported(
        "kv_channels", hidden_size // num_heads, (hidden_size // num_heads,)
    )
    intermediate_size = hf_config.get_int("intermediate_size")
    if intermediate_size % 2:
        hf_config.raise_invalid("intermediate_size", "an even number: both halves of the gated MLP")
    train_length = hf_config.get_int("seq_length")
    if train_length < 2:
        hf_config.raise_invalid("seq_length", "at least 2: attention is scaled by its logarithm")
    return QwenDecoderConfig(
        vocab_size=hf_config.get_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size // 2,
        num_layers=hf_config.get_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        use_qk_norm=False,
        rms_norm_eps=hf_config.get_float("layer_norm_epsilon"),
        rope_theta=hf_config.get_float("rotary_emb_base", 10000.0),
        mrope_axes=(0,) * (hidden_size // num_heads // 2),
        max_position_embeddings=hf_config.get_int("max_position_embeddings", 8192),
        tie_word_embeddings=hf_config.get_bool("tie_word_embeddings", False),
        train_length=train_length,
        use_dynamic_ntk=hf_config.get_bool("use_dynamic_ntk", True),
        use_logn_attn=hf_config.get_bool("use_logn_attn", True),
    )
