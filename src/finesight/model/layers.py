"""Pieces that the decoder and the vision towers are made of.

Shapes: T tokens, N patches, D width, M squares of merged patches, R rows of a table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finesight.model.attention import Segments, attend
from finesight.model.fp8 import Rows, quantised
from finesight.model.frozen import KERNELS
from finesight.model.fused import gated, gated_jointly, has_kernels, rms_norm
from finesight.model.geometry import Pixels, VisionGeometry
from finesight.model.joined import joined, room
from finesight.model.linear import GroupedLinear, only
from finesight.model.rope import Rotation, rotate

if KERNELS:
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels import turn as turn_kernels


ALIGNED = 8
"""Numbers of 16 bits, at a multiple of which tensor cores want rows to begin."""


def recomputed(share: float, depth: int) -> int:
    """How many of `depth` layers that is, counted from the first: what the last ones keep is gone
    when the way back comes to layers whose activations have to be made again."""
    # Rounded first: 0.28 x 25 is a little more than 7.
    return math.ceil(round(share * depth, 6))


def run_layer(layer: nn.Module, recompute: bool, *inputs: object, draws: bool = True) -> Any:
    """The layer's output; with `recompute` its inner activations are made again in the backward
    pass instead of kept, from the same random numbers where it `draws` any."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return layer(*inputs)


def empty_table(rows: int, width: int) -> nn.Embedding:
    """An embedding whose numbers come later. Drawing them where there is no memory (`meta`) would
    import torch's compiler, which takes as long as importing torch."""
    numbers_RD = torch.empty(rows, width)
    table: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        numbers_RD, freeze=False
    )
    return table


class RmsNorm(nn.RMSNorm):
    """Every token divided by its root mean square, times a weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        assert self.eps is not None, "a norm without eps"
        return rms_norm(x, self.weight, self.eps)


def added_norm(
    x_ND: Tensor, y_ND: Tensor | None, norm: nn.Module, reader: GroupedLinear
) -> tuple[Tensor, Tensor | Rows]:
    """x + y, and the norm of that: in FP8 where the layers that read it take it so."""
    if y_ND is not None:
        if has_kernels(x_ND) and not torch.is_grad_enabled():
            fused = _added_norm(x_ND, y_ND, norm, coded=reader.takes_rows)
            if fused is not None:
                return fused
        x_ND = x_ND + y_ND
    n_ND = norm(x_ND)
    return x_ND, quantised(n_ND) if reader.takes_rows else n_ND


def _added_norm(
    x_ND: Tensor, y_ND: Tensor, norm: nn.Module, *, coded: bool
) -> tuple[Tensor, Tensor | Rows] | None:
    """`added_norm` in one kernel, or None where there is none for this norm."""
    if not isinstance(norm, nn.LayerNorm | RmsNorm) or norm.eps is None:
        return None
    centred = isinstance(norm, nn.LayerNorm)
    bias_D = norm.bias if isinstance(norm, nn.LayerNorm) else None
    factors = norm.weight, bias_D, norm.eps
    return norm_kernels.added_norm(x_ND, y_ND, *factors, centred=centred, coded=coded)


class FeedForward(nn.Module, ABC):
    """An MLP that tells what reads its input."""

    @property
    @abstractmethod
    def first(self) -> GroupedLinear:
        """The layers that do."""


class GatedMlp(FeedForward):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, width: int, mlp_width: int, *, bias: bool) -> None:
        super().__init__()
        outputs = {"gate_proj": mlp_width, "up_proj": mlp_width}
        self.gate_up_proj = GroupedLinear(width, outputs, bias=bias)
        self.down_proj = GroupedLinear(mlp_width, {"down_proj": width}, bias=bias)

    @property
    def first(self) -> GroupedLinear:
        """Gate and up."""
        return self.gate_up_proj

    def forward(self, x_TD: Tensor | Rows) -> Tensor:
        """[T, width] to [T, width]."""
        if self.padded and isinstance(x_TD, Tensor) and has_kernels(x_TD):
            return self._aligned(x_TD)
        gate, up = self.gate_up_proj(x_TD)
        return only(self.down_proj(gated(gate, up)))

    @property
    def padded(self) -> int:
        """Columns behind the last matrix on a card, where the MLP is three matrices and nothing
        more, and rows of the last begin anywhere."""
        down = self.down_proj
        groups = self.gate_up_proj, down
        dense = all(isinstance(g.weight, nn.Parameter) and g.adapter is None for g in groups)
        if down.inputs % ALIGNED == 0 or not dense:
            return 0
        return -down.inputs % ALIGNED if _copied(down) else room(down.inputs, 0)

    def _aligned(self, x_TD: Tensor) -> Tensor:
        """For an inner width whose rows do not begin where tensor cores read quickly: Qwen2.5-VL's
        tower has 3420."""
        gate_up, down = self.gate_up_proj, self.down_proj
        assert isinstance(gate_up.weight, nn.Parameter), "three matrices"
        assert isinstance(down.weight, nn.Parameter), "three matrices"
        both_TF2 = F.linear(x_TD, gate_up.weight, gate_up.bias)
        behind = self.padded
        down_DJ = F.pad(down.weight, (0, behind)) if _copied(down) else joined(down).weight_OJ
        return F.linear(gated_jointly(both_TF2, behind), down_DJ, down.bias)


def _copied(group: GroupedLinear) -> bool:
    """Whether the weight has to stay where it is: what learns lies among other masters."""
    return group.apart or (isinstance(group.weight, nn.Parameter) and group.weight.requires_grad)


class PatchEmbed(nn.Module):
    """Bytes of patches to the tower's width.

    The published weight is that of a 3-D convolution whose stride is its size: on patches that are
    already cut out, a linear layer, and a much faster one.
    """

    def __init__(self, geometry: VisionGeometry, pixels: Pixels, *, bias: bool) -> None:
        super().__init__()
        self.pixels = pixels
        self.proj = nn.Linear(geometry.patch_numbers, geometry.width, bias=bias)

    def forward(self, patches_ND: Tensor) -> Tensor:
        """uint8 [N, channels x frames x patch x patch] to [N, width]; [N, channels x patch x patch]
        stands for frames that are all alike."""
        scale, mean, std = self.pixels.scale, self.pixels.mean, self.pixels.std
        channels = patches_ND.chunk(len(mean), dim=1)
        # Python numbers turn the bytes into fp32, and nothing has to travel to the device.
        kind = self.proj.weight.dtype
        normal = [
            (x * (scale / std[c])).sub_(mean[c] / std[c]).to(kind) for c, x in enumerate(channels)
        ]
        frames = self.proj.in_features // patches_ND.shape[1]
        y_ND: Tensor = self.proj(torch.cat([x for x in normal for _ in range(frames)], 1))
        return y_ND


class VisionAttention(nn.Module):
    """Every patch of a segment looks at all patches of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = GroupedLinear(width, {"qkv": 3 * width}, bias=True)
        self.proj = GroupedLinear(width, {"proj": width}, bias=True)

    def forward(self, x_ND: Tensor | Rows, rotation: Rotation, segments: Segments) -> Tensor:
        """[N, width] to [N, width]."""
        heads = self.heads
        joint_NE = only(self.qkv(x_ND))
        qk_NHD, v_NHD = torch.split(
            joint_NE.view(len(joint_NE), 3 * heads, -1), [2 * heads, heads], dim=1
        )
        if has_kernels(joint_NE) and not torch.is_grad_enabled():
            sizes = turn_kernels.Heads(heads, heads, qk_NHD.shape[-1])
            turn_kernels.turn_heads(joint_NE, sizes, rotation.cos_T1D, rotation.sin_T1D)
        else:
            qk_NHD = rotate(qk_NHD, rotation)
        q_NHD, k_NHD = qk_NHD.chunk(2, dim=1)
        o_NHD = attend(q_NHD, k_NHD, v_NHD, segments, causal=False)
        return only(self.proj(o_NHD.flatten(1)))


