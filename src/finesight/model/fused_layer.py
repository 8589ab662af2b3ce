"""A decoder layer's way forth and back over a pack, in few kernels: its linear layers learn, or are
frozen and carry low-rank adapters or none.

What layers compute is what `model.language` says; this is how a card does it with each wide tensor
read once. Kept for the way back are the layer's input, its joint products, attention's output and
the adapters' narrow numbers: norms, the gated product and all masks of drop-outs are made again.

Shapes: T rows, D width, E columns of the joint product of queries, keys and values, F inner width,
S ranks of a group, R ranks of a layer, J columns of an input and of what is joined to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.attention import has_varlen
from finesight.model.fp8 import Rows, room_for
from finesight.model.frozen import KERNELS
from finesight.model.joined import Joined
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup
from finesight.model.rope import Rotation
from finesight.model.wide import Wide, joined_of

if KERNELS:
    from finesight.model.kernels import gate as gate_kernels
    from finesight.model.kernels import lora as lora_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels import turn as turn_kernels
    from finesight.model.kernels.drop import Drop
    from finesight.model.kernels.lora import Norm
    from finesight.model.kernels.turn import Heads

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


def joined_groups(groups: Iterable[GroupedLinear]) -> list[Joined]:
    """Where these groups' weights and up-projections lie side by side, made where it is not yet."""
    return [made for made in map(joined_of, groups) if made is not None]


