"""Qwen-7B, the decoder of Qwen-VL (Bai et al. 2023, arXiv 2309.16609), with what it does to read
more than it was trained on.

Shapes: T tokens, D width, H heads, F frequencies of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from finesight.model.attention import Attention
from finesight.model.fused import gated
from finesight.model.geometry import LanguageGeometry, Settings
from finesight.model.language import Decoder
from finesight.model.layers import RmsNorm
from finesight.model.linear import GroupedLinear, only
from finesight.model.rope import Rotation, head_frequencies, rotate

DOUBLINGS = 10
"""Of the trained length at most: two million tokens, where it is 2048."""


@dataclass(frozen=True, kw_only=True)
class QwenGeometry(LanguageGeometry):
    """`trained` tokens were a sequence of pretraining. Beyond them the rotary base grows with the
    sequence (`ntk`), and queries with the logarithm of their position (`logn`)."""

    trained: int
    ntk: bool
    logn: bool

    def reading(self, tokens: int) -> str:
        """By the rotary base of the prompt's length."""
        return f"ntk {ntk_steps(torch.tensor(tokens), self.trained)}" if self.ntk else ""


@dataclass(frozen=True)
class Rotations:
    """What turns queries and what turns keys: where queries are scaled, their turn does both."""

    queries: Rotation
    keys: Rotation


