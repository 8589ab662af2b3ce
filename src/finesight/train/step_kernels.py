"""Triton kernels of an optimiser's step: one passage over all that a group of parameters keeps.

A group's gradients lie wherever autograd has made them, each parameter's by itself. A program takes
a tile of one parameter, and finds its gradient by a table of addresses.

Shapes: P parameters, T tiles of R rows of N = 256 numbers; E numbers of a group end to end.
Imported only where Triton is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.train.moments import BLOCK, EPSILON, Moment, Pace
from finesight.train.wide import Wide

ROWS = 8
"""Of a tile."""

WARPS = 4

EVEN = 16
"""Where parameters hold multiples of so many numbers, a thread reads several at once."""


class Tiles:
    """Which numbers each program takes, for parameters at these places of a group: `parameter_T`
    of each tile, and `table_P3`, of each parameter its first tile, its place and its size."""

    def __init__(self, places: Sequence[slice], device: torch.device) -> None:
        sizes = [place.stop - place.start for place in places]
        counts = [triton.cdiv(size, ROWS * BLOCK) for size in sizes]
        numbers_P = torch.arange(len(places), dtype=torch.int32)
        self.parameter_T = numbers_P.repeat_interleave(torch.tensor(counts)).to(device)
        firsts = [sum(counts[:n]) for n in range(len(counts))]
        rows = [list(row) for row in zip(firsts, (p.start for p in places), sizes, strict=True)]
        self.table_P3 = torch.tensor(rows, dtype=torch.int64).to(device)
        self.even = all(size % EVEN == 0 for size in sizes)

    def addresses(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Where these gradients lie, [P] on the device; zero for none. They must stay there until
        the kernel has been started. Waits for nothing."""
        found = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        table_P = torch.tensor(found, dtype=torch.int64)
        if self.table_P3.is_cuda:
            table_P = table_P.pin_memory()
        return table_P.to(self.table_P3.device, non_blocking=True)


