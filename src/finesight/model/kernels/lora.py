"""What low-rank adapters need beside plain products: products with a dropped input and their way
back, the sum with a product that is rounded already, and copies of what was learned.

Sums are fp32. Shapes: T rows (tokens), I inputs, O outputs of a layer, R its rank, S ranks of a
group end to end, of them Z beyond a power of two, J columns of an input and of what is joined to
it, C chunks of rows, P matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.drop import Drop, kept, mixed
from finesight.model.kernels.programs import Ptr, folded, in_step, rank_block
from finesight.model.kernels.sizes import AT_ONCE, LOWERED_BACK, Blocks, rows_of_chunk

LOWERED, RAISED = Blocks(32, 64, 4, 4), Blocks(64, 64, 4, 2)
"""What was quickest on an H200."""

MANY = 192
"""Ranks beyond which twice the warps have registers enough, and half the tiles ahead have room."""


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _lowered(x: Ptr, a: Ptr, copy: Ptr, low: Ptr, rows: int, width: int, ranks: int, room: int,
             seed: Ptr, salt: int, threshold: int, times: float, is_dropped: tl.constexpr,
             is_copied: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
             block_r: tl.constexpr, ahead: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    r = tl.arange(0, block_r)
    inside_M, inside_R, at_M = m < rows, r < ranks, m.to(tl.int64)
    row_M = copy + at_M * (width + room)
    low_MR = tl.zeros((block_m, block_r), tl.float32)
    for start in tl.range(0, width, block_n, num_stages=ahead):
        c = start + tl.arange(0, block_n)
        inside_N = c < width
        inside = inside_M[:, None] & inside_N[None, :]
        x_MN = tl.load(x + at_M[:, None] * width + c[None, :], mask=inside, other=0.0)
        if is_copied:
            tl.store(row_M[:, None] + c[None, :], x_MN, mask=inside)
        if is_dropped:
            x_MN = tl.where(kept(seed, salt, m, c, threshold), x_MN, 0.0)
        inside_RN = inside_R[:, None] & inside_N[None, :]
        a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=inside_RN, other=0.0)
        low_MR += tl.dot(x_MN, tl.trans(a_RN))
    low_MR = (low_MR * times).to(low.dtype.element_ty)
    to_MR = low + at_M[:, None] * ranks + r[None, :]
    tl.store(to_MR, low_MR, mask=inside_M[:, None] & inside_R[None, :])
    if is_copied:
        row_M += width
        tl.store(row_M[:, None] + r[None, :], low_MR, mask=inside_M[:, None] & (r < room)[None, :])
        for start in range(block_r, room, block_r):
            inside = inside_M[:, None] & (start + r < room)[None, :]
            tl.store(row_M[:, None] + start + r[None, :], 0.0, mask=inside)


def lowered(x_TI: Tensor, a_RI: Tensor, drop: Drop, room: int) -> tuple[Tensor, Tensor]:
    """`drop.times` times dropped(x) A^T [T, R]; and before it `x` with that behind it and zeros up
    to `room` columns, where there is room, or `x` itself."""
    (rows, width), ranks, tile = x_TI.shape, len(a_RI), LOWERED
    low_TR = x_TI.new_empty(rows, ranks)
    x_TJ = x_TI.new_empty(rows, width + room) if room else x_TI
    _lowered[(triton.cdiv(rows, tile.rows),)](
        x_TI, a_RI, x_TJ, low_TR, rows, width, ranks, room, *drop.told(x_TI),
        is_dropped=drop.share > 0.0, is_copied=room > 0, block_m=tile.rows, block_n=tile.columns,
        block_r=rank_block(ranks), num_warps=tile.warps, ahead=tile.stages,
    )  # fmt: skip
    return x_TJ, low_TR


class Norm(NamedTuple):
    """Between a layer's input and what an adapter reads: the weight, and what `norm_kernels` told
    that each row was multiplied by."""

    w_I: Tensor
    scale_T: Tensor


@triton.jit(do_not_specialize=["rows", "per_chunk", "salt", "threshold"])
def _lowered_back(x: Ptr, w: Ptr, scales: Ptr, dn: Ptr, dlow: Ptr, a: Ptr, dx: Ptr, partial: Ptr,
                  rows: int, per_chunk: int, width: int, ranks: int, dn_stride: int,
                  dlow_stride: int, seed: Ptr, salt: int, threshold: int, times: float,
                  is_wanted: tl.constexpr, is_normed: tl.constexpr, is_dropped: tl.constexpr,
                  block_m: tl.constexpr, block_n: tl.constexpr, block_s: tl.constexpr,
                  block_z: tl.constexpr, ahead: tl.constexpr) -> None:  # fmt: skip
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    chunk = tl.program_id(1)
    # In two parts, powers of two: of one for all ranks, a quarter or more might be nothing.
    s = tl.arange(0, block_s)
    inside_N, inside_S = c < width, s < ranks
    inside_SN = inside_S[:, None] & inside_N[None, :]
    a_SN = tl.load(a + s[:, None] * width + c[None, :], mask=inside_SN, other=0.0)
    da_SN = tl.zeros((block_s, block_n), tl.float32)
    if block_z:
        z = block_s + tl.arange(0, block_z)
        inside_Z = z < ranks
        inside_ZN = inside_Z[:, None] & inside_N[None, :]
        a_ZN = tl.load(a + z[:, None] * width + c[None, :], mask=inside_ZN, other=0.0)
        da_ZN = tl.zeros((block_z, block_n), tl.float32)
    if is_normed:
        w_N = tl.load(w + c, mask=inside_N, other=0.0).to(tl.float32)
    last = tl.minimum(rows, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_m, num_stages=ahead):
        m = start + tl.arange(0, block_m)
        inside_M, at_M = m < last, m.to(tl.int64)
        inside = inside_M[:, None] & inside_N[None, :]
        at = at_M[:, None] * width + c[None, :]
        n_MN = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        from_MS = dlow + at_M[:, None] * dlow_stride + s[None, :]
        dlow_MS = tl.load(from_MS, mask=inside_M[:, None] & inside_S[None, :], other=0.0)
        if block_z:
            from_MZ = dlow + at_M[:, None] * dlow_stride + z[None, :]
            dlow_MZ = tl.load(from_MZ, mask=inside_M[:, None] & inside_Z[None, :], other=0.0)
        if is_wanted:
            more_MN = tl.dot(dlow_MS, a_SN)
            if block_z:
                more_MN = tl.dot(dlow_MZ, a_ZN, more_MN)
            n_MN, more_MN = in_step(n_MN, more_MN * times)
        if is_normed:
            scale_M = tl.load(scales + m, mask=inside_M, other=0.0)
            n_MN = n_MN * scale_M[:, None] * w_N[None, :]
        n_MN = n_MN.to(x.dtype.element_ty)
        # Numbers outside are zero anyway; see `gate_kernels` for what a mask spares.
        kept_MN = inside
        if is_dropped:
            kept_MN = kept(seed, salt, m, c, threshold)
        n_MN = tl.where(kept_MN, n_MN, 0.0)
        if is_wanted:
            from_MN = dn + at_M[:, None] * dn_stride + c[None, :]
            dn_MN = tl.load(from_MN, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + at, dn_MN + tl.where(kept_MN, more_MN, 0.0), mask=inside)
        da_SN += tl.dot(tl.trans(dlow_MS), n_MN)
        if block_z:
            da_ZN += tl.dot(tl.trans(dlow_MZ), n_MN)
    to_SN = partial + (chunk * ranks + s).to(tl.int64)[:, None] * width + c[None, :]
    tl.store(to_SN, da_SN * times, mask=inside_SN)
    if block_z:
        to_ZN = partial + (chunk * ranks + z).to(tl.int64)[:, None] * width + c[None, :]
        tl.store(to_ZN, da_ZN * times, mask=inside_ZN)


def lowered_back(
    x_TI: Tensor, norm: Norm | None, dn_TI: Tensor, dlow_TS: Tensor, a_SI: Tensor, drop: Drop
) -> tuple[Tensor, Tensor]:
    """From `dlow`, the gradient by `drop.times` times dropped(n) A^T for `n` the norm of `x`, or
    `x` itself: what comes to `dn`, the gradient by `n`, added to that in a piece of its own; and
    the gradient by A, always summed in the same order."""
    dx_TI = torch.empty_like(x_TI)
    return dx_TI, _back(x_TI, norm, (dn_TI, dx_TI), dlow_TS, a_SI, drop)


def down_grad(x_TI: Tensor, norm: Norm | None, dlow_TS: Tensor, a_SI: Tensor, drop: Drop) -> Tensor:
    """The second of `lowered_back` alone."""
    return _back(x_TI, norm, None, dlow_TS, a_SI, drop)


def _back(
    x_TI: Tensor,
    norm: Norm | None,
    between: tuple[Tensor, Tensor] | None,
    dlow_TS: Tensor,
    a_SI: Tensor,
    drop: Drop,
) -> Tensor:
    """The gradient by A; of `between`, the first with what comes to it is the second."""
    (rows, width), ranks, tile = x_TI.shape, len(a_SI), LOWERED_BACK
    wide = triton.cdiv(width, tile.columns)
    per_chunk = rows_of_chunk(rows, wide, AT_ONCE)
    chunks = triton.cdiv(rows, per_chunk)
    partial_CSI = x_TI.new_empty(chunks, ranks, width, dtype=torch.float32)
    w, scales = norm or (x_TI, x_TI)
    dn, dx = between or (x_TI, x_TI)
    (block_s, block_z), many = _parts(ranks), ranks > MANY
    _lowered_back[(wide, chunks)](
        x_TI, w, scales, dn, dlow_TS, a_SI, dx, partial_CSI, rows, per_chunk, width, ranks,
        dn.stride(0), dlow_TS.stride(0), *drop.told(x_TI), is_wanted=between is not None,
        is_normed=norm is not None, is_dropped=drop.share > 0.0, block_m=tile.rows,
        block_n=tile.columns, block_s=block_s, block_z=block_z, ahead=2 if many else tile.stages,
        num_warps=2 * tile.warps if many else tile.warps,
    )  # fmt: skip
    return folded(partial_CSI, a_SI.dtype)


def _parts(ranks: int) -> tuple[int, int]:
    """So many ranks as two powers of two, the second one 0 where it would spare nothing."""
    whole = rank_block(ranks)
    spares = whole >= 64 and 4 * ranks <= 3 * whole
    return (whole // 2, whole // 4) if spares else (whole, 0)


@triton.jit
def _by_chance(y_MN: tl.tensor, total_MN: tl.tensor, c: tl.tensor,
               lost: tl.constexpr) -> tl.tensor:  # fmt: skip
    """A sum of so many digits less than fp32 has, up or down as often as it is nearer to either: of
    what was added to `y`, in 16 bits, nothing is lost then on average, down to what fp32 loses (in
    fp16, not below its least normal number). Chance is a function of `y` and its column: what a
    sample gives hangs on nothing else."""
    bits_MN = total_MN.to(tl.uint32, bitcast=True)
    own_MN = y_MN.to(tl.uint16, bitcast=True).to(tl.uint32)
    # Multiples of the golden ratio, whose neighbours lie far apart, from a start of the column.
    start_N = mixed(c.to(tl.uint32) * 0x85EBCA77 + 0x7FEB352D)
    chance_MN = (own_MN * 0x9E3779B1 + start_N[None, :]) >> (32 - lost)
    near_MN = (((bits_MN + chance_MN) >> lost) << lost).to(tl.float32, bitcast=True)
    # What is not finite stays so: all bits of one such number may be ones.
    return tl.where(tl.abs(total_MN) < float("inf"), near_MN, total_MN)


@triton.jit(do_not_specialize=["rows"])
def _raised(y: Ptr, low: Ptr, b: Ptr, rows: int, width: int, ranks: int, y_stride: int,
            low_stride: int, b_stride: int, times: float, lost: tl.constexpr,
            block_m: tl.constexpr, block_n: tl.constexpr,
            block_r: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    inside_M, inside_N, at_M = m < rows, c < width, m.to(tl.int64)
    at, inside = y + at_M[:, None] * y_stride + c[None, :], inside_M[:, None] & inside_N[None, :]
    y_MN = tl.load(at, mask=inside, other=0.0)
    more_MN = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, ranks, block_r):
        r = start + tl.arange(0, block_r)
        inside_R = r < ranks
        low_MR = tl.load(low + at_M[:, None] * low_stride + r[None, :],
                         mask=inside_M[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
        b_NR = tl.load(b + c[:, None] * b_stride + r[None, :],
                       mask=inside_N[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
        more_MN += tl.dot(low_MR, tl.trans(b_NR))
    total_MN = y_MN.to(tl.float32) + more_MN * times
    tl.store(at, _by_chance(y_MN, total_MN, c, lost), mask=inside)


def raised(y_TO: Tensor, low_TR: Tensor, b_OR: Tensor, times: float) -> None:
    """Add times low B^T to a product that is rounded to 16 bits already, and round the sum by
    chance (see `model.updates`); rows of each may lie apart."""
    (rows, width), ranks, tile = y_TO.shape, b_OR.shape[1], RAISED
    assert low_TR.shape == (rows, ranks), f"{tuple(low_TR.shape)}, not {rows, ranks}"
    assert len(b_OR) == width, f"{len(b_OR)} outputs, not {width}"
    assert all(t.stride(1) == 1 for t in (y_TO, low_TR, b_OR)), "numbers of a row lie apart"
    _raised[(triton.cdiv(width, tile.columns), triton.cdiv(rows, tile.rows))](
        y_TO, low_TR, b_OR, rows, width, ranks, y_TO.stride(0), low_TR.stride(0),
        b_OR.stride(0), times, lost=16 if y_TO.dtype == torch.bfloat16 else 13,
        block_m=tile.rows, block_n=tile.columns, block_r=min(64, rank_block(ranks)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@triton.jit
def _laid(table: Ptr, kind: Ptr, block_m: tl.constexpr, block_n: tl.constexpr) -> None:
    row = table + tl.program_id(0).to(tl.int64) * 5
    source = tl.load(row).to(kind.dtype)
    place = tl.load(row + 1).to(kind.dtype)
    rows, columns, stride = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    start = tl.program_id(1) * block_m
    if start >= rows:
        return
    m, n = start + tl.arange(0, block_m), tl.arange(0, block_n)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    x_MN = tl.load(source + m[:, None] * columns + n[None, :], mask=inside)
    tl.store(place + m[:, None] * stride + n[None, :], x_MN, mask=inside)


def laid(table_P5: Tensor, most_rows: int, most_columns: int, kind: Tensor) -> None:
    """Copy matrices whose rows lie end to end to where rows lie apart: of each, `table_P5` (int64,
    on the device) tells both addresses, rows, columns, and numbers from row to row of the copy.
    All have the type of `kind`."""
    _laid[(len(table_P5), triton.cdiv(most_rows, 64))](
        table_P5, kind, block_m=64, block_n=rank_block(most_columns), num_warps=8
    )
