"""Attention over sequences that lie end to end.

Shapes: T tokens of the pack, K keys, H heads, D numbers of a head, S sequences, N sequences of
one length, L that length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.frozen import KERNELS, has_tensor_cores
from finesight.model.runs import Runs, alike, branched, padded, upload
from finesight.model.short_attention import LONGEST, attend_short

if KERNELS:
    from finesight.model.kernels import attention as attention_kernels
    from finesight.model.kernels import look as look_kernels

SHORT = 256
"""Tokens of a segment up to which `attention_kernels` are the quickest on an H200."""

_TORCH = tuple(int(piece) for piece in torch.__version__.split(".")[:2])


class Attention(Protocol):
    """How the decoder's layers look at tokens: at a pack, or at a cache while generating."""

    @property
    def contexts_T(self) -> Tensor:
        """How many tokens the sequence of each new token was when its first ones were read: its
        prompt's while generating. Whole numbers on the tensors' device."""
        ...

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Queries, keys and values of the new tokens, with fewer heads K than H where grouped,
        to what each query takes from the values: [T, H, D]."""
        ...


@dataclass(frozen=True)
class Segments:
    """Where sequences begin and end: `bounds_S1` is the running sum of `lengths` from 0 (int32,
    on the tensors' device), `longest` the largest of them."""

    lengths: tuple[int, ...]
    bounds_S1: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device) -> Segments:
        """Segments of these lengths, their bounds copied to `device`."""
        lengths = tuple(lengths)
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return cls(lengths, upload(bounds, device), max(lengths))

    @cached_property
    def contexts_T(self) -> Tensor:
        """The length of each token's segment."""
        lengths_S = self.bounds_S1.diff()
        return lengths_S.repeat_interleave(lengths_S, output_size=sum(self.lengths))

    @cached_property
    def runs(self) -> Runs:
        """Segments grouped by length."""
        return alike(self.lengths, self.bounds_S1.device)

    @cached_property
    def padded(self) -> Runs:
        """Segments of like length grouped, and padded."""
        return padded(self.lengths, self.bounds_S1.device)


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within each sequence of a pack: training, and scoring without a cache.

    `seed_1` (int32, on the device) is what the drop-outs of `fused_layer` are a function of.
    """

    segments: Segments
    seed_1: Tensor | None = None

    @property
    def contexts_T(self) -> Tensor:
        """`Attention`: every sequence is read whole."""
        return self.segments.contexts_T

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """`Attention`, the same for every layer."""
        return attend(q_THD, k_TKD, v_TKD, self.segments, causal=True)


class Places(NamedTuple):
    """Where rows of a pack stand whose sequences branch off the first one, of P rows, once each has
    them before its own: M rows. `at_M` is the row of each place, `own_T` the place of each row, and
    `trunk_SP` has the places of the first one's."""

    at_M: Tensor
    own_T: Tensor
    trunk_SP: Tensor


