"""Triton kernels between the product that makes queries, keys and values and the attention, and
back: what adapters add, and the turn of queries and keys by their positions.

Sums are fp32. Shapes: T rows, E columns of the joint product (queries, keys, values), H query
heads, K key heads, D numbers of a head, R ranks of each layer. Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from finesight.model.lora_kernels import Blocks, Ptr, rank_block

TURN = Blocks(32, 0, 4, 2)
"""What was quickest on an H200; a program takes whole heads."""


class HeadUps(NamedTuple):
    """What adapters add to queries, keys and values: `low_TS`, their ranks in this order, times the
    up-projections."""

    low_TS: Tensor
    q_ER: Tensor
    k_ER: Tensor
    v_ER: Tensor


class Heads(NamedTuple):
    """How many there are of queries and of keys, and the numbers of each."""

    queries: int
    keys: int
    width: int

    @property
    def columns(self) -> int:
        """Of all of them."""
        return (self.queries + 2 * self.keys) * self.width


@triton.jit(do_not_specialize=["rows"])
def _turn(joint: Ptr, low: Ptr, q_ups: Ptr, k_ups: Ptr, v_ups: Ptr, cos: Ptr, sin: Ptr, rows: int,
          heads: int, keys: int, half: int, ranks: int, is_updated: tl.constexpr,
          round_first: tl.constexpr, block_m: tl.constexpr, block_f: tl.constexpr,
          block_r: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    head = tl.program_id(1)
    f, r = tl.arange(0, block_f), tl.arange(0, block_r)
    inside_M, inside_F, inside_R, at_M = m < rows, f < half, r < ranks, m.to(tl.int64)
    inside = inside_M[:, None] & inside_F[None, :]
    at = at_M[:, None] * (heads + 2 * keys) * 2 * half + (head * 2 * half + f)[None, :]
    narrow = joint.dtype.element_ty
    x1 = tl.load(joint + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(joint + at + half, mask=inside, other=0.0).to(tl.float32)
    if is_updated:
        ups, of, own = q_ups, 0, head
        if head >= heads:
            ups, of, own = k_ups, 1, head - heads
        if head >= heads + keys:
            ups, of, own = v_ups, 2, head - heads - keys
        low_MR = tl.load(low + at_M[:, None] * 3 * ranks + (of * ranks + r)[None, :],
                         mask=inside_M[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
        up = ups + (own * 2 * half + f)[:, None] * ranks + r[None, :]
        inside_FR = inside_F[:, None] & inside_R[None, :]
        x1 += tl.dot(low_MR, tl.trans(tl.load(up, mask=inside_FR, other=0.0)))
        up += half * ranks
        x2 += tl.dot(low_MR, tl.trans(tl.load(up, mask=inside_FR, other=0.0)))
    if head < heads + keys:
        x1, x2 = x1.to(narrow).to(tl.float32), x2.to(narrow).to(tl.float32)
        angle = at_M[:, None] * 2 * half + f[None, :]
        cos1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        straight1, straight2 = x1 * cos1, x2 * cos2
        if round_first:
            straight1 = straight1.to(narrow).to(tl.float32)
            straight2 = straight2.to(narrow).to(tl.float32)
        x1, x2 = straight1 + x2 * sin1, straight2 + x1 * sin2
    if is_updated or head < heads + keys:
        tl.store(joint + at, x1, mask=inside)
        tl.store(joint + at + half, x2, mask=inside)


def turn_heads(
    joint_TE: Tensor, heads: Heads, ups: HeadUps | None, cos_T1D: Tensor, sin_T1D: Tensor
) -> None:
    """In place: the update of all heads, then the turn of queries and keys (see `model.rope`)."""
    rows, half = len(joint_TE), heads.width // 2
    ranks = 1 if ups is None else ups.q_ER.shape[1]
    low, q_ups, k_ups, v_ups = (joint_TE,) * 4 if ups is None else ups
    # Values change only where an adapter adds to them.
    number = heads.queries + (1 if ups is None else 2) * heads.keys
    _turn[(triton.cdiv(rows, TURN.rows), number)](
        joint_TE, low, q_ups, k_ups, v_ups, cos_T1D, sin_T1D, rows, heads.queries, heads.keys,
        half, ranks, is_updated=ups is not None, round_first=cos_T1D.dtype == joint_TE.dtype,
        block_m=TURN.rows, block_f=max(16, triton.next_power_of_2(half)),
        block_r=rank_block(ranks), num_warps=TURN.warps, num_stages=TURN.stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _turn_back(source: Ptr, cos: Ptr, sin: Ptr, djoint: Ptr, rows: int, heads: int, first: int,
               columns: int, half: int, is_turned: tl.constexpr, round_first: tl.constexpr,
               block_m: tl.constexpr, block_f: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    own = tl.program_id(1)
    f = tl.arange(0, block_f)
    at_M = m.to(tl.int64)
    inside = (m < rows)[:, None] & (f < half)[None, :]
    narrow = source.dtype.element_ty
    at = source + at_M[:, None] * heads * 2 * half + (own * 2 * half + f)[None, :]
    d1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    d2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if is_turned:
        angle = at_M[:, None] * 2 * half + f[None, :]
        cos1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        straight1, straight2 = d1 * cos1, d2 * cos2
        if round_first:
            straight1 = straight1.to(narrow).to(tl.float32)
            straight2 = straight2.to(narrow).to(tl.float32)
        d1, d2 = straight1 - d2 * sin1, straight2 - d1 * sin2
    to = djoint + at_M[:, None] * columns + (first + own * 2 * half + f)[None, :]
    tl.store(to, d1, mask=inside)
    tl.store(to + half, d2, mask=inside)


def turn_heads_back(
    grads: tuple[Tensor, Tensor, Tensor], heads: Heads, cos_T1D: Tensor, sin_T1D: Tensor
) -> Tensor:
    """From the gradients of queries [T, H, D], keys and values [T, K, D] that of the joint product
    [T, E]."""
    rows, half = len(grads[0]), heads.width // 2
    djoint_TE = grads[0].new_empty(rows, heads.columns)
    numbers = heads.queries, heads.keys, heads.keys
    first = 0
    for grad, number in zip(grads, numbers, strict=True):
        _turn_back[(triton.cdiv(rows, TURN.rows), number)](
            grad.contiguous(), cos_T1D, sin_T1D, djoint_TE, rows, number, first, heads.columns,
            half, is_turned=first < (heads.queries + heads.keys) * heads.width,
            round_first=cos_T1D.dtype == grad.dtype, block_m=TURN.rows,
            block_f=max(16, triton.next_power_of_2(half)), num_warps=TURN.warps,
        )  # fmt: skip
        first += number * heads.width
    return djoint_TE
