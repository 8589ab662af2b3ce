"""What a decoder layer in few kernels (`model.fused_layer`) keeps for its way back, and what it has
in memory at its fullest moments, in bytes.

This is the one place that knows it. Whoever makes such a layer hold other tensors changes its
functions here; tests/plan/test_fused_layer.py counts what it really allocates. A gradient `reaches`
a layer where something before it learns. T are the tokens of a pack, L those of the second half.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from finesight.model.attention import SHORT
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import FrozenWeight
from finesight.model.joined import room
from finesight.model.kernels.sizes import (
    AT_ONCE,
    GATE,
    GATE_BACK,
    LOWERED_BACK,
    PROGRAMS,
    SUMS,
    Blocks,
    columns_of_chunk,
    rows_of_chunk,
)
from finesight.model.language import DecoderLayer
from finesight.model.layers import GatedMlp
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup
from finesight.plan.kept import WIDE, Computing, Place, learns, turned

FLASH_TILE, FLASH_HEAD = 128, 32
"""Queries of a tile on the way back of torch's attention of any lengths, which adds as many rows
for each segment; and of what a head's numbers are filled up to a multiple there."""


@dataclass(frozen=True, slots=True)
class Product:
    """A group of linear layers, in bytes: of a `number`, of a row of its `inputs`, of the `room`
    behind it, of its `outputs`, and of what the down-projections of its adapter make of it (`low`).

    `dense` is its weight made of few bits, for a moment, and `layered` its layers' matrices beside
    it, if they are several; `codes` are those of a row that goes into a product in FP8, forth and
    back. Gradients are those of weight and bias, of up-projections and of down-projections. `stays`
    is there from the first pack on beside the weight.
    """

    number: int
    inputs: int
    room: int
    outputs: int
    low: int
    drops: bool
    dense: int
    layered: int
    codes: tuple[int, int]
    weights: int
    ups: int
    downs: int
    stays: int

    @classmethod
    def of(cls, group: GroupedLinear, number: int, wanted: bool) -> Product:
        """That of this group in numbers of so many bytes; `wanted`: the gradient by its input."""
        adapted = group.adapter if isinstance(group.adapter, LoraGroup) else None
        ranks, outputs = 0 if adapted is None else len(adapted.a), sum(group.outputs.values())
        joined = adapted is not None and isinstance(group.weight, nn.Parameter)
        beside = room(group.inputs, ranks) * number if joined else 0
        in_fp8 = isinstance(group.weight, Fp8Weight)
        own = [p for p in (group.weight, group.bias) if isinstance(p, nn.Parameter)]
        return cls(
            number=number,
            inputs=group.inputs * number,
            room=beside,
            outputs=outputs * number,
            low=ranks * number,
            drops=adapted is not None and adapted.dropout > 0.0,
            dense=_dense(group, number),
            layered=_dense(group, number) * (len(group.outputs) > 1),
            codes=(group.inputs + WIDE, outputs + WIDE) if in_fp8 else (0, 0),
            weights=sum(p.nbytes for p in own if p.requires_grad),
            ups=0 if adapted is None else sum(b_OR.nbytes for b_OR in adapted.b.values()),
            downs=0 if adapted is None else adapted.a.nbytes,
            stays=outputs * beside + (turned(group) if wanted else 0),
        )

    @property
    def gradients(self) -> int:
        """Of all that learns."""
        return self.weights + self.ups + self.downs

    @property
    def roomy(self) -> int:
        """A row of its input with the room behind it."""
        return self.inputs + self.room

    @property
    def came(self) -> int:
        """A row of the gradients by its input and by what the adapter made of it."""
        return self.inputs + (self.room or self.low)

    @property
    def normed(self) -> int:
        """A row of its input where that is a norm: in FP8, or with the room behind it."""
        return self.codes[0] or self.roomy

    @property
    def lowering(self) -> int:
        """A row of such a norm that is there for the adapter's sake alone: dropped, or beside that
        in FP8."""
        return self.inputs * (self.drops or self.codes[0] > 0)

    def forth(self, rows: int, *, normed: bool = False) -> int:
        """The most while its output is made, that included. An input that is `normed` is in FP8
        already, where it has to be."""
        codes = 0 if normed else self.codes[0]
        return self.dense + max(self.layered, rows * (self.outputs + codes))

    def back(self, rows: int) -> int:
        """The most while `came` is made, that included."""
        # Without room behind the weight, each layer's share comes alone and all are joined then.
        lowered = rows * (self.roomy + 2 * self.low * (not self.room))
        product = self.dense + max(self.layered, rows * (self.roomy + self.codes[1]))
        return max(lowered, product)

    def lowered(self, rows: int) -> int:
        """What comes to `came` when the adapter's share is added in a piece of its own."""
        return rows * self.inputs + self.downs + self.sums(rows) if self.low else 0

    def sums(self, rows: int, tile: Blocks = LOWERED_BACK, programs: int = AT_ONCE) -> int:
        """Of the gradient of its down-projections, a share for each stretch of rows."""
        wide = -(-(self.inputs // self.number) // tile.columns)
        shares = -(-rows // rows_of_chunk(rows, wide, programs))
        return shares * self.downs // self.number * WIDE


def _dense(group: GroupedLinear, number: int) -> int:
    weight = group.weight
    if isinstance(weight, Fp8Weight) or not isinstance(weight, FrozenWeight):
        return 0
    return weight.numbers * number


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """A layer's groups: the way `into` attention and `out` of it, `both` products of the gated MLP
    that are one, and `down`. `heads` of queries have `head` numbers of so many bytes each.

    `reached`: its input has a gradient, or the first norm's weight; `enters`: queries, keys and
    values have one; `leaves`: its output has. `norms` are bytes of each norm's weight that learns.
    """

    into: Product
    out: Product
    both: Product
    down: Product
    heads: int
    head: int
    number: int
    norms: tuple[int, int]
    reached: bool
    enters: bool
    leaves: bool

    @classmethod
    def of(cls, layer: DecoderLayer, reached: bool, computing: Computing) -> FusedLayer:
        """That of one of the layers that `DecoderLayer.fusible` says."""
        attn, mlp, number = layer.self_attn, layer.mlp, computing.number
        assert isinstance(mlp, GatedMlp), f"no gated MLP but a {type(mlp).__name__}"
        norms = layer.input_layernorm, layer.post_attention_layernorm
        reached = reached or learns(norms[0])
        enters = reached or learns(attn.qkv_proj)
        after = enters or learns(attn.o_proj) or learns(norms[1])
        gated = after or learns(mlp.gate_up_proj)
        return cls(
            into=Product.of(attn.qkv_proj, number, reached),
            out=Product.of(attn.o_proj, number, enters),
            both=Product.of(mlp.gate_up_proj, number, after),
            down=Product.of(mlp.down_proj, number, gated),
            heads=attn.o_proj.inputs // attn.head_width,
            head=attn.head_width,
            number=number,
            norms=(_learning(norms[0]), _learning(norms[1])),
            reached=reached,
            enters=enters,
            leaves=gated or learns(mlp.down_proj),
        )

    @property
    def entering(self) -> int:
        """A row of its input."""
        return self.into.inputs

    @property
    def has_input(self) -> bool:
        """Whether its input is among what it keeps."""
        return self.enters

    @property
    def looks(self) -> bool:
        """Whether it holds what its attention needs."""
        return self.enters

    @property
    def stays(self) -> int:
        """What is there from the first pack on beside the weights."""
        return sum(product.stays for product in (self.into, self.out, self.both, self.down))

    def of_pack(self, place: Place) -> int:
        """What it keeps of a pack."""
        _, tokens, rows = place
        kept = self._entered(tokens) + self._looked(tokens) + self._left(tokens, rows)
        return kept + self._copied(place) * self.enters

    def _entered(self, tokens: int) -> int:
        """Of the way into attention: the input, its scale, its norm where the weight learns, and
        what the adapter made of that."""
        normed = self.into.inputs * bool(self.into.weights)
        return tokens * (self.into.inputs + WIDE + normed + self.into.low) * self.enters

    def _looked(self, tokens: int) -> int:
        """Of attention: the joint product, the output and its scales."""
        kept = self.into.outputs + self.out.inputs + WIDE * self.heads
        return tokens * kept * self.enters

    def _copied(self, place: Place) -> int:
        """Keys and values in which each sequence has what it goes on from, where they are long."""
        if not place.copies or max(place.contexts) <= SHORT:
            return 0
        return sum(place.contexts) * (self.into.outputs - self.heads * self.head * self.number)

    def _left(self, tokens: int, rows: int) -> int:
        """Of the way to the end: the sum after attention, its scale, its norm where a weight
        learns, both factors, and what adapters made. Some rows of attention's output are copied.
        """
        into, both = self.out, self.both
        copied = into.inputs * (rows < tokens or not self.enters)
        normed = both.inputs * bool(both.weights)
        low = into.low + both.low + self.down.low
        return rows * (copied + both.inputs + WIDE + normed + both.outputs + low) * self.leaves

    def going_forth(self, place: Place) -> int:
        """The most at once on the way forward, less what it keeps: negative where that is more."""
        most = max(self._going_in(place.tokens), self._going_out(place.tokens, place.rows))
        return most - self.of_pack(place)

    def _going_in(self, tokens: int) -> int:
        into = self.into
        row = into.inputs + WIDE + into.normed + into.low
        return tokens * row + max(tokens * into.lowering, into.forth(tokens, normed=True))

    def _going_out(self, tokens: int, rows: int) -> int:
        """Inputs with room behind them are there until the end."""
        out, both, down = self.out, self.both, self.down
        some = rows < tokens
        before = self._entered(tokens) + self._looked(tokens)
        if not self.enters:
            # Nothing is kept, but the caller has its input, and the layer the joint product.
            before = tokens * (both.inputs + self.into.outputs + out.inputs * (not some))
        before += rows * (both.inputs + out.inputs) * some
        laid = out.roomy * bool(out.room) + out.low + both.normed + both.low + WIDE
        held = before + rows * (laid + both.inputs)
        gated = held + rows * (both.outputs + down.roomy + down.low)
        return max(
            held + both.forth(rows, normed=True),
            gated + self._sums_forth(rows),
            gated + down.forth(rows),
        )

    def _sums_forth(self, rows: int) -> int:
        """Of what the adapter makes of the gated product, a share for each stretch of columns."""
        width = self.down.inputs // self.number
        shares = -(-width // columns_of_chunk(rows, width, GATE))
        return shares * rows * max(1, self.down.low // self.number) * WIDE

    def going_back(self, place: Place) -> int:
        """The most at once on the way back beside what it keeps, the output's gradient and those
        of its weights included; less what is gone by then."""
        if not self.leaves:
            return 0
        _, tokens, rows = place
        most = self._coming_out(rows)
        if self.enters:
            gone = self._left(tokens, rows)
            later = max(self._looking_back(place), self._coming_in(tokens))
            most = max(most, later + self._learned_out() - gone)
        return most

    def _coming_out(self, rows: int) -> int:
        """From the layer's end to attention's output."""
        out, both, down = self.out, self.both, self.down
        found = held = rows * both.inputs
        found = max(found, held + down.back(rows))
        held += down.gradients
        found = max(found, held + rows * down.came + down.sums(rows, GATE_BACK, PROGRAMS))
        found = max(found, held + both.weights + both.back(rows))
        found = max(found, held + both.weights + rows * both.came + both.lowered(rows))
        held += both.gradients + rows * both.inputs
        found = max(found, held + self._norm_sums(rows, self.norms[1]))
        held += self.norms[1]
        found = max(found, held + out.weights + out.back(rows))
        found = max(found, held + out.weights + rows * out.came + out.lowered(rows))
        return max(found, held + out.gradients + rows * out.inputs)

    def _norm_sums(self, rows: int, weight: int) -> int:
        """Of the gradient of a norm's weight of so many bytes, a share for each program."""
        if not weight:
            return 0
        shares = -(-rows // max(1, -(-rows // SUMS)))
        return shares * weight // self.number * WIDE

    def _learned_out(self) -> int:
        """The gradients of weights that have come when attention goes back."""
        after = self.out.gradients + self.both.gradients + self.down.gradients
        return after + self.norms[1]

    def _looking_back(self, place: Place) -> int:
        """Attention's way back: the gradients of its output and of what that is added to, and of
        queries, keys and values."""
        lengths, tokens, numbers = place.contexts, place.tokens, self.heads * self.head
        held = tokens * (self.into.inputs + self.out.inputs + self.into.outputs)
        if max(lengths) <= SHORT:
            # Each sequence has its own gradients by keys and values of the first one.
            apart = len(lengths) * lengths[0] * (self.into.outputs // self.number - numbers)
            return held + WIDE * (tokens * self.heads + apart * (place.copies > 0))
        rows = tokens + FLASH_TILE * len(lengths)
        filled = -(-self.head // FLASH_HEAD) * FLASH_HEAD
        summed = rows * self.heads * (filled + 1) * WIDE
        # Each query head has its own gradients of keys and values at first.
        grouped = self.into.outputs < 3 * numbers * self.number
        apart = 2 * sum(lengths) * numbers * self.number * grouped
        return held + summed + apart + self._copied(place)

    def _coming_in(self, tokens: int) -> int:
        """From queries, keys and values to the layer's input, less what attention kept."""
        into = self.into
        held = tokens * (into.inputs + 2 * into.outputs) - self._looked(tokens)
        if not self.reached:
            # The adapter's gradient alone.
            low = tokens * into.low
            alone = low + into.sums(tokens) + into.downs
            return held + max(2 * low, alone, low + into.gradients)
        found = held + into.back(tokens)
        found = max(found, held + tokens * into.came + into.lowered(tokens))
        held += into.downs + tokens * into.inputs
        found = max(found, held + self._norm_sums(tokens, self.norms[0]))
        return max(found, held + self.norms[0] + into.weights + into.ups)


def _learning(norm: nn.Module) -> int:
    """Bytes of its weight, where that learns."""
    return sum(p.nbytes for p in norm.parameters() if p.requires_grad)
