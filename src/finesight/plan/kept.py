"""What layers keep for the backward pass, in bytes for each row: one function a kind of layer.

This is the one place that knows it, but for layers in few kernels (`plan.fused_layer`). Whoever
makes a layer keep other tensors changes its function here; tests/plan/test_kept.py counts what
autograd really saves.

A gradient `reaches` a layer where something before it learns. Rows are tokens or patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from finesight.model.experts import SparseMlp
from finesight.model.fp8 import Fp8Weight
from finesight.model.language import DecoderLayer, SelfAttention
from finesight.model.layers import GatedMlp, RmsNorm, VisionBlock
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup
from finesight.model.qwen2_vl import Mlp as QuickMlp
from finesight.model.qwen_language import Mlp as QwenMlp
from finesight.model.qwen_language import QwenLayer
from finesight.model.qwen_vl import Block
from finesight.model.runs import alike, padded
from finesight.model.short_attention import LONGEST
from finesight.plan.short_attention import ShortAttention

WIDE = 4
"""Bytes of a number in fp32: what norms, softmax and rotary angles keep."""

INDEX = 8
"""Bytes of a place in a pack."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Computing:
    """What decides which tensors a layer keeps: the device, the bytes of a number, and whether
    sequences of any lengths go through one kernel (`model.attention.has_varlen`)."""

    cuda: bool
    number: int
    flash: bool

    @property
    def fused(self) -> bool:
        """Whether decoder layers go through few kernels (`model.fused_layer.takes`)."""
        return self.cuda and self.flash

    @property
    def kernels(self) -> bool:
        """Whether what is done number by number is in kernels (`model.fused.has_kernels`)."""
        return self.cuda and self.number == 2

    @property
    def mask(self) -> int:
        """Bytes of a number's place in a dropout mask: on a CPU a mask is as wide as its numbers
        (`model.fused.drop`)."""
        return 1 if self.cuda else self.number


def learns(module: nn.Module) -> bool:
    """Whether anything in it has a gradient of its own, adapters included."""
    return any(parameter.requires_grad for parameter in module.parameters())


def of_group(group: GroupedLinear, computing: Computing) -> int:
    """Linear layers of one input: the input where they learn, a copy of it with its mask where it
    is dropped out (`model.lora`), and what the down-projections made of it."""
    inputs = group.inputs * computing.number
    if isinstance(group.adapter, LoraGroup):
        ranks = len(group.adapter.a) * computing.number
        mask = group.inputs * computing.mask if group.adapter.dropout else 0
        return inputs + mask + ranks
    return inputs if _trained(group) else 0


def turned(group: GroupedLinear) -> int:
    """Codes in FP8 laid out the other way, with a scale for each row, which the first way back
    through the group makes and leaves there (`model.fp8`)."""
    if not isinstance(group.weight, Fp8Weight):
        return 0
    return group.weight.numbers + group.inputs * WIDE


def _trained(group: GroupedLinear) -> bool:
    return isinstance(group.weight, nn.Parameter) and group.weight.requires_grad


def shares_input(group: GroupedLinear) -> bool:
    """Whether what a group keeps of its input is the input itself, not a dropped-out copy."""
    if isinstance(group.adapter, LoraGroup):
        return not group.adapter.dropout
    return _trained(group)


def of_norm(norm: nn.Module, width: int, reached: bool, computing: Computing) -> int:
    """Its input, and in fp32 the scale of each row; a LayerNorm its mean too."""
    if not (reached or learns(norm)):
        return 0
    if not isinstance(norm, RmsNorm):
        return width * computing.number + 2 * WIDE
    # Without a kernel for it, torch keeps the input for the input's gradient, and the normed rows
    # for the weight's.
    composed = not computing.cuda and computing.number == WIDE
    copies = int(reached) + int(learns(norm)) if composed else 1
    return width * computing.number * copies + WIDE


