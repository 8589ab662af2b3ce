"""Qwen-VL and Qwen-VL-Chat (Bai et al. 2023, arXiv 2308.12966): how config.json is read, the vision
tower, and the resampler. The decoder is `model.qwen_language`.

Shapes: P pictures, N patches of all of them, G patches of one, D width, Q queries of the resampler,
H heads, M features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from finesight.encode.encoded import Grid
from finesight.model.architecture import Architecture
from finesight.model.attention import Segments, attend
from finesight.model.fp8 import Rows
from finesight.model.geometry import Pixels, Settings, VisionGeometry
from finesight.model.layers import added_norm
from finesight.model.linear import GroupedLinear, only
from finesight.model.peft_config import FIRST
from finesight.model.qwen_language import QwenDecoder, read_qwen_language
from finesight.model.rope import Rotation
from finesight.model.runs import upload
from finesight.model.tower import VisionTower, positions_by_square

QUERIES = 256
"""Queries of the resampler where the configuration names no number, as in the published one."""

POSITIONS = 16
"""Rows and columns of the learned positions; a picture of another grid gets them interpolated."""

HEAD_WIDTH = 128
"""Of the resampler's attention."""

_norm = partial(nn.LayerNorm, eps=1e-6)


class FusedAttention(nn.Module):
    """Every patch of a picture looks at all of them. The rows of the joint weight are sorted by
    head, and within a head by query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = GroupedLinear(width, {"in_proj": 3 * width}, bias=True)
        self.out_proj = GroupedLinear(width, {"out_proj": width}, bias=True)

    def forward(self, x_ND: Tensor | Rows, segments: Segments) -> Tensor:
        """[N, width] to [N, width]."""
        joint_NE = only(self.in_proj(x_ND))
        heads_NHD = joint_NE.view(len(joint_NE), self.heads, -1)
        q_NHD, k_NHD, v_NHD = heads_NHD.chunk(3, dim=-1)
        o_NHD = attend(q_NHD, k_NHD, v_NHD, segments, causal=False)
        return only(self.out_proj(o_NHD.flatten(1)))


class Mlp(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.c_fc = GroupedLinear(width, {"c_fc": mlp_width}, bias=True)
        self.c_proj = GroupedLinear(mlp_width, {"c_proj": width}, bias=True)

    def forward(self, x_ND: Tensor | Rows) -> Tensor:
        """[N, width] to [N, width]."""
        return only(self.c_proj(F.gelu(only(self.c_fc(x_ND)))))


class Block(nn.Module):
    """Attention within a picture, then the MLP, each on the norm of what it is added to."""

    def __init__(self, geometry: VisionGeometry) -> None:
        super().__init__()
        self.ln_1 = _norm(geometry.width)
        self.ln_2 = _norm(geometry.width)
        self.attn = FusedAttention(geometry.width, geometry.heads)
        self.mlp = Mlp(geometry.width, geometry.mlp_width)

    def forward(
        self, x_ND: Tensor, y_ND: Tensor | None, rotation: Rotation, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """As `VisionBlock`; positions are learned, nothing is turned."""
        x_ND, n_ND = added_norm(x_ND, y_ND, self.ln_1, self.attn.in_proj)
        x_ND, n_ND = added_norm(x_ND, self.attn(n_ND, segments), self.ln_2, self.mlp.c_fc)
        return x_ND, self.mlp(n_ND)


class CrossAttention(nn.Module):
    """Queries of one picture look at its patches. Published as one weight for what three inputs
    go through, which no adapter fits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = GroupedLinear(width, {"out_proj": width}, bias=True)

    def forward(self, q_QD: Tensor, k_PGD: Tensor, v_PGD: Tensor) -> Tensor:
        """The same queries for every picture; [P, Q, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (q_QD.expand(len(k_PGD), -1, -1), k_PGD, v_PGD)
        q, k, v = (
            torch.unflatten(F.linear(x, weight, bias), -1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        o_PQHD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return only(self.out_proj(o_PQHD.flatten(2)))


class Pool(nn.Module):
    """A learned query for each feature takes what it needs from a picture's patches (section 2.1).

    The positions of queries and patches are sines and cosines of rows and columns; they are stored
    with the weights and never learn.
    """

    pos_embed: Tensor

    def __init__(self, queries: int, width: int, patch_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.register_buffer("pos_embed", torch.empty(queries, width))
        self.kv_proj = (
            GroupedLinear(patch_width, {"kv_proj": width}, bias=False)
            if patch_width != width
            else None
        )
        self.attn = CrossAttention(width)
        self.ln_q = _norm(width)
        self.ln_kv = _norm(width)

    @torch.no_grad()
    def set_positions(self) -> None:
        """Give the positions the values that published models have."""
        queries, width = self.pos_embed.shape
        self.pos_embed.copy_(torch.from_numpy(sine_positions(math.isqrt(queries), width)))

    def forward(self, x_PGD: Tensor, order_G: Tensor) -> Tensor:
        """Patches in the order `order_G` of their places to features [P, Q, width]."""
        if self.kv_proj is not None:
            x_PGD = only(self.kv_proj(x_PGD))
        x_PGD = self.ln_kv(x_PGD)
        places_GD = _spread(self.pos_embed, len(order_G)).index_select(0, order_G)
        q_QD = self.ln_q(self.query) + self.pos_embed
        y_PQD: Tensor = self.attn(q_QD, x_PGD + places_GD, x_PGD)
        return y_PQD


class Resampler(nn.Module):
    """The patches of each picture to its features: attention of queries, a norm, a product."""

    def __init__(self, geometry: VisionGeometry, side: int, queries: int) -> None:
        super().__init__()
        self.side, self.merge = side, geometry.merge
        self.attn_pool = Pool(queries, geometry.out_width, geometry.width)
        self.ln_post = _norm(geometry.out_width)
        self.proj = nn.Parameter(torch.empty(geometry.out_width, geometry.out_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, width] to [M, out_width]."""
        x_PGD = torch.unflatten(x_ND, 0, (-1, self.side**2))
        order_G = _places(self.side, self.merge, x_ND.device)
        y_PQD: Tensor = self.ln_post(self.attn_pool(x_PGD, order_G)) @ self.proj
        return y_PQD.flatten(0, 1)


