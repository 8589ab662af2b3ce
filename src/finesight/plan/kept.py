"""What layers keep for the backward pass, in bytes for each row: what they are made of.

This, `plan.mlp` and `plan.layer` are the places that know it, but for layers in few kernels
(`plan.fused_layer`). Whoever makes a layer keep other tensors changes its function there;
tests/plan/test_kept.py counts what autograd really saves.

A gradient `reaches` a layer where something before it learns. Rows are tokens or patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from finesight.model.attention import SHORT
from finesight.model.fp8 import Fp8Weight
from finesight.model.layers import RmsNorm
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup
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

    def mask(self, dropout: float) -> float:
        """Bytes for each number of which such a share is dropped out: on a CPU the places of those
        that are gone (`model.fused.drop`)."""
        return 1 if self.cuda else INDEX * dropout


def learns(module: nn.Module) -> bool:
    """Whether anything in it has a gradient of its own, adapters included."""
    return any(parameter.requires_grad for parameter in module.parameters())


def of_group(group: GroupedLinear, computing: Computing) -> int:
    """Linear layers of one input: the input where they learn, a copy of it with its mask where it
    is dropped out (`model.lora`), and what the down-projections made of it."""
    inputs = group.inputs * computing.number
    if isinstance(group.adapter, LoraGroup):
        ranks = len(group.adapter.a) * computing.number
        dropout = group.adapter.dropout
        mask = group.inputs * computing.mask(dropout) if dropout else 0
        return inputs + round(mask) + ranks
    return inputs if trained(group) else 0


def turned(group: GroupedLinear) -> int:
    """Codes in FP8 laid out the other way, with a scale for each row, which the first way back
    through the group makes and leaves there (`model.fp8`)."""
    if not isinstance(group.weight, Fp8Weight):
        return 0
    return group.weight.numbers + group.inputs * WIDE


def trained(group: GroupedLinear) -> bool:
    """Whether its weight learns."""
    return isinstance(group.weight, nn.Parameter) and group.weight.requires_grad


def shares_input(group: GroupedLinear) -> bool:
    """Whether what a group keeps of its input is the input itself, not a dropped-out copy."""
    if isinstance(group.adapter, LoraGroup):
        return not group.adapter.dropout
    return trained(group)


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


class Place(NamedTuple):
    """Where a layer meets a pack: how many tokens each sequence reads, how many there are, and how
    many `rows` of them go through its MLP. Where sequences go on from the first one, they read more
    than there are."""

    contexts: Sequence[int]
    tokens: int
    rows: int

    @property
    def copies(self) -> int:
        """Tokens that are read, less those that there are."""
        return sum(self.contexts) - self.tokens


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

    def kept(self, place: Place, computing: Computing) -> int:
        """Bytes for a pack (`model.attention`). Without a kernel for it, each sequence has a copy
        of what it goes on from; where sequences are long, of its keys and values."""
        lengths, tokens, number = place.contexts, sum(place.contexts), computing.number
        if is_short(lengths, computing):
            return self._short_at(place).kept
        scales = WIDE * self.heads
        plain = number * (self.made + self.queries) + scales
        if computing.flash:
            copied = tokens * (place.copies > 0) * (max(lengths) > SHORT)
            return place.tokens * plain + copied * 2 * number * self.shared
        if self.queries == self.shared and alike(lengths, CPU).order_T is None:
            return tokens * plain
        # Grouped heads are repeated, or tokens sorted: copies either way.
        return tokens * (number * 4 * self.queries + scales)

    def forth(self, place: Place, computing: Computing) -> int:
        """Bytes on the way forward beside what is kept, queries, keys and values included. Other
        kernels make no scores of all pairs, and take less than an MLP: not counted."""
        if not is_short(place.contexts, computing):
            return self._copies(place, computing)
        short = self._short_at(place)
        return computing.number * self.made * place.tokens + short.forth - short.kept

    def back(self, place: Place, computing: Computing) -> int:
        """Bytes on the way back beside what is kept, the output's gradient included. Other kernels
        on a processor have as many heads of keys as of queries; of a card's nothing is counted."""
        if is_short(place.contexts, computing):
            return self._short_at(place).back
        heads = 0 if computing.cuda else computing.number * 4 * self.queries
        return self._copies(place, computing) + heads * sum(place.contexts)

    def _copies(self, place: Place, computing: Computing) -> int:
        """Of queries, keys and values in which each sequence has what it goes on from, or of their
        gradients."""
        once = computing.flash or not place.copies
        row = computing.number * (self.queries + 2 * self.shared)
        return 0 if once else sum(place.contexts) * row

    def sorting(self, lengths: Sequence[int], computing: Computing) -> int:
        """Bytes of the places that tokens are sorted by, once for all layers."""
        if computing.flash:
            return 0
        if is_short(lengths, computing):
            return self._short(lengths, sum(lengths)).places
        return 0 if alike(lengths, CPU).order_T is None else 2 * INDEX * sum(lengths)

    def _short_at(self, place: Place) -> ShortAttention:
        """The first of sequences that go on from there is looked at among the others."""
        return self._short(place.contexts[place.copies > 0 :], place.tokens)

    def _short(self, lengths: Sequence[int], tokens: int) -> ShortAttention:
        runs = (padded if self.causal else alike)(lengths, CPU)
        return ShortAttention(self.queries, self.shared, self.heads, self.causal, tokens, runs)


def is_short(lengths: Sequence[int], computing: Computing) -> bool:
    """Whether attention over these sequences, with a gradient, is in plain products
    (`model.attention.attend`)."""
    return not computing.cuda and computing.number == 2 and max(lengths) <= LONGEST


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

    def of_pack(self, place: Place) -> int:
        """Bytes for a pack."""
        look = 0 if self.look is None else self.look.kept(place, self.computing)
        return self.beside * place.tokens + look + self.mlp * place.rows + self.copied

    def going_forth(self, place: Place) -> int:
        """Bytes that its attention works with on the way forward, less what is not there yet."""
        if self.look is None:
            return 0
        return self.look.forth(place, self.computing) + self._around(place)

    def going_back(self, place: Place) -> int:
        """Bytes that its MLP or its attention works with on the way back, less what is gone."""
        rows = place.rows
        mlp = max(rows * self.back, 2 * rows * self.entering + self.gradients) - rows * self.freed
        if self.look is None:
            return mlp
        return max(mlp, self.look.back(place, self.computing) + self._around(place))

    def _around(self, place: Place) -> int:
        """Bytes around its attention, less those of what comes after it: on the way forward its
        normed input, on the way back the gradient of what its output was added to."""
        return (self.entering - self.out) * place.tokens - self.mlp * place.rows