@dataclass(frozen=True, slots=True)
class Look:
    """The attention of one layer: so many numbers of a token's queries, keys and values, of `heads`
    heads. `made` numbers of them are in memory of their own where nothing is copied: a joint
    product is kept whole for the sake of its values, beside what was rotated."""

    queries: int
    shared: int
    heads: int
    made: int
    causal: bool

    def kept(self, lengths: Sequence[int], computing: Computing) -> int:
        """Bytes for a pack of these sequences (`model.attention.attend`)."""
        tokens, number = sum(lengths), computing.number
        if is_short(lengths, computing):
            return self._short(lengths).kept
        scales = WIDE * self.heads * tokens
        if computing.flash:
            return number * tokens * (self.made + self.queries) + scales
        if self.queries == self.shared and alike(lengths, CPU).order_T is None:
            return number * tokens * (self.made + self.queries) + scales
        # Grouped heads are repeated, or tokens sorted: copies either way.
        return number * tokens * 4 * self.queries + scales

    def forth(self, lengths: Sequence[int], computing: Computing) -> int:
        """Bytes on the way forward beside what is kept, queries, keys and values included. Other
        kernels make no scores of all pairs, and take less than an MLP: not counted."""
        if not is_short(lengths, computing):
            return 0
        short = self._short(lengths)
        return computing.number * self.made * short.tokens + short.forth - short.kept

    def back(self, lengths: Sequence[int], computing: Computing) -> int:
        """Bytes on the way back beside what is kept, the output's gradient included; of other
        kernels not counted either."""
        return self._short(lengths).back if is_short(lengths, computing) else 0

    def _short(self, lengths: Sequence[int]) -> ShortAttention:
        runs = (padded if self.causal else alike)(lengths, CPU)
        return ShortAttention(
            self.queries, self.shared, self.heads, self.causal, sum(lengths), runs
        )


def is_short(lengths: Sequence[int], computing: Computing) -> bool:
    """Whether attention over these sequences is in plain products (`model.attention.attend`)."""
    return not computing.cuda and computing.number == 2 and max(lengths) <= LONGEST


def sorting(lengths: Sequence[int], computing: Computing) -> int:
    """Bytes of the places that tokens are sorted by, once for all layers."""
    if computing.flash:
        return 0
    if is_short(lengths, computing) or alike(lengths, CPU).order_T is None:
        return 0
    return 2 * INDEX * sum(lengths)


