"""Triton kernels between the product that makes queries, keys and values and the attention, and
back: the turn of queries and keys by their positions (see `model.rope`).

Both halves of a head turn by the same angles: one half of the cosines, and of the sines the one
without the minus, is read. Shapes: T rows, E columns of the joint product (queries, keys, values),
H query heads, K key heads, D numbers of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.programs import Ptr
from finesight.model.kernels.sizes import Blocks

HEADS = 32
"""Of a row that a program turns at most; what was quickest on an H200."""

BACK = Blocks(8, 8, 2, 2)
"""Rows and heads that a program turns back; what was quickest on an H200."""


class Heads(NamedTuple):
    """How many there are of queries and of keys, and the numbers of each."""

    queries: int
    keys: int
    width: int

    @property
    def columns(self) -> int:
        """Of all of them."""
        return (self.queries + 2 * self.keys) * self.width


@triton.jit
def _by_angles(x1: tl.tensor, x2: tl.tensor, cos: tl.tensor, sin: tl.tensor, narrow: tl.constexpr,
               round_first: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    straight1, straight2 = x1 * cos, x2 * cos
    if round_first:
        straight1, straight2 = straight1.to(narrow).to(tl.float32), straight2.to(narrow)
        straight2 = straight2.to(tl.float32)
    return straight1 - x2 * sin, straight2 + x1 * sin


@triton.jit
def _turn(joint: Ptr, cos: Ptr, sin: Ptr, turned: int, columns: int, half: tl.constexpr,
          round_first: tl.constexpr, block_h: tl.constexpr, block_f: tl.constexpr,
          ) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * block_h + tl.arange(0, block_h)
    f = tl.arange(0, block_f)
    angle = row * 2 * half + half + f
    cos_1F = tl.load(cos + angle, mask=f < half, other=0.0).to(tl.float32)[None, :]
    sin_1F = tl.load(sin + angle, mask=f < half, other=0.0).to(tl.float32)[None, :]
    inside = (h < turned)[:, None] & (f < half)[None, :]
    at = joint + row * columns + h[:, None] * 2 * half + f[None, :]
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    y1, y2 = _by_angles(x1, x2, cos_1F, sin_1F, joint.dtype.element_ty, round_first)
    tl.store(at, y1, mask=inside)
    tl.store(at + half, y2, mask=inside)


def turn_heads(joint_TE: Tensor, heads: Heads, cos_T1D: Tensor, sin_T1D: Tensor) -> None:
    """Turn queries and keys where they lie."""
    rows, half, turned = len(joint_TE), heads.width // 2, heads.queries + heads.keys
    block_h = min(HEADS, triton.next_power_of_2(turned))
    _turn[(rows, triton.cdiv(turned, block_h))](
        joint_TE, cos_T1D, sin_T1D, turned, heads.columns, half=half,
        round_first=cos_T1D.dtype == joint_TE.dtype, block_h=block_h,
        block_f=triton.next_power_of_2(half), num_warps=max(1, block_h // 4),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _turn_back(source: Ptr, cos: Ptr, sin: Ptr, djoint: Ptr, rows: int, heads: int, first: int,
               columns: int, half: tl.constexpr, is_turned: tl.constexpr,
               round_first: tl.constexpr, block_m: tl.constexpr, block_h: tl.constexpr,
               block_f: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    f = tl.arange(0, block_f)
    at_M = m.to(tl.int64)
    inside = (m < rows)[:, None] & (f < half)[None, :]
    cos_MF = tl.zeros((block_m, block_f), tl.float32)
    sin_MF = cos_MF
    if is_turned:
        angle = at_M[:, None] * 2 * half + half + f[None, :]
        cos_MF = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        sin_MF = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    begin = tl.program_id(1) * block_h
    for head in range(begin, tl.minimum(heads, begin + block_h)):
        at = source + at_M[:, None] * heads * 2 * half + (head * 2 * half + f)[None, :]
        d1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        d2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        if is_turned:
            d1, d2 = _by_angles(d1, d2, cos_MF, -sin_MF, source.dtype.element_ty, round_first)
        to = djoint + at_M[:, None] * columns + (first + head * 2 * half + f)[None, :]
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
        _turn_back[(triton.cdiv(rows, BACK.rows), triton.cdiv(number, BACK.columns))](
            grad.contiguous(), cos_T1D, sin_T1D, djoint_TE, rows, number, first, heads.columns,
            half=half, is_turned=first < (heads.queries + heads.keys) * heads.width,
            round_first=cos_T1D.dtype == grad.dtype, block_m=BACK.rows, block_h=BACK.columns,
            block_f=triton.next_power_of_2(half), num_warps=BACK.warps,
        )  # fmt: skip
        first += number * heads.width
    return djoint_TE