class SquareTower(VisionTower):
    """Pictures of one size, `side` patches each way, to `queries` features each."""

    def __init__(self, geometry: VisionGeometry, pixels: Pixels, side: int, queries: int) -> None:
        resampler = Resampler(geometry, side, queries)
        super().__init__(geometry, pixels, partial(Block, geometry), resampler)
        self.side = side
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS**2, geometry.width))
        self.ln_pre = _norm(geometry.width)

    @property
    def smallest(self) -> Grid:
        """That of all pictures."""
        return 1, self.side, self.side

    def placed(self, x_ND: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Embedded patches with their learned positions, normed."""
        strange = [grid for grid in grids if grid != (1, self.side, self.side)]
        assert not strange, f"a picture of {strange[0]} patches, not {self.side} x {self.side}"
        places_GD = _spread(self.positional_embedding, self.side**2)
        order_G = _places(self.side, self.geometry.merge, x_ND.device)
        places_GD = places_GD.index_select(0, order_G)
        x_PGD = torch.unflatten(x_ND, 0, (-1, self.side**2)) + places_GD
        y_ND: Tensor = self.ln_pre(x_PGD.flatten(0, 1))
        return y_ND


def _spread(table_SD: Tensor, places: int) -> Tensor:
    """A square table of positions stretched to so many, in bicubic steps (in fp32)."""
    if len(table_SD) == places:
        return table_SD
    shares_PS = _bicubic(math.isqrt(len(table_SD)), math.isqrt(places), table_SD.device)
    return (shares_PS @ table_SD.float()).to(table_SD.dtype)


@lru_cache
def _bicubic(source: int, target: int, device: torch.device) -> Tensor:
    """What each place of a square of `target` has of those of one of `source`, [target x target,
    source x source]: as a product it takes no time, where torch's own stretching takes a tenth of a
    step."""
    with torch.inference_mode(False):
        each = torch.eye(source**2).view(1, source**2, source, source)
        spread = F.interpolate(each, size=(target, target), mode="bicubic", align_corners=False)
        shares_PS: Tensor = spread.flatten(2).squeeze(0).T.contiguous().to(device)
        return shares_PS


@lru_cache
def _places(side: int, merge: int, device: torch.device) -> Tensor:
    """The place, in reading order, of each patch of a picture in the order of a pack."""
    with torch.inference_mode(False):
        rows_columns = positions_by_square((1, side, side), merge).reshape(-1, 2)
        return upload((rows_columns @ [side, 1]).astype(np.int64), device)


def sine_positions(side: int, width: int) -> NDArray[np.float32]:
    """[side x side, width]: the first half of the numbers says the column, the second the row, each
    in sines, then cosines, of falling frequencies (Vaswani et al. 2017)."""
    frequencies = 10000.0 ** (-np.arange(width // 4, dtype=np.float32) / (width / 4))
    angles_SF = np.arange(side, dtype=np.float32)[:, None] * frequencies
    one_SD = np.concatenate([np.sin(angles_SF), np.cos(angles_SF)], axis=1)
    columns, rows = np.tile(one_SD, (side, 1)), np.repeat(one_SD, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def vision_tower(config: Settings, pixels: Pixels) -> SquareTower:
    """From `visual`. Raises UserError for a grid of patches that the queries do not divide."""
    visual = config.section("visual")
    patch, out_width = visual.whole("patch_size"), visual.whole("output_dim")
    side, pixel_rest = divmod(visual.whole("image_size"), patch)
    queries = visual.whole("n_queries", QUERIES)
    merge, rest = divmod(side, math.isqrt(queries))
    if pixel_rest or rest or not merge or math.isqrt(queries) ** 2 != queries:
        visual.refuse("image_size", f"a multiple of {patch} x {math.isqrt(queries)}")
    width, heads = visual.whole("width"), visual.whole("heads")
    if width % heads:
        visual.refuse("heads", f"a divisor of width {width}")
    if out_width % HEAD_WIDTH:
        visual.refuse("output_dim", f"a multiple of {HEAD_WIDTH}")
    geometry = VisionGeometry(
        width=width,
        mlp_width=int(width * visual.number("mlp_ratio")),
        depth=visual.whole("layers"),
        heads=heads,
        out_width=out_width,
        channels=3,
        patch=patch,
        frames=1,
        merge=merge,
        theta=10000.0,
    )
    return SquareTower(geometry, pixels, side, queries)


ARCHITECTURE = Architecture(
    read_qwen_language,
    vision_tower,
    published={
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
    decoder=QwenDecoder,
    modules=FIRST,
)
