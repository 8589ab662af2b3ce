"""What an MLP keeps for its way back, and what it makes on a way that keeps nothing, in bytes."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from finesight.model.experts import SparseMlp
from finesight.model.fp8 import Fp8Weight
from finesight.model.layers import GatedMlp
from finesight.model.linear import GroupedLinear
from finesight.model.qwen2_vl import Mlp as QuickMlp
from finesight.model.qwen_language import Mlp as QwenMlp
from finesight.plan.kept import INDEX, WIDE, Computing, learns, of_group, trained, turned


class KeptMlp(NamedTuple):
    """Of an MLP: bytes for each row, and as in `Kept`."""

    row: int
    back: int
    freed: int
    stays: int = 0
    copied: int = 0


def of_mlp(mlp: nn.Module, reached: bool, computing: Computing) -> KeptMlp:
    """Both products, and what the activation between them keeps: both factors where it is gated."""
    if isinstance(mlp, SparseMlp):
        return _of_experts(mlp, reached, computing)
    up, down = _products(mlp)
    inside, number = sum(up.outputs.values()), computing.number
    after = reached or learns(up)
    activation = inside * number if after else 0
    last = of_group(down, computing)
    back = _back(inside, inside > down.inputs) * number
    stays = (turned(up) if reached else 0) + (turned(down) if after else 0)
    room, copied = _padded(mlp, computing), 0
    if room:
        # What is kept of both factors becomes their gradients.
        back = down.inputs * number + room
        outputs = sum(down.outputs.values())
        if trained(down):
            last += room
            copied = outputs * back * after
        else:
            stays += outputs * room
    return KeptMlp(of_group(up, computing) + activation + last, back, last, stays, copied)


def _padded(mlp: nn.Module, computing: Computing) -> int:
    """Bytes behind a row of the last product's input (`model.layers.GatedMlp`)."""
    if not (isinstance(mlp, GatedMlp) and computing.kernels):
        return 0
    return mlp.padded * computing.number


def widest(mlp: nn.Module) -> int:
    """Numbers of a row of an MLP's first product."""
    up, _ = _products(mlp)
    return sum(up.outputs.values())


def passing(mlp: nn.Module, width: int, computing: Computing) -> int:
    """The most bytes of a row that an MLP without a gradient makes of one of `width` numbers: both
    ends of its activation, of which a gated one's factors are there until the end. Where a kernel
    makes a product and its activation at once (`model.epilogue`), it is less."""
    up, down = _products(mlp)
    number, inside = computing.number, sum(up.outputs.values()) * computing.number
    codes, last = _coded(down), width * number
    activated = down.inputs * number + _padded(mlp, computing)
    if isinstance(mlp, QuickMlp):
        # It gives codes itself.
        return (codes or activated) + max(inside, last)
    if inside > down.inputs * number:
        return inside + activated + codes + last
    return activated + max(inside, codes + last)


def entering(mlp: nn.Module, computing: Computing) -> int:
    """Bytes of a row of the norm before an MLP without a gradient."""
    up, _ = _products(mlp)
    return _coded(up) or up.inputs * computing.number


def _coded(group: GroupedLinear) -> int:
    """Bytes of a row that goes into a product in FP8; of others none."""
    return group.inputs + WIDE if isinstance(group.weight, Fp8Weight) else 0


def _back(inside: int, gated: bool) -> int:
    """Numbers of a row while an activation goes back: where it is gated, its gradient and those of
    both factors; else, without a kernel for it (`model.fused`), steps in between."""
    return inside // 2 * 3 if gated else inside * 5


def _products(mlp: nn.Module) -> tuple[GroupedLinear, GroupedLinear]:
    if isinstance(mlp, GatedMlp):
        return mlp.gate_up_proj, mlp.down_proj
    if isinstance(mlp, QwenMlp):
        return mlp.w2_w1, mlp.c_proj
    up, down = (m for m in mlp.children() if isinstance(m, GroupedLinear))
    return up, down


def _of_experts(mlp: SparseMlp, reached: bool, computing: Computing) -> KeptMlp:
    """Of each chosen expert: its input, both factors and their product, its output and its share;
    of the router its shares in fp32, and places."""
    if not (reached or learns(mlp)):
        return KeptMlp(0, 0, 0)
    width, number = mlp.gate.in_features, computing.number
    inner = mlp.experts.down_proj.shape[1]
    full = learns(mlp.experts)
    pairs = 2 * inner * number + width * number + (width + inner) * number * full
    shares = WIDE * (mlp.gate.out_features + mlp.chosen + 1) + mlp.chosen * number
    places = 3 * INDEX * mlp.chosen
    router = width * number if learns(mlp.gate) else 0
    inside = 2 * mlp.chosen * inner
    back = _back(inside, gated=True) * number
    return KeptMlp(mlp.chosen * pairs + shares + places + router, back, 0)