def takes(x_TD: Tensor) -> bool:
    """Whether kernels are there for these numbers."""
    return KERNELS and len(x_TD) > 0 and has_varlen(x_TD.unsqueeze(0))


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
        *_bs_OR: Tensor | None,
    ) -> tuple[Tensor, ...]:
        n_TJ, scale_T, low_TS = _normed(x_TD, w_D, entry.eps, entry.wide, a_SD, entry.drop)
        joint_TE = entry.wide.forth(n_TJ, low_TS)
        heads, rotation = entry.heads, entry.rotation
        turn_kernels.turn_heads(joint_TE, heads, rotation.cos_T1D, rotation.sin_T1D)
        kept_TD = n_TJ if entry.wide.learns else None
        ctx.save_for_backward(x_TD, w_D, scale_T, kept_TD, low_TS, a_SD)
        ctx.entry = entry
        all_TND = joint_TE.view(len(x_TD), -1, heads.width)
        return x_TD, *torch.split(all_TND, [heads.queries, heads.keys, heads.keys], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, added_TD: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_D, scale_T, n_TD, low_TS, a_SD = ctx.saved_tensors
        entry: _Entry = ctx.entry
        wide, rotation = entry.wide, entry.rotation
        djoint_TE = turn_kernels.turn_heads_back(
            (grads[0], grads[1], grads[2]), entry.heads, rotation.cos_T1D, rotation.sin_T1D
        )
        norm, dx_TD, dw_D, da_SD = Norm(w_D, scale_T), None, None, None
        if any(ctx.needs_input_grad[:2]):
            dn_TD, da_SD = _lowered_back(x_TD, norm, wide.back(djoint_TE), a_SD, entry.drop)
            learned = ctx.needs_input_grad[1]
            dx_TD, dw_D = norm_kernels.rms_back(x_TD, *norm, dn_TD, added_TD, learned=learned)
        else:
            dlow_TS = wide.low_back(djoint_TE)
            if dlow_TS is not None:
                da_SD = lora_kernels.down_grad(x_TD, norm, dlow_TS, a_SD, entry.drop)
        learned = wide.gradients(djoint_TE, n_TD)
        dbs_OR = wide.up_grads(djoint_TE, low_TS)
        return dx_TD, dw_D, None, *learned, da_SD, *dbs_OR


def _normed(
    x_TD: Tensor, w_D: Tensor, eps: float, wide: Wide, a_SD: Tensor | None, drop: Drop
) -> tuple[Tensor | Rows, Tensor, Tensor | None]:
    """The norm of `x` with room behind it, or in FP8 where the layers take it so, each row's scale,
    and what the adapter makes of the norm, which stands behind it, too, where there is room."""
    if wide.takes_rows:
        coded = room_for(x_TD)
        d_TD, scale_T = norm_kernels.rms_normed(x_TD, w_D, eps, None, drop, coded)
        return coded, scale_T, None if a_SD is None else _lowered(d_TD, a_SD, drop, None)
    n_TJ = x_TD.new_empty(len(x_TD), x_TD.shape[1] + wide.room)
    n_TD = n_TJ[:, : x_TD.shape[1]]
    d_TD, scale_T = norm_kernels.rms_normed(x_TD, w_D, eps, n_TD, drop)
    return n_TJ, scale_T, None if a_SD is None else _lowered(d_TD, a_SD, drop, n_TJ)


def _lowered(d_TI: Tensor, a_SI: Tensor, drop: Drop, into_TJ: Tensor | None) -> Tensor:
    """What an adapter makes of its dropped input, which stands behind the first I columns of
    `into_TJ`, too, where there is room."""
    low_TS = d_TI.new_empty(len(d_TI), len(a_SI))
    torch.addmm(low_TS, d_TI, a_SI.T, beta=0, alpha=drop.times, out=low_TS)
    if into_TJ is not None and into_TJ.shape[1] > a_SI.shape[1]:
        room = into_TJ[:, a_SI.shape[1] :]
        room[:, : low_TS.shape[1]].copy_(low_TS)
        room[:, low_TS.shape[1] :].zero_()
    return low_TS


def _lowered_back(
    x_TI: Tensor,
    norm: Norm | None,
    came: tuple[Tensor, Tensor | None],
    a_SI: Tensor | None,
    drop: Drop,
) -> tuple[Tensor, Tensor | None]:
    """What came back through a product, with what comes to it through the adapter; and the gradient
    by A. Both of what came may be views of one tensor: held by nobody else, it is gone then."""
    dn_TI, dlow_TS = came
    if dlow_TS is None or a_SI is None:
        return dn_TI, None
    return lora_kernels.lowered_back(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)


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
        out_a, _, both_a, _, _, down_a, _ = learned[6:]
        out, both, down = fixed.out, fixed.both, fixed.down
        o_TJ, low_o = o_TI, None
        if out_a is not None:
            o_TJ, low_o = lora_kernels.lowered(o_TI, out_a, fixed.out_drop, out.room)
        x_TD = out.added(x_TD, o_TJ, low_o)
        n_TJ, scale_T, low_g = _normed(x_TD, w_D, fixed.eps, both, both_a, fixed.both_drop)
        both_TF2 = both.forth(n_TJ, low_g)
        h_TJ, low_d = gate_kernels.gated_low(both_TF2, down_a, fixed.down_drop, down.room)
        y_TD = down.added(x_TD, h_TJ, low_d)
        kept_TD = n_TJ if both.learns else None
        ctx.save_for_backward(
            *(x_TD, o_TI, w_D, scale_T, kept_TD, both_TF2),
            *(low_o, low_g, low_d, out_a, both_a, down_a),
        )
        ctx.fixed, ctx.gone = fixed, False
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, o_TI, w_D, scale_T, n_TD, both_TF2, *narrow = ctx.saved_tensors
        low_o, low_g, low_d, out_a, both_a, down_a = narrow
        fixed: _Exit = ctx.fixed
        out, both, down = fixed.out, fixed.both, fixed.down
        # What the forward pass kept is overwritten here.
        assert not ctx.gone, "a second way back"
        ctx.gone = True
        dy_TD = dy_TD.contiguous()
        dh_TF, dlow_d = down.back(dy_TD)
        ddown_b = down.up_grads(dy_TD, low_d)
        _, h_TF, ddown_a = gate_kernels.gated_low_back(
            both_TF2, down_a, dh_TF, dlow_d, fixed.down_drop, again=down.learns
        )
        ddown = down.gradients(dy_TD, h_TF)
        # Views, perhaps, of all that came.
        del dh_TF, dlow_d, h_TF
        dboth, norm = both.gradients(both_TF2, n_TD), Norm(w_D, scale_T)
        dn_TD, dboth_a = _lowered_back(x_TD, norm, both.back(both_TF2), both_a, fixed.both_drop)
        dboth_b = both.up_grads(both_TF2, low_g)
        learned = ctx.needs_input_grad[2]
        dx_TD, dw_D = norm_kernels.rms_back(x_TD, *norm, dn_TD, dy_TD, learned=learned)
        dout = out.gradients(dx_TD, o_TI)
        do_TI, dout_a = _lowered_back(o_TI, None, out.back(dx_TD), out_a, fixed.out_drop)
        dout_b = out.up_grads(dx_TD, low_o)
        narrow = dout_a, *dout_b, dboth_a, *dboth_b, ddown_a, *ddown_b
        return dx_TD, do_TI, dw_D, None, *dout, *dboth, *ddown, *narrow