@dataclass(frozen=True, slots=True)
class Kept:
    """Of one layer: bytes for each row of its attention's side (`beside`), those of the product
    after the attention among them (`out`), for each row of its `mlp`, and how it looks (None where
    no gradient comes through).

    `entering` is what a row of its input takes, and `has_input` says whether that is among what it
    keeps. On the way back, in the MLP, `freed` of each row is gone when its activation takes
    `back`, and when `gradients` of weights wait to be summed up.
    `leaves`: its output has a gradient. `stays` is there from the first pack on beside the weights,
    and `copied` is of weights, kept with whatever pack.
    """

    computing: Computing
    beside: int
    out: int
    look: Look | None
    mlp: int
    entering: int
    has_input: bool
    back: int
    freed: int
    gradients: int
    leaves: bool
    stays: int
    copied: int

    @property
    def looks(self) -> bool:
        """Whether it holds what its attention needs."""
        return self.look is not None

    def of_pack(self, lengths: Sequence[int], rows: int) -> int:
        """Bytes for a pack of these sequences, of which `rows` go through the MLP."""
        look = 0 if self.look is None else self.look.kept(lengths, self.computing)
        return self.beside * sum(lengths) + look + self.mlp * rows + self.copied

    def going_forth(self, lengths: Sequence[int], rows: int) -> int:
        """Bytes that its attention works with on the way forward, less what is not there yet."""
        if self.look is None:
            return 0
        return self.look.forth(lengths, self.computing) + self._around(lengths, rows)

    def going_back(self, lengths: Sequence[int], rows: int) -> int:
        """Bytes that its MLP or its attention works with on the way back, less what is gone."""
        mlp = max(rows * self.back, 2 * rows * self.entering + self.gradients) - rows * self.freed
        if self.look is None:
            return mlp
        return max(mlp, self.look.back(lengths, self.computing) + self._around(lengths, rows))

    def _around(self, lengths: Sequence[int], rows: int) -> int:
        """Bytes around its attention, less those of what comes after it: on the way forward its
        normed input, on the way back the gradient of what its output was added to."""
        return (self.entering - self.out) * sum(lengths) - self.mlp * rows


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
        if _trained(down):
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
    ends of its activation, of which a gated one's factors are there until the end, as is what a
    quick GELU is made of."""
    up, down = _products(mlp)
    number, inside = computing.number, sum(up.outputs.values()) * computing.number
    codes, last = _coded(down), width * number
    activated = down.inputs * number + _padded(mlp, computing)
    if isinstance(mlp, QuickMlp):
        # It gives codes itself.
        return inside + (codes or activated) + last
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


def of_layer(layer: nn.Module, reached: bool, computing: Computing) -> Kept:
    """A layer of the decoder or of a tower that computes one step after the other."""
    if isinstance(layer, DecoderLayer):
        attention = layer.self_attn
        return _of_block(
            (layer.input_layernorm, layer.post_attention_layernorm),
            (attention.qkv_proj, attention.o_proj),
            layer.mlp,
            look_of(attention),
            reached,
            computing,
            _of_head_norms(attention, computing),
        )
    if isinstance(layer, QwenLayer):
        attn = layer.attn
        heads = attn.c_attn.inputs // attn.head_width
        return _of_block(
            (layer.ln_1, layer.ln_2),
            (attn.c_attn, attn.c_proj),
            layer.mlp,
            Look(attn.c_attn.inputs, attn.c_attn.inputs, heads, 5 * attn.c_attn.inputs, True),
            reached,
            computing,
        )
    if isinstance(layer, VisionBlock):
        width, inner = layer.attn.qkv.inputs, layer.attn
        return _of_block(
            (layer.norm1, layer.norm2),
            (inner.qkv, inner.proj),
            layer.mlp,
            Look(width, width, inner.heads, 5 * width, False),
            reached,
            computing,
        )
    assert isinstance(layer, Block), f"what a {type(layer).__name__} keeps is not known"
    width = layer.attn.in_proj.inputs
    return _of_block(
        (layer.ln_1, layer.ln_2),
        (layer.attn.in_proj, layer.attn.out_proj),
        layer.mlp,
        Look(width, width, layer.attn.heads, 3 * width, False),
        reached,
        computing,
    )


def look_of(attention: SelfAttention) -> Look:
    """Queries and keys are rotated into memory of their own, values are a product's."""
    queries, shared, _ = attention.qkv_proj.outputs.values()
    heads = queries // attention.head_width
    return Look(queries, shared, heads, queries + 2 * shared, True)


def _of_head_norms(attention: SelfAttention, computing: Computing) -> int:
    """Queries and keys before the norm of their heads, and each head's scale."""
    if attention.q_norm is None:
        return 0
    queries, shared, _ = attention.qkv_proj.outputs.values()
    width = attention.head_width
    heads = (queries + shared) // width
    return heads * of_norm(attention.q_norm, width, True, computing)


def _of_block(
    norms: tuple[nn.Module, nn.Module],
    products: tuple[GroupedLinear, GroupedLinear],
    mlp: nn.Module,
    look: Look,
    reached: bool,
    computing: Computing,
    normed: int = 0,
) -> Kept:
    """Attention between two products, then an MLP, each behind a norm; `normed` bytes are kept
    between the first product and the attention."""
    into, out = products
    width, number = into.inputs, computing.number
    beside = of_norm(norms[0], width, reached, computing) + of_group(into, computing)
    seen = reached or learns(norms[0]) or learns(into)
    if seen:
        beside += normed
    last = of_group(out, computing)
    if seen and computing.flash and shares_input(out):
        # What attention keeps of its output is what comes to the product.
        last -= out.inputs * number
    after = seen or learns(out)
    inside = of_mlp(mlp, after or learns(norms[1]), computing)
    entered = reached or learns(norms[0])
    return Kept(
        computing=computing,
        beside=beside + last,
        out=last,
        look=look if seen else None,
        mlp=of_norm(norms[1], width, after, computing) + inside.row,
        entering=width * number,
        has_input=entered,
        back=2 * width * number + inside.back,
        freed=inside.freed,
        gradients=2 * number * max(p.numel() * p.requires_grad for p in mlp.parameters()),
        leaves=after or learns(norms[1]) or learns(mlp),
        stays=turned(into) * entered + turned(out) * seen + inside.stays,
        copied=inside.copied,
    )
