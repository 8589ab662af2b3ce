"""A decoder layer's way forth and back over a pack, in few kernels: its linear layers learn, or are
frozen and carry low-rank adapters or none.

What layers compute is what `model.language` says; this is how a card does it with each wide tensor
read once. Kept for the way back are the layer's input, its joint products, attention's output and
the adapters' narrow numbers: norms, the gated product and all masks of drop-outs are made again.

Shapes: T rows, D width, E columns of the joint product of queries, keys and values, F inner width,
S ranks of a group, R ranks of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.attention import has_varlen
from finesight.model.frozen import KERNELS, FrozenWeight
from finesight.model.linear import GroupedLinear, joint_product, joint_product_back
from finesight.model.lora import LoraGroup
from finesight.model.rope import Rotation

if KERNELS:
    from finesight.model import gate_kernels, lora_kernels, norm_kernels, turn_kernels
    from finesight.model.gate_kernels import Ups
    from finesight.model.lora_kernels import Drop
    from finesight.model.turn_kernels import Heads, HeadUps

MOST_RANKS = 128
"""Of an adapter that the kernels' sums have room for."""


def fits(group: GroupedLinear) -> bool:
    """Whether the group's adapter is one that kernels take: none, or one of all its layers with one
    rank and scale."""
    if group.adapter is None:
        return True
    if not isinstance(group.adapter, LoraGroup):
        return False
    layers = group.adapter.layers
    low = next(iter(layers.values()))
    alike = all(other == low for other in layers.values())
    return alike and len(layers) == len(group.outputs) and low.rank <= MOST_RANKS


def takes(x_TD: Tensor) -> bool:
    """Whether kernels are there for these numbers."""
    return KERNELS and len(x_TD) > 0 and has_varlen(x_TD.unsqueeze(0))


class Wide(NamedTuple):
    """The wide part of a group of linear layers, and whether it learns."""

    weight: Tensor | FrozenWeight
    bias: Tensor | None

    @classmethod
    def of(cls, group: GroupedLinear) -> Wide:
        """That of this group."""
        return cls(group.weight, group.bias)

    @property
    def learns(self) -> bool:
        """Whether its weight does."""
        return isinstance(self.weight, Tensor) and self.weight.requires_grad

    @property
    def inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as autograd has to see them: where they learn."""
        weight = self.weight if isinstance(self.weight, Tensor) and self.learns else None
        return weight, self.bias if self.bias is not None and self.bias.requires_grad else None

    def forth(self, x_TI: Tensor) -> Tensor:
        """x W^T + bias of all layers side by side."""
        return joint_product(x_TI, self.weight, self.bias)

    def back(self, dy_TO: Tensor) -> Tensor:
        """dy W."""
        return joint_product_back(dy_TO, self.weight)

    def gradients(self, dy_TO: Tensor, x_TI: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Those of `inputs`: dy^T x, and the sum of dy."""
        weight, bias = self.inputs
        assert weight is None or x_TI is not None, "a weight learns of an input that is not kept"
        dw_OI = None if weight is None or x_TI is None else dy_TO.T @ x_TI
        return dw_OI, None if bias is None else dy_TO.sum(0)


def _narrow(group: GroupedLinear) -> tuple[Tensor | None, ...]:
    """A and each B of the group's adapter, or as many times nothing."""
    if not isinstance(group.adapter, LoraGroup):
        return (None,) * (1 + len(group.outputs))
    return group.adapter.a, *group.adapter.b.values()


def _drop(group: GroupedLinear, seed_1: Tensor | None, salt: int) -> Drop:
    """What the group's adapter does to its input this time."""
    adapter = group.adapter
    if not isinstance(adapter, LoraGroup):
        return Drop(None, salt, 0.0, 1.0)
    share = adapter.dropout if adapter.training else 0.0
    assert share == 0.0 or seed_1 is not None, "drop-out without a seed"
    scale = next(iter(adapter.layers.values())).scale
    return Drop(seed_1, salt, share, scale / (1.0 - share))


@dataclass(frozen=True, slots=True)
class _Entry:
    """What does not change of the way into attention."""

    wide: Wide
    eps: float
    drop: Drop
    heads: Heads
    rotation: Rotation


class Pass(NamedTuple):
    """A layer's share of a pass over a pack: its number, and the pass's seed of drop-outs."""

    layer: int
    seed_1: Tensor | None

    def drop(self, group: GroupedLinear, place: int) -> Drop:
        """What the adapter of the layer's group number `place` does to its input."""
        return _drop(group, self.seed_1, 4 * self.layer + place)