class SelfAttention(nn.Module):
    """Attention with as many key heads as query heads; `layer` is its number in the decoder."""

    def __init__(self, geometry: LanguageGeometry, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = geometry.head_width
        self.c_attn = GroupedLinear(geometry.width, {"c_attn": 3 * geometry.width}, bias=True)
        self.c_proj = GroupedLinear(geometry.width, {"c_proj": geometry.width}, bias=False)

    def forward(self, x_TD: Tensor, rotations: Rotations, attention: Attention) -> Tensor:
        """[T, width] to [T, width]."""
        heads_THD = only(self.c_attn(x_TD)).view(len(x_TD), -1, self.head_width)
        q_THD, k_THD, v_THD = heads_THD.chunk(3, dim=1)
        q_THD, k_THD = rotate(q_THD, rotations.queries), rotate(k_THD, rotations.keys)
        o_THD = attention(self.layer, q_THD, k_THD, v_THD)
        return only(self.c_proj(o_THD.flatten(1)))


class Mlp(nn.Module):
    """c_proj(w1(x) * silu(w2(x))) (Shazeer 2020)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.w2_w1 = GroupedLinear(width, {"w2": mlp_width, "w1": mlp_width}, bias=False)
        self.c_proj = GroupedLinear(mlp_width, {"c_proj": width}, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, width] to [T, width]."""
        gate, up = self.w2_w1(x_TD)
        return only(self.c_proj(gated(gate, up)))


class QwenLayer(nn.Module):
    """Attention, then the MLP, each on the norm of what it is added to."""

    def __init__(self, geometry: LanguageGeometry, layer: int) -> None:
        super().__init__()
        self.ln_1 = RmsNorm(geometry.width, eps=geometry.norm_eps)
        self.attn = SelfAttention(geometry, layer)
        self.ln_2 = RmsNorm(geometry.width, eps=geometry.norm_eps)
        self.mlp = Mlp(geometry.width, geometry.mlp_width)

    def forward(
        self, x_TD: Tensor, rotations: Rotations, attention: Attention, only_L: Tensor | None = None
    ) -> Tensor:
        """[T, width] to [T, width], or to [L, width] for the tokens `only_L`."""
        x_TD = x_TD + self.attn(self.ln_1(x_TD), rotations, attention)
        if only_L is not None:
            x_TD = x_TD.index_select(0, only_L)
        y_TD: Tensor = x_TD + self.mlp(self.ln_2(x_TD))
        return y_TD


class QwenDecoder(Decoder):
    """Positions count the tokens of a sequence, pictures' included.

    While it trains, the decoder reads any length as it reads a short one: the published code widens
    the rotary base and scales queries only outside of training. While it generates, the base stays
    that of the prompt's length, however far the answer goes, and queries are scaled by their own
    positions.
    """

    geometry: QwenGeometry

    def __init__(self, geometry: LanguageGeometry) -> None:
        assert isinstance(geometry, QwenGeometry), f"the sizes are a {type(geometry).__name__}"
        super().__init__(geometry, QwenLayer)

    @torch.no_grad()
    def rotations(
        self, positions_3T: Tensor, attention: Attention, dtype: torch.dtype
    ) -> Rotations:
        """Kept in fp32, as the published code keeps them."""
        positions_T1 = positions_3T[0].unsqueeze(1)
        angles_TF = positions_T1.float() * self._frequencies(attention, positions_3T.device)
        keys = Rotation.by(angles_TF, torch.float32)
        if self.training or not self.geometry.logn:
            return Rotations(keys, keys)
        scale_T11 = logn_scale(positions_T1.unsqueeze(1), self.geometry.trained)
        return Rotations(Rotation(keys.cos_T1D * scale_T11, keys.sin_T1D * scale_T11), keys)

    def _frequencies(self, attention: Attention, device: torch.device) -> Tensor:
        """[F], or [T, F] where each sequence of a pack has its base. Nothing is copied from the
        host, so that a step of generation can be recorded."""
        width, theta = self.geometry.head_width, self.geometry.theta
        if self.training or not self.geometry.ntk:
            return head_frequencies(width, theta, device)
        steps_T = ntk_steps(attention.contexts_T, self.geometry.trained)
        return _frequencies_by_step(width, theta, device).index_select(0, steps_T)


def ntk_steps(lengths: Tensor, trained: int) -> Tensor:
    """How often the trained length doubles until a sequence fits."""
    doublings = [(lengths > trained * 2**n).long() for n in range(DOUBLINGS)]
    return torch.stack(doublings).sum(0)


@lru_cache
def _frequencies_by_step(width: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        bases = [ntk_base(theta, width, steps) for steps in range(DOUBLINGS + 1)]
        return torch.stack([head_frequencies(width, base, device) for base in bases])


def ntk_base(theta: float, head_width: int, steps: int) -> float:
    """The rotary base that spreads a position's angles over 2^(steps + 1) - 1 trained lengths
    (NTK-aware interpolation, section 3.2 of the paper)."""
    return theta * math.pow(2 ** (steps + 1) - 1, head_width / (head_width - 2))


def logn_scale(positions: Tensor, trained: int) -> Tensor:
    """What queries are multiplied by: log(n) / log(trained) for the n-th token beyond `trained`
    (LogN-scaling, section 3.2 of the paper), computed in fp64."""
    return ((positions + 1).double().log() / math.log(trained)).clamp_min(1.0).float()


def read_qwen_language(config: Settings) -> QwenGeometry:
    """The decoder's sizes. Raises UserError for what is missing, and for what no published model
    of the family has."""
    config.require("rotary_pct", 1.0, (1.0,))
    config.require("no_bias", True, (True,))
    config.require("scale_attn_weights", True, (True,))
    config.require("attn_dropout_prob", 0.0, (0.0,))
    config.require("emb_dropout_prob", 0.0, (0.0,))
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if width % heads or (width // heads) % 2:
        config.refuse("num_attention_heads", f"a divisor of hidden_size {width}, even shares")
    config.require("kv_channels", width // heads, (width // heads,))
    inner = config.whole("intermediate_size")
    if inner % 2:
        config.refuse("intermediate_size", "an even number, both halves of the MLP")
    trained = config.whole("seq_length")
    if trained < 2:
        config.refuse("seq_length", "at least 2: attention is scaled by its logarithm")
    return QwenGeometry(
        vocabulary=config.whole("vocab_size"),
        width=width,
        mlp_width=inner // 2,
        depth=config.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        normed_heads=False,
        norm_eps=config.number("layer_norm_epsilon"),
        theta=config.number("rotary_emb_base", 10000.0),
        rows=(0,) * (width // heads // 2),
        positions=config.whole("max_position_embeddings", 8192),
        tied=config.flag("tie_word_embeddings", False),
        trained=trained,
        ntk=config.flag("use_dynamic_ntk", True),
        logn=config.flag("use_logn_attn", True),
    )