class _Branched(torch.autograd.Function):
    """Rows [T, ...] in their places [M, ...]."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return x_TX.index_select(0, places.at_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MX: Tensor) -> tuple[Tensor, None]:
        _, own_T, trunk_SP = ctx.places
        dx_TX, shape = dy_MX.index_select(0, own_T), (*trunk_SP.shape, *dy_MX.shape[1:])
        # What comes back from every sequence is summed up wide and rounded once.
        theirs_SPX = dy_MX.index_select(0, trunk_SP.flatten()).view(shape)
        wide = torch.promote_types(dy_MX.dtype, torch.float32)
        dx_TX[: shape[1]] = theirs_SPX.sum(0, dtype=wide)
        return dx_TX, None


@dataclass(frozen=True, kw_only=True)
class BranchedAttention(PackedAttention):
    """The same of sequences that go on from the first one, which each of the others reads before
    its own tokens, and which is computed once; of so many `rows` in all."""

    rows: int

    @property
    def contexts_T(self) -> Tensor:
        """The first sequence's tokens have as many contexts as others go on from there."""
        raise AssertionError("tokens of several sequences have no length of a sequence")

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """`Attention`, the same for every layer."""
        own, whole = self.segments, self.whole
        if _takes_short(q_THD, whole):
            bounds = attention_kernels.Bounds(own.bounds_S1, whole.longest, self.trunk)
            return _short(q_THD, k_TKD, v_TKD, bounds)
        if _is_short(q_THD, whole):
            return attend_short(q_THD, k_TKD, v_TKD, self.runs, causal=True)
        k_MKD, v_MKD = self._branched(k_TKD), self._branched(v_TKD)
        if has_varlen(q_THD):
            return _attend_varlen(q_THD, k_MKD, v_MKD, own, whole, causal=True)
        o_MHD = attend(self._branched(q_THD), k_MKD, v_MKD, whole, causal=True)
        return o_MHD.index_select(0, self.places.own_T)

    def _branched(self, x_TX: Tensor) -> Tensor:
        y_MX: Tensor = _Branched.apply(x_TX, self.places)  # type: ignore[no-untyped-call]
        return y_MX

    @property
    def trunk(self) -> int:
        """Tokens of the first sequence."""
        return self.segments.lengths[0]

    @cached_property
    def whole(self) -> Segments:
        """Each sequence with what it reads before its own tokens."""
        first, *others = self.segments.lengths
        lengths, bounds_S1 = (first, *(first + n for n in others)), self.segments.bounds_S1
        before_S1 = torch.arange(-1, len(others) + 1, device=bounds_S1.device).clamp_(min=0)
        whole_S1 = (bounds_S1 + before_S1 * first).to(bounds_S1.dtype)
        return Segments(lengths, whole_S1, max(lengths))

    @cached_property
    def runs(self) -> Runs:
        """Each sequence but the first with what it reads before its own tokens, in batches."""
        return branched(self.segments.lengths)

    @cached_property
    def places(self) -> Places:
        """Made on the device: of a recording's sequences the lengths are known there alone."""
        (own_S1, whole_S1), trunk = (self.segments.bounds_S1, self.whole.bounds_S1), self.trunk
        row_T = torch.arange(self.rows, device=own_S1.device, dtype=own_S1.dtype)
        own_T = row_T + trunk * torch.searchsorted(own_S1[1:], row_T, right=True)
        trunk_SP = whole_S1[:-1, None] + row_T[:trunk]
        places = self.rows + trunk * (len(own_S1) - 2)
        place_M = torch.arange(places, device=own_S1.device, dtype=own_S1.dtype)
        sequence_M = torch.searchsorted(whole_S1[1:], place_M, right=True)
        inside_M = place_M - whole_S1[sequence_M]
        after_M = own_S1[sequence_M] + inside_M - trunk * (sequence_M > 0)
        at_M = torch.where(inside_M < trunk, inside_M, after_M)
        return Places(at_M, own_T, trunk_SP)


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    segments: Segments,
    *,
    causal: bool,
    keys: Segments | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each segment, in one kernel where the card has it.

    `keys` are the segments of the keys where these are more: the queries are then the last ones of
    their segments.
    """
    if keys is not None and has_varlen(q_THD):
        return _attend_varlen(q_THD, k_TKD, v_TKD, segments, keys, causal)
    if keys is not None:
        assert causal, "the last ones of what nobody is before"
        return _attend_last(q_THD, k_TKD, v_TKD, segments, keys)
    if _is_short(q_THD, segments):
        runs = segments.padded if causal else segments.runs
        return attend_short(q_THD, k_TKD, v_TKD, runs, causal=causal)
    if not has_varlen(q_THD):
        return attend_by_segment(q_THD, k_TKD, v_TKD, segments.runs, causal)
    if causal and _takes_short(q_THD, segments):
        return _short(q_THD, k_TKD, v_TKD, _bounds(segments))
    if KERNELS and not (causal or torch.is_grad_enabled()):
        return look_kernels.look(q_THD, k_TKD, v_TKD, _bounds(segments))
    return _attend_varlen(q_THD, k_TKD, v_TKD, segments, segments, causal)


def _is_short(q_THD: Tensor, segments: Segments) -> bool:
    """Whether plain products are quicker than torch's fused kernel. Where there is no way back and
    a processor has tiles for bf16, they are not: on a Xeon half as quick, for a tower."""
    if q_THD.device.type != "cpu" or q_THD.dtype != torch.bfloat16:
        return False
    return segments.longest <= LONGEST and (torch.is_grad_enabled() or not has_tiles())


@lru_cache
def has_tiles() -> bool:
    """Whether this processor multiplies bf16 in tiles (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _takes_short(q_THD: Tensor, segments: Segments) -> bool:
    """Whether `attention_kernels` take these."""
    return KERNELS and segments.longest <= SHORT and has_varlen(q_THD)


def _bounds(segments: Segments) -> attention_kernels.Bounds:
    return attention_kernels.Bounds(segments.bounds_S1, segments.longest)


class _Short(torch.autograd.Function):
    """Causal attention in segments for which the kernels of long ones are too coarse."""

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: attention_kernels.Bounds
    ) -> Tensor:
        o_THD, lse_HT = attention_kernels.forth(q_THD, k_TKD, v_TKD, bounds, causal=True)
        ctx.save_for_backward(q_THD, k_TKD, v_TKD, o_THD, lse_HT)
        ctx.bounds = bounds
        return o_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKD, o_THD, lse_HT = ctx.saved_tensors
        inputs = q_THD, k_TKD, v_TKD, o_THD, do_THD, lse_HT
        return *attention_kernels.back(*inputs, ctx.bounds, causal=True), None