class VisionBlock(nn.Module):
    """Attention within a segment, then the MLP, each on the norm of what it is added to."""

    def __init__(
        self, geometry: VisionGeometry, norm: Callable[[int], nn.Module], mlp: FeedForward
    ) -> None:
        super().__init__()
        self.norm1 = norm(geometry.width)
        self.norm2 = norm(geometry.width)
        self.attn = VisionAttention(geometry.width, geometry.heads)
        self.mlp = mlp

    def forward(
        self, x_ND: Tensor, y_ND: Tensor | None, rotation: Rotation, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """The stream [N, width] and what the block before still has to add to it, to the same of
        this block: a sum and the norm of it are one step."""
        x_ND, n_ND = added_norm(x_ND, y_ND, self.norm1, self.attn.qkv)
        o_ND = self.attn(n_ND, rotation, segments)
        x_ND, n_ND = added_norm(x_ND, o_ND, self.norm2, self.mlp.first)
        return x_ND, self.mlp(n_ND)


class PatchMerger(nn.Module):
    """merge x merge neighbouring patches to one feature of the language model's width."""

    def __init__(self, geometry: VisionGeometry, norm: nn.Module) -> None:
        super().__init__()
        self.ln_q = norm
        self.merged_width = geometry.width * geometry.merge**2
        self.mlp = nn.ModuleDict(
            {
                "0": GroupedLinear(self.merged_width, {"0": self.merged_width}, bias=True),
                "2": GroupedLinear(self.merged_width, {"2": geometry.out_width}, bias=True),
            }
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, width], patches of a square next to each other, to [M, out_width]."""
        hidden = only(self.mlp["0"](self.ln_q(x_ND).view(-1, self.merged_width)))
        return only(self.mlp["2"](F.gelu(hidden)))
