"""First Qwen-VL and Qwen-VL-Chat (Bai et al. 2023, arXiv 2308.12966).

The Qwen-7B decoder (arXiv 2309.16609) extends the context beyond the training length with dynamic
NTK and LogN scaling. A resampler follows the vision encoder.

Shapes: T tokens, F frequencies of a head, P images, N patches of all images, G patches of one
image, D hidden size, Q queries of the resampler, H heads, M features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.batch import copy_to_device
from finesight.model.attention import AttentionBackend, Segments, varlen_attention
from finesight.model.config import (
    ConfigReader,
    DecoderConfig,
    PixelNormalization,
    VisionConfig,
    get_even_head_dim,
)
from finesight.model.decoder import Decoder
from finesight.model.families import QWEN_VL_MAPPING, Architecture
from finesight.model.fused_ops import swiglu
from finesight.model.layers import (
    EXACT_GELU,
    GeluMlp,
    RmsNorm,
    RotaryCosSin,
    add_norm,
    apply_rotary_pos_emb,
    inverse_frequencies,
)
from finesight.model.linear import FusedLinear, single_output
from finesight.model.quant.base import Fp8Rows
from finesight.model.vision_encoder import VisionEncoder, patch_coordinates
from finesight.vision.image_processing import GridTHW

MAX_NTK_DOUBLINGS = 10
"""Maximum number of doublings of the training length: two million tokens for a length of 2048."""


@dataclass(frozen=True, kw_only=True)
class QwenDecoderConfig(DecoderConfig):
    """Config of the Qwen-7B decoder."""

    train_length: int
    use_dynamic_ntk: bool
    use_logn_attn: bool

    def prefix_cache_key(self, num_tokens: int) -> str:
        if not self.use_dynamic_ntk:
            return ""
        return f"ntk {count_ntk_doublings(torch.tensor(num_tokens), self.train_length)}"


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
        heads_THD = single_output(self.c_attn(x_TD)).view(len(x_TD), -1, self.head_dim)
        q_THD, k_THD, v_THD = heads_THD.chunk(3, dim=1)
        q_THD = apply_rotary_pos_emb(q_THD, rotary.queries)
        k_THD = apply_rotary_pos_emb(k_THD, rotary.keys)
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
        lengths_T11 = (position_ids_T1.unsqueeze(1) + 1).double()
        scale_T11 = (lengths_T11.log() / math.log(self.config.train_length)).clamp_min(1.0).float()
        queries = RotaryCosSin(keys.cos_T1D * scale_T11, keys.sin_T1D * scale_T11)
        return QueryKeyRotary(queries, keys)

    def _inverse_frequencies(self, attention: AttentionBackend, device: torch.device) -> Tensor:
        """Return inverse frequencies [F], or [T, F] if sequences have different rotary bases.

        No host-to-device copy is made, so that a decode step can be captured as a CUDA graph.
        """
        head_dim = self.config.head_dim
        rope_theta = self.config.rope_theta
        if self.training or not self.config.use_dynamic_ntk:
            return inverse_frequencies(head_dim, rope_theta, device)
        doublings_T = count_ntk_doublings(attention.context_lengths_T, self.config.train_length)
        frequencies_NF = _inverse_frequencies_by_doubling(head_dim, rope_theta, device)
        return frequencies_NF.index_select(0, doublings_T)


def count_ntk_doublings(lengths: Tensor, train_length: int) -> Tensor:
    """Return the number of doublings of the training length that cover each sequence length."""
    doublings = [(lengths > train_length * 2**n).long() for n in range(MAX_NTK_DOUBLINGS)]
    return torch.stack(doublings).sum(0)


@lru_cache
def _inverse_frequencies_by_doubling(
    head_dim: int, rope_theta: float, device: torch.device
) -> Tensor:
    """Return the frequencies of NTK-aware interpolation for each number of context doublings."""
    exponent = head_dim / (head_dim - 2)
    frequencies = []
    with torch.inference_mode(False):
        for num_doublings in range(MAX_NTK_DOUBLINGS + 1):
            base = rope_theta * math.pow(2 ** (num_doublings + 1) - 1, exponent)
            frequencies.append(inverse_frequencies(head_dim, base, device))
        return torch.stack(frequencies)


def parse_qwen_decoder_config(hf_config: ConfigReader) -> QwenDecoderConfig:
    hf_config.require_supported("rotary_pct", 1.0, (1.0,))
    hf_config.require_supported("no_bias", True, (True,))
    hf_config.require_supported("scale_attn_weights", True, (True,))
    hf_config.require_supported("attn_dropout_prob", 0.0, (0.0,))
    hf_config.require_supported("emb_dropout_prob", 0.0, (0.0,))
    hidden_size = hf_config.get_int("hidden_size")
    num_heads = hf_config.get_int("num_attention_heads")
    head_dim = get_even_head_dim(hf_config, hidden_size, num_heads)
    hf_config.require_supported("kv_channels", head_dim, (head_dim,))
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
        head_dim=head_dim,
        use_qk_norm=False,
        rms_norm_eps=hf_config.get_float("layer_norm_epsilon"),
        rope_theta=hf_config.get_float("rotary_emb_base", 10000.0),
        mrope_axes=(0,) * (head_dim // 2),
        max_position_embeddings=hf_config.get_int("max_position_embeddings", 8192),
        tie_word_embeddings=hf_config.get_bool("tie_word_embeddings", False),
        train_length=train_length,
        use_dynamic_ntk=hf_config.get_bool("use_dynamic_ntk", True),
        use_logn_attn=hf_config.get_bool("use_logn_attn", True),
    )


DEFAULT_NUM_QUERIES = 256
"""Default number of resampler queries, as in the published model."""

POSITION_GRID_SIZE = 16
"""Side of the square grid of position embeddings; those of other grids are interpolated."""

RESAMPLER_HEAD_DIM = 128
"""Head dimension of the resampler's attention."""