def enter(
    x_TD: Tensor,
    norm: nn.RMSNorm,
    qkv: GroupedLinear,
    head_width: int,
    rotation: Rotation,
    at: Pass,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input itself, to be added to later; and queries [T, H, D], keys and values [T, K, D] of
    its norm, turned."""
    queries, keys, _ = (width // head_width for width in qkv.outputs.values())
    heads = Heads(queries, keys, head_width)
    entry = _Entry(Wide.of(qkv), _eps(norm), at.drop(qkv, 0), heads, rotation)
    passed: tuple[Tensor, Tensor, Tensor, Tensor] = _Enter.apply(  # type: ignore[no-untyped-call]
        x_TD, norm.weight, entry, *entry.wide.inputs, *_narrow(qkv)
    )
    return passed


def _eps(norm: nn.RMSNorm) -> float:
    assert norm.eps is not None, "a norm without eps"
    return norm.eps


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_D: Tensor,
        entry: _Entry,
        _weight: Tensor | None,
        _bias: Tensor | None,
        a_SD: Tensor | None,
        *bs_OR: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n_TD, scale_T = norm_kernels.rms_normed(x_TD, w_D, entry.eps)
        low_TS = None if a_SD is None else lora_kernels.lowered(n_TD, a_SD, entry.drop)
        joint_TE = entry.wide.forth(n_TD)
        ups = _head_ups(low_TS, bs_OR)
        rotation, heads = entry.rotation, entry.heads
        turn_kernels.turn_heads(joint_TE, heads, ups, rotation.cos_T1D, rotation.sin_T1D)
        kept_TD = n_TD if entry.wide.learns else None
        ctx.save_for_backward(x_TD, w_D, scale_T, kept_TD, low_TS, a_SD, *bs_OR)
        ctx.entry = entry
        all_TND = joint_TE.view(len(x_TD), -1, heads.width)
        return x_TD, *torch.split(all_TND, [heads.queries, heads.keys, heads.keys], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, added_TD: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_D, scale_T, n_TD, low_TS, a_SD, *bs_OR = ctx.saved_tensors
        entry: _Entry = ctx.entry
        djoint_TE = turn_kernels.turn_heads_back(
            (grads[0], grads[1], grads[2]),
            entry.heads,
            entry.rotation.cos_T1D,
            entry.rotation.sin_T1D,
        )
        dlow_TS, da_SD = None, None
        dbs_OR: list[Tensor | None] = [None] * len(bs_OR)
        if low_TS is not None:
            dlow_TS = torch.empty_like(low_TS)
            sides = torch.split(djoint_TE, [len(b_OR) for b_OR in bs_OR], 1)
            narrow = zip(sides, bs_OR, dlow_TS.chunk(3, 1), low_TS.chunk(3, 1), strict=True)
            for i, (dy_TO, b_OR, dlow_TR, low_TR) in enumerate(narrow):
                torch.mm(dy_TO, b_OR, out=dlow_TR)
                dbs_OR[i] = dy_TO.T @ low_TR
            da_SD = lora_kernels.down_grad(x_TD, dlow_TS, entry.drop, (w_D, scale_T))
        wide = entry.wide.gradients(djoint_TE, n_TD)
        dx_TD, dw_D = None, None
        if any(ctx.needs_input_grad[:2]):
            dn_TD = entry.wide.back(djoint_TE)
            if dlow_TS is not None:
                lora_kernels.lowered_back(dn_TD, dlow_TS, a_SD, entry.drop)
            learned = ctx.needs_input_grad[1]
            norm = x_TD, w_D, scale_T
            dx_TD, dw_D = norm_kernels.rms_back(*norm, dn_TD, added_TD, learned=learned)
        return dx_TD, dw_D, None, *wide, da_SD, *dbs_OR


def _head_ups(low_TS: Tensor | None, bs_OR: tuple[Tensor | None, ...]) -> HeadUps | None:
    q, k, v = bs_OR
    if low_TS is None or q is None or k is None or v is None:
        return None
    return HeadUps(low_TS, q, k, v)


@dataclass(frozen=True, slots=True)
class _Exit:
    """What does not change of the way from attention to the layer's end."""

    out: Wide
    out_drop: Drop
    both: Wide
    both_drop: Drop
    down: Wide
    down_drop: Drop
    eps: float


def leave(
    x_TD: Tensor,
    o_TI: Tensor,
    out: GroupedLinear,
    norm: nn.RMSNorm,
    both: GroupedLinear,
    down: GroupedLinear,
    at: Pass,
) -> Tensor:
    """x + out(o), and to that added the gated MLP of its norm."""
    fixed = _Exit(
        Wide.of(out),
        at.drop(out, 1),
        Wide.of(both),
        at.drop(both, 2),
        Wide.of(down),
        at.drop(down, 3),
        _eps(norm),
    )
    y_TD: Tensor = _Leave.apply(  # type: ignore[no-untyped-call]
        *(x_TD, o_TI, norm.weight, fixed),
        *(*fixed.out.inputs, *fixed.both.inputs, *fixed.down.inputs),
        *(*_narrow(out), *_narrow(both), *_narrow(down)),
    )
    return y_TD


def _added(
    x_TD: Tensor, wide: Wide, h_TI: Tensor, low_TR: Tensor | None, b_DR: Tensor | None
) -> Tensor:
    """x plus the product of `h` and what its adapter adds."""
    y_TD = wide.forth(h_TI)
    if low_TR is None or b_DR is None:
        return y_TD.add_(x_TD)
    return lora_kernels.added(x_TD, y_TD, low_TR, b_DR)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        o_TI: Tensor,
        w_D: Tensor,
        fixed: _Exit,
        *learned: Tensor | None,
    ) -> Tensor:
        out_a, out_b, both_a, gate_b, up_b, down_a, down_b = learned[6:]
        low_o = None if out_a is None else lora_kernels.lowered(o_TI, out_a, fixed.out_drop)
        x_TD = _added(x_TD, fixed.out, o_TI, low_o, out_b)
        n_TD, scale_T = norm_kernels.rms_normed(x_TD, w_D, fixed.eps)
        low_g = None if both_a is None else lora_kernels.lowered(n_TD, both_a, fixed.both_drop)
        both_TF2 = fixed.both.forth(n_TD)
        ups = _ups(low_g, gate_b, up_b)
        h_TF, low_d = gate_kernels.gated_low(both_TF2, ups, down_a, fixed.down_drop)
        y_TD = _added(x_TD, fixed.down, h_TF, low_d, down_b)
        kept_TD = n_TD if fixed.both.learns else None
        ctx.save_for_backward(
            *(x_TD, o_TI, w_D, scale_T, kept_TD, low_o, low_g, both_TF2, low_d),
            *(out_a, out_b, both_a, gate_b, up_b, down_a, down_b),
        )
        ctx.fixed, ctx.gone = fixed, False
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, o_TI, w_D, scale_T, n_TD, low_o, low_g, both_TF2, low_d, *narrow = ctx.saved_tensors
        out_a, out_b, both_a, gate_b, up_b, down_a, down_b = narrow
        fixed: _Exit = ctx.fixed
        # What the forward pass kept is overwritten here.
        assert not ctx.gone, "a second way back"
        ctx.gone = True
        dy_TD = dy_TD.contiguous()
        dlow_d, ddown_b = _through(dy_TD, low_d, down_b)
        dh_TF, ups = fixed.down.back(dy_TD), _ups(low_g, gate_b, up_b)
        gated = both_TF2, ups, down_a, dh_TF, dlow_d, fixed.down_drop
        dboth = gate_kernels.gated_low_back(*gated, again=fixed.down.learns)
        down = fixed.down.gradients(dy_TD, dboth.h_TF)
        both = fixed.both.gradients(dboth.both_TF2, n_TD)
        dn_TD = fixed.both.back(dboth.both_TF2)
        dboth_a = None
        if dboth.low_TS is not None:
            norm = w_D, scale_T
            dboth_a = lora_kernels.down_grad(x_TD, dboth.low_TS, fixed.both_drop, norm)
            lora_kernels.lowered_back(dn_TD, dboth.low_TS, both_a, fixed.both_drop)
        learned = ctx.needs_input_grad[2]
        dx_TD, dw_D = norm_kernels.rms_back(x_TD, w_D, scale_T, dn_TD, dy_TD, learned=learned)
        out = fixed.out.gradients(dx_TD, o_TI)
        do_TI = fixed.out.back(dx_TD)
        dlow_o, dout_b = _through(dx_TD, low_o, out_b)
        dout_a = None
        if dlow_o is not None:
            dout_a = lora_kernels.down_grad(o_TI, dlow_o, fixed.out_drop)
            do_TI = lora_kernels.lowered_back(do_TI, dlow_o, out_a, fixed.out_drop)
        narrow_grads = dout_a, dout_b, dboth_a, dboth.gate_FR, dboth.up_FR, dboth.a_RF, ddown_b
        return dx_TD, do_TI, dw_D, None, *out, *both, *down, *narrow_grads


def _ups(low_TS: Tensor | None, gate: Tensor | None, up: Tensor | None) -> Ups | None:
    return None if low_TS is None or gate is None or up is None else Ups(low_TS, gate, up)


def _through(
    dy_TO: Tensor, low_TR: Tensor | None, b_OR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by `low` and by B of low B^T."""
    if low_TR is None or b_OR is None:
        return None, None
    return dy_TO @ b_OR, dy_TO.T @ low_TR