def _short(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, bounds: attention_kernels.Bounds) -> Tensor:
    o_THD: Tensor = _Short.apply(q_THD, k_TKD, v_TKD, bounds)  # type: ignore[no-untyped-call]
    return o_THD


def _attend_varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, queries: Segments, keys: Segments, causal: bool
) -> Tensor:
    # It brings torch's compiler along, which takes as long to import as torch: not where no GPU is.
    from torch.nn.attention.varlen import varlen_attn

    # The window is counted from the ends of the segments, where queries are fewer than keys.
    window = (-1, 0) if causal else (-1, -1)
    bounds = queries.bounds_S1, keys.bounds_S1, queries.longest, keys.longest
    inputs = (q_THD, k_TKD, v_TKD, *bounds)
    if _TORCH >= (2, 12):
        o_THD = varlen_attn(*inputs, window_size=window, enable_gqa=True)
    else:
        # The kernel reads grouped heads as they are; only later releases want that said.
        o_THD = varlen_attn(*inputs, window_size=window)
    assert isinstance(o_THD, Tensor), f"varlen_attn returned {type(o_THD)}"
    return o_THD


def _attend_last(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, queries: Segments, keys: Segments
) -> Tensor:
    """The last queries of each segment, without a variable-length kernel."""
    grouped = q_THD.shape[1] > k_TKD.shape[1]
    pieces = []
    for q_LHD, k_LKD, v_LKD in zip(
        torch.split(q_THD, [*queries.lengths]),
        torch.split(k_TKD, [*keys.lengths]),
        torch.split(v_TKD, [*keys.lengths]),
        strict=True,
    ):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_LHD, k_LKD, v_LKD))
        whole = torch.ones(len(q_LHD), len(k_LKD), dtype=torch.bool, device=q.device)
        mask = whole.tril(len(k_LKD) - len(q_LHD))
        o_1HLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        pieces.append(o_1HLD.squeeze(0).transpose(0, 1))
    return torch.cat(pieces)


def has_varlen(q_THD: Tensor) -> bool:
    """Whether variable-length flash attention takes these queries: 16-bit numbers, heads of a
    multiple of 8, and a card of compute capability 8.0 or newer."""
    return q_THD.shape[-1] % 8 == 0 and has_tensor_cores(q_THD.dtype, q_THD.device)


def attend_by_segment(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, runs: Runs, causal: bool
) -> Tensor:
    """The same without a variable-length kernel: segments of one length in one call."""
    # The fused kernels for CPU and older cards want as many key heads as query heads.
    repeats = q_THD.shape[1] // k_TKD.shape[1]
    if repeats > 1:
        k_TKD = k_TKD.repeat_interleave(repeats, dim=1)
        v_TKD = v_TKD.repeat_interleave(repeats, dim=1)
    packed = [q_THD, k_TKD, v_TKD]
    if runs.order_T is not None:
        packed = [x_THD.index_select(0, runs.order_T) for x_THD in packed]
    sizes = [length * count for length, count in runs.lengths]
    pieces = []
    for (length, count), *run in zip(
        runs.lengths, *(torch.split(x, sizes) for x in packed), strict=True
    ):
        q, k, v = (torch.unflatten(x, 0, (count, length)).transpose(1, 2) for x in run)
        o_NHLD = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        pieces.append(o_NHLD.transpose(1, 2).flatten(0, 1))
    o_THD = torch.cat(pieces)
    return o_THD if runs.back_T is None else o_THD.index_select(0, runs.back_T)