_norm = partial(nn.LayerNorm, eps=1e-6)


class QwenVisionAttention(nn.Module):
    """Self-attention between all patches of an image.

    The rows of the fused QKV weight are sorted by head, and within a head by query, key and value.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = FusedLinear(hidden_size, {"in_proj": 3 * hidden_size}, bias=True)
        self.out_proj = FusedLinear(hidden_size, {"out_proj": hidden_size}, bias=True)

    def forward(self, x_ND: Tensor | Fp8Rows, segments: Segments) -> Tensor:
        qkv_NE = single_output(self.in_proj(x_ND))
        heads_NHD = qkv_NE.view(len(qkv_NE), self.num_heads, -1)
        q_NHD, k_NHD, v_NHD = heads_NHD.chunk(3, dim=-1)
        o_NHD = varlen_attention(q_NHD, k_NHD, v_NHD, segments, causal=False)
        return single_output(self.out_proj(o_NHD.flatten(1)))


class QwenVisionBlock(nn.Module):
    """Pre-norm vision transformer block: attention within an image, then the MLP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1 = _norm(config.hidden_size)
        self.ln_2 = _norm(config.hidden_size)
        self.attn = QwenVisionAttention(config.hidden_size, config.num_heads)
        sizes = (config.hidden_size, config.intermediate_size, config.hidden_size)
        self.mlp = GeluMlp(sizes, ("c_fc", "c_proj"), EXACT_GELU)

    def forward(
        self, x_ND: Tensor, y_ND: Tensor | None, rotary: RotaryCosSin, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        x_ND, n_ND = add_norm(x_ND, y_ND, self.ln_1, self.attn.in_proj)
        x_ND, n_ND = add_norm(x_ND, self.attn(n_ND, segments), self.ln_2, self.mlp.linears[0])
        return x_ND, self.mlp(n_ND)


class ResamplerAttention(nn.Module):
    """Cross-attention from the resampler's queries to the patches of an image."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = hidden_size // RESAMPLER_HEAD_DIM
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = FusedLinear(hidden_size, {"out_proj": hidden_size}, bias=True)

    def forward(self, q_QD: Tensor, k_PGD: Tensor, v_PGD: Tensor) -> Tensor:
        """Compute the attention of the same queries to every image, [P, Q, D]."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        inputs = (q_QD.expand(len(k_PGD), -1, -1), k_PGD, v_PGD)
        q, k, v = (
            torch.unflatten(F.linear(x, weight, bias), -1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        o_PQHD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return single_output(self.out_proj(o_PQHD.flatten(2)))


class AttentionPool(nn.Module):
    """Cross-attention pooling of patches, with one trained query per feature.

    See section 2.1 of the Qwen-VL paper. Queries and patches have 2-D sine-cosine position
    embeddings, which are stored with the weights and never trained.
    """

    pos_embed: Tensor

    def __init__(self, num_queries: int, hidden_size: int, kv_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.register_buffer("pos_embed", torch.empty(num_queries, hidden_size))
        self.kv_proj: FusedLinear | None = None
        if kv_size != hidden_size:
            self.kv_proj = FusedLinear(kv_size, {"kv_proj": hidden_size}, bias=False)
        self.attn = ResamplerAttention(hidden_size)
        self.ln_q = _norm(hidden_size)
        self.ln_kv = _norm(hidden_size)

    def forward(self, x_PGD: Tensor, order_G: Tensor) -> Tensor:
        if self.kv_proj is not None:
            x_PGD = single_output(self.kv_proj(x_PGD))
        x_PGD = self.ln_kv(x_PGD)
        key_positions_GD = _interpolate_table(self.pos_embed, len(order_G)).index_select(0, order_G)
        q_QD = self.ln_q(self.query) + self.pos_embed
        y_PQD: Tensor = self.attn(q_QD, x_PGD + key_positions_GD, x_PGD)
        return y_PQD


class VisionResampler(nn.Module):
    """Resampler of the vision encoder: cross-attention pooling, norm and projection."""

    def __init__(self, config: VisionConfig, grid_size: int, num_queries: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.merge_size = config.merge_size
        self.attn_pool = AttentionPool(num_queries, config.out_hidden_size, config.hidden_size)
        self.ln_post = _norm(config.out_hidden_size)
        self.proj = nn.Parameter(torch.empty(config.out_hidden_size, config.out_hidden_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        x_PGD = torch.unflatten(x_ND, 0, (-1, self.grid_size**2))
        order_G = _patch_order(self.grid_size, self.merge_size, x_ND.device)
        y_PQD: Tensor = self.ln_post(self.attn_pool(x_PGD, order_G)) @ self.proj
        return y_PQD.flatten(0, 1)


class QwenVisionEncoder(VisionEncoder):
    """Vision encoder of the first Qwen-VL, for images of one size."""

    supports_padding = False

    def __init__(
        self,
        config: VisionConfig,
        normalization: PixelNormalization,
        grid_size: int,
        num_queries: int,
    ) -> None:
        resampler = VisionResampler(config, grid_size, num_queries)
        super().__init__(config, normalization, partial(QwenVisionBlock, config), resampler)
        self.grid_size = grid_size
        self.positional_embedding = nn.Parameter(
            torch.empty(POSITION_GRID_SIZE**2, config.hidden_size)
        )
        self.ln_pre = _norm(config.hidden_size)

    @property
    def min_grid(self) -> GridTHW:
        return 1, self.grid_size, self.grid_size

    def add_position_embeddings(self, x_ND: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        invalid = [grid for grid in grid_thw if grid != self.min_grid]
        assert not invalid, f"an image of {invalid[0]} patches, not {self.min_grid}"
        positions_GD = _interpolate_table(self.positional_embedding, self.grid_size**2)
        order_G = _patch_order(self.grid_size, self.config.merge_size, x_ND.device)
        positions_GD = positions_GD.index_select(0, order_G)
        x_PGD = torch.unflatten(x_ND, 0, (-1, self.grid_size**2)) + positions_GD
        y_ND: Tensor = self.ln_pre(x_PGD.flatten(0, 1))
        return y_ND


def _interpolate_table(table_SD: Tensor, num_positions: int) -> Tensor:
    """Resize a square table of position embeddings with bicubic interpolation in fp32."""
    if len(table_SD) == num_positions:
        return table_SD
    source_side = math.isqrt(len(table_SD))
    target_side = math.isqrt(num_positions)
    weights_PS = _bicubic_weights(source_side, target_side, table_SD.device)
    return (weights_PS @ table_SD.float()).to(table_SD.dtype)


@lru_cache
def _bicubic_weights(source: int, target: int, device: torch.device) -> Tensor:
    """Return the matrix of a bicubic interpolation, [target x target, source x source]."""
    with torch.inference_mode(False):
        basis = torch.eye(source**2).view(1, source**2, source, source)
        interpolated = F.interpolate(
            basis, size=(target, target), mode="bicubic", align_corners=False
        )
        weights_PS: Tensor = interpolated.flatten(2).squeeze(0).T.contiguous().to(device)
        return weights_PS


@lru_cache
def _patch_order(grid_size: int, merge_size: int, device: torch.device) -> Tensor:
    """Return the reading-order index of each patch of an image, in packed order."""
    with torch.inference_mode(False):
        rows_columns = patch_coordinates((1, grid_size, grid_size), merge_size).reshape(-1, 2)
        return copy_to_device((rows_columns @ [grid_size, 1]).astype(np.int64), device)


def build_vision_encoder(
    hf_config: ConfigReader, normalization: PixelNormalization
) -> QwenVisionEncoder:
    visual = hf_config.section("visual")
    patch_size = visual.get_int("patch_size")
    out_hidden_size = visual.get_int("output_dim")
    grid_size, pixel_rest = divmod(visual.get_int("image_size"), patch_size)
    num_queries = visual.get_int("n_queries", DEFAULT_NUM_QUERIES)
    query_side = math.isqrt(num_queries)
    merge_size, rest = divmod(grid_size, query_side)
    if pixel_rest or rest or not merge_size or query_side**2 != num_queries:
        visual.raise_invalid("image_size", f"a multiple of {patch_size} x {query_side}")
    hidden_size = visual.get_int("width")
    num_heads = visual.get_int("heads")
    if hidden_size % num_heads:
        visual.raise_invalid("heads", f"a divisor of width {hidden_size}")
    if out_hidden_size % RESAMPLER_HEAD_DIM:
        visual.raise_invalid("output_dim", f"a multiple of {RESAMPLER_HEAD_DIM}")
    config = VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * visual.get_float("mlp_ratio")),
        num_layers=visual.get_int("layers"),
        num_heads=num_heads,
        out_hidden_size=out_hidden_size,
        in_channels=3,
        patch_size=patch_size,
        temporal_patch_size=1,
        merge_size=merge_size,
        rope_theta=10000.0,
    )
    return QwenVisionEncoder(config, normalization, grid_size, num_queries)


ARCHITECTURE = Architecture(
    parse_qwen_decoder_config,
    build_vision_encoder,
    hub_prefixes={
        "visual.patch_embed.proj.": "transformer.visual.conv1.",
        "visual.blocks.": "transformer.visual.transformer.resblocks.",
        "visual.merger.attn_pool.": "transformer.visual.attn_pool.",
        "visual.merger.ln_post.": "transformer.visual.ln_post.",
        "visual.merger.proj": "transformer.visual.proj",
        "visual.positional_embedding": "transformer.visual.positional_embedding",
        "visual.ln_pre.": "transformer.visual.ln_pre.",
        "model.layers.": "transformer.h.",
        "model.embed_tokens.": "transformer.wte.",
        "model.norm.": "transformer.ln_f.",
    },
    decoder_class=QwenDecoder,
    adapter_key_mapping=QWEN_VL_MAPPING,
)