def _aligned(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same ones, but for those that begin within 16 bytes, as slices of others may."""
    return [g.clone() if g is not None and g.data_ptr() % 16 else g for g in gradients]


@triton.jit
def _tile(parameter_T, table_P3, even: tl.constexpr, rows: tl.constexpr):
    """Of this program: its parameter, the first number of its tile within the parameter and within
    the group, and which numbers of the tile there are [R, N]."""
    t = tl.program_id(0)
    p = tl.load(parameter_T + t)
    row = table_P3 + p * 3
    size = tl.load(row + 2)
    begin = tl.multiple_of(tl.load(row + 1), 64)
    if even:
        size = tl.multiple_of(size, 16)
    first = (t - tl.load(row)) * (rows * 256)
    at_RN = tl.arange(0, rows)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return p, first, begin + first, at_RN, first + at_RN < size


@triton.jit
def _gradient(addresses_P, p, first, at_RN, inside_RN, like):
    """Of a tile in fp32, zeros where none came."""
    address = tl.load(addresses_P + p)
    grad_RN = tl.zeros_like(at_RN).to(tl.float32)
    if address != 0:
        numbers = tl.multiple_of(address.to(like.dtype), 16)
        grad_RN = tl.load(numbers + first + at_RN, mask=inside_RN, other=0.0).to(tl.float32)
    return grad_RN


@triton.jit
def _add_up(parameter_T, table_P3, gradients_P, sums_P, came_P, like, wide, even: tl.constexpr,
            rows: tl.constexpr):  # fmt: skip
    p, first, _, at_RN, inside_RN = _tile(parameter_T, table_P3, even, rows)
    if tl.load(gradients_P + p) != 0:
        grad_RN = _gradient(gradients_P, p, first, at_RN, inside_RN, like)
        grad_RN += _gradient(came_P, p, first, at_RN, inside_RN, wide)
        sums = tl.multiple_of(tl.load(sums_P + p).to(wide.dtype), 16)
        tl.store(sums + first + at_RN, grad_RN, mask=inside_RN)


def add_up(
    tiles: Tiles,
    gradients: Sequence[Tensor | None],
    sums: Sequence[Tensor],
    came: Sequence[bool],
) -> None:
    """Add gradients to those fp32 sums that something came to before, and put them in place of
    others."""
    gradients = _aligned(gradients)
    like = next(gradient for gradient in gradients if gradient is not None)
    before = [own if some else None for own, some in zip(sums, came, strict=True)]
    _add_up[(len(tiles.parameter_T),)](
        tiles.parameter_T, tiles.table_P3, tiles.addresses(gradients), tiles.addresses(sums),
        tiles.addresses(before), like, sums[0], even=tiles.even, rows=ROWS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit
def _squares(parameter_T, table_P3, gradients_P, sums_T, like, even: tl.constexpr,
             rows: tl.constexpr):  # fmt: skip
    p, first, _, at_RN, inside_RN = _tile(parameter_T, table_P3, even, rows)
    grad_RN = _gradient(gradients_P, p, first, at_RN, inside_RN, like)
    tl.store(sums_T + tl.program_id(0), tl.sum(tl.sum(grad_RN * grad_RN, 1), 0))


def squares(tiles: Tiles, gradients: Sequence[Tensor | None]) -> Tensor:
    """The sum of the squares of all gradients, of which there is one at least; a scalar in fp32,
    always summed in the same order."""
    gradients = _aligned(gradients)
    like = next(gradient for gradient in gradients if gradient is not None)
    sums_T = torch.empty(len(tiles.parameter_T), device=like.device)
    _squares[(len(sums_T),)](
        tiles.parameter_T, tiles.table_P3, tiles.addresses(gradients), sums_T, like,
        even=tiles.even, rows=ROWS, num_warps=WARPS,
    )  # fmt: skip
    return sums_T.sum()


@triton.jit
def _decoded(codes, scale, signed: tl.constexpr):
    """What codes stand for; see `moments.levels`. Evenly spread, the levels of a decade lie on a
    line over their codes. Lines rise the steeper the higher the decade: the highest one holds."""
    if signed:
        m = tl.abs(codes.to(tl.int32) - 127).to(tl.float32) + 0.5
    else:
        m = codes.to(tl.float32) + 1.5
    slope: tl.constexpr = 9e-7 if signed else 4.5e-7
    level = m * slope - 8e-7
    for decade in tl.static_range(1, 7):
        level = tl.maximum(level, m * (slope * 5**decade) - 8e-7 * 10**decade)
    # Zero and one have no decade: they are where the lines end.
    level = tl.minimum(tl.maximum(level, 0.0), 1.0) * scale
    if signed:
        level = tl.where(codes.to(tl.int32) < 127, -level, level)
    return level


@triton.jit
def _encoded(wide, scale, signed: tl.constexpr):
    """The codes of the nearest levels: the lines of `_decoded` the other way, the lowest holds."""
    # A block of zeros has no scale to divide by.
    unit = tl.abs(wide) * (1.0 / tl.maximum(scale, 1.1754943508222875e-38))
    slope: tl.constexpr = 9e-7 if signed else 4.5e-7
    m = unit * (1.0 / slope) + 8e-7 / slope
    for decade in tl.static_range(1, 7):
        m = tl.minimum(m, unit * (1.0 / (slope * 5**decade)) + 8e-7 / slope * 2**decade)
    # Decades begin at powers of two. The middle between the levels on both sides is a bit above.
    below = m - 0.2
    crossed = m.to(tl.int32, bitcast=True) ^ below.to(tl.int32, bitcast=True)
    number = tl.where(crossed > 0x7FFFFF, below, m).to(tl.int32)
    top: tl.constexpr = 128 if signed else 256
    number = tl.where(m > top - 0.25, top, number)
    if signed:
        # Minus one is no level.
        code = tl.where(wide < 0.0, tl.maximum(127 - number, 0), 127 + number)
    else:
        # What is not zero never becomes zero.
        code = tl.where(unit > 0.0, tl.maximum(number - 1, 1), 0)
    return code.to(tl.uint8)


@triton.jit
def _wide(narrow, rest, at, inside, beside: tl.constexpr):
    """fp32 numbers; see `wide`. `beside` the narrow ones are so many bytes."""
    if beside == 4:
        wide = tl.load(rest + at, mask=inside, other=0.0)
    elif beside == 2:
        upper = tl.load(narrow + at, mask=inside, other=0).to(tl.int32) << 16
        lower = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
        wide = (upper + lower).to(tl.float32, bitcast=True)
    else:
        wide = tl.load(narrow + at, mask=inside, other=0.0)
    return wide


@triton.jit
def _keep(wide, narrow, rest, at, inside, beside: tl.constexpr):
    if beside == 2:
        bits = wide.to(tl.int32, bitcast=True)
        tl.store(rest + at, bits.to(tl.int16), mask=inside)
        tl.store(narrow + at, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
    else:
        if beside == 4:
            tl.store(rest + at, wide, mask=inside)
        tl.store(narrow + at, wide.to(narrow.dtype.element_ty), mask=inside)


@triton.jit
def _moment(codes, scales, at, blocks, inside, there, eight: tl.constexpr,
            signed: tl.constexpr):  # fmt: skip
    if eight:
        code = tl.load(codes + at, mask=inside, other=127 if signed else 0)
        scale = tl.load(scales + blocks, mask=there, other=0.0)
        moment = _decoded(code, scale[:, None], signed)
    else:
        moment = tl.load(codes + at, mask=inside, other=0.0)
    return moment


@triton.jit
def _remember(moment, codes, scales, at, blocks, inside, there, eight: tl.constexpr,
              signed: tl.constexpr):  # fmt: skip
    if eight:
        scale = tl.max(tl.abs(moment), axis=1)
        tl.store(codes + at, _encoded(moment, scale[:, None], signed), mask=inside)
        tl.store(scales + blocks, scale, mask=there)
    else:
        tl.store(codes + at, moment, mask=inside)


@triton.jit
def _adamw(parameter_T, table_P3, addresses_P, like, narrow, rest, first, first_scale, second,
           second_scale, shrink, taken, taken_next, log_1, log_2, kept, rate, new_1, beta_2, new_2,
           epsilon, beside: tl.constexpr, eight: tl.constexpr, even: tl.constexpr,
           rows: tl.constexpr):  # fmt: skip
    by = tl.load(shrink)
    before = tl.load(taken)
    if tl.program_id(0) == 0:
        tl.store(taken_next, tl.where(by == by, before + 1.0, before))
    if by != by:
        return
    # What moments lack as long as steps are few; one less a number near one wants 64 bits.
    length = (rate / (1.0 - tl.exp((before + 1.0) * log_1))).to(tl.float32)
    unbias = (1.0 / tl.sqrt(1.0 - tl.exp((before + 1.0) * log_2))).to(tl.float32)
    p, start, begin, at_RN, inside_RN = _tile(parameter_T, table_P3, even, rows)
    grad_RN = _gradient(addresses_P, p, start, at_RN, inside_RN, like) * by
    blocks_R = begin // 256 + tl.arange(0, rows)
    there_R = start + tl.arange(0, rows) * 256 < tl.load(table_P3 + p * 3 + 2)
    at_RN += begin
    m_RN = _moment(first, first_scale, at_RN, blocks_R, inside_RN, there_R, eight, True)
    v_RN = _moment(second, second_scale, at_RN, blocks_R, inside_RN, there_R, eight, False)
    m_RN += new_1 * (grad_RN - m_RN)
    v_RN = v_RN * beta_2 + new_2 * grad_RN * grad_RN
    wide_RN = _wide(narrow, rest, at_RN, inside_RN, beside) * kept
    # Moved by the moments as they are before they are rounded.
    wide_RN -= length * (m_RN / (tl.sqrt(v_RN) * unbias + epsilon))
    _keep(wide_RN, narrow, rest, at_RN, inside_RN, beside)
    _remember(m_RN, first, first_scale, at_RN, blocks_R, inside_RN, there_R, eight, True)
    _remember(v_RN, second, second_scale, at_RN, blocks_R, inside_RN, there_R, eight, False)


def adamw(
    tiles: Tiles,
    gradients: Sequence[Tensor | None],
    numbers: Wide,
    moments: tuple[Moment, Moment],
    shrink: Tensor,
    count: tuple[Tensor, Tensor],
    pace: Pace,
) -> None:
    """A step of AdamW for one group: gradients times `shrink`, a scalar on the device, move its
    numbers and its moments; NaN leaves all as it is. The first number of `count` says how many
    steps came before, and the second one becomes how many there are with this one."""
    narrow_E, rest_E = numbers.narrow_E, numbers.rest_E
    gradients = _aligned(gradients)
    like = next((gradient for gradient in gradients if gradient is not None), narrow_E)
    beside = 0 if rest_E is None else rest_E.itemsize
    beta_1, beta_2 = pace.betas
    first, second = moments
    logs = [math.log(beta) if beta else -math.inf for beta in pace.betas]
    _adamw[(len(tiles.parameter_T),)](
        tiles.parameter_T, tiles.table_P3, tiles.addresses(gradients), like,
        narrow_E.view(torch.int16) if beside == 2 else narrow_E, rest_E,
        first.numbers_E, first.scale_B, second.numbers_E, second.scale_B, shrink,
        *count, *logs, pace.kept, pace.rate, 1 - beta_1, beta_2, 1 - beta_2, EPSILON,
        beside=beside, eight=first.scale_B is not None, even=tiles.even, rows=ROWS,
        num_warps=WARPS,
    )  # fmt: skip
