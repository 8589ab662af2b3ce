"""Triton kernels between the two products of a gated MLP, with what an adapter of the second reads,
and back: each wide tensor is read once each way.

Sums are fp32. Shapes: T rows, F inner width, R ranks, J columns of an input and of what is joined
to it, C chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.drop import Drop, kept
from finesight.model.kernels.programs import Ptr, folded, in_step, rank_block, times_sigmoid
from finesight.model.kernels.sizes import GATE, GATE_BACK, columns_of_chunk, rows_of_chunk


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _gate(both: Ptr, a: Ptr, h: Ptr, partial: Ptr, rows: int, width: int, ranks: int,
          h_stride: int, per_chunk: int, seed: Ptr, salt: int, threshold: int, times: float,
          is_low: tl.constexpr, is_dropped: tl.constexpr, block_m: tl.constexpr,
          block_n: tl.constexpr, block_r: tl.constexpr, ahead: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    inside_M, inside_R, at_M = m < rows, r < ranks, m.to(tl.int64)
    low_MR = tl.zeros((block_m, block_r), tl.float32)
    last = tl.minimum(width, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_n, num_stages=ahead):
        c = start + tl.arange(0, block_n)
        inside_N = c < width
        inside = inside_M[:, None] & inside_N[None, :]
        from_MN = both + at_M[:, None] * 2 * width + c[None, :]
        gate_MN = tl.load(from_MN, mask=inside, other=0.0).to(tl.float32)
        up_MN = tl.load(from_MN + width, mask=inside, other=0.0).to(tl.float32)
        silu_MN = times_sigmoid(gate_MN, gate_MN * -1.4426950408889634)
        h_MN = (silu_MN * up_MN).to(h.dtype.element_ty)
        tl.store(h + at_M[:, None] * h_stride + c[None, :], h_MN, mask=inside)
        if is_low:
            if is_dropped:
                inside &= kept(seed, salt, m, c, threshold)
            # Numbers outside are zero anyway; but without a mask the compiler has each warp that
            # reads the product's operand compute it from `both` again.
            h_MN = tl.where(inside, h_MN, 0.0)
            inside_RN = inside_R[:, None] & inside_N[None, :]
            a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=inside_RN, other=0.0)
            low_MR += tl.dot(h_MN, tl.trans(a_RN))
    if is_low:
        to_MR = partial + (chunk * rows + at_M)[:, None] * ranks + r[None, :]
        tl.store(to_MR, low_MR * times, mask=inside_M[:, None] & inside_R[None, :])


def gated_low(
    both_TF2: Tensor, a_RF: Tensor | None, drop: Drop, room: int
) -> tuple[Tensor, Tensor | None]:
    """silu(gate) up of the joint product `both`, gate before up: the first F columns of [T, J],
    with `room` behind them; and drop(that) A^T [T, R], which stands there, too, where there is
    room. What is left of it is zero."""
    rows, width = len(both_TF2), both_TF2.shape[1] // 2
    h_TJ = both_TF2.new_empty(rows, width + room)
    ranks, tile = 1 if a_RF is None else len(a_RF), GATE
    tall, per_chunk = triton.cdiv(rows, tile.rows), columns_of_chunk(rows, width, tile)
    chunks = triton.cdiv(width, per_chunk)
    partial_CTR = h_TJ.new_empty(chunks, rows, ranks, dtype=torch.float32)
    _gate[(tall, chunks)](
        both_TF2, h_TJ if a_RF is None else a_RF, h_TJ, partial_CTR, rows, width, ranks,
        h_TJ.stride(0), per_chunk, *drop.told(both_TF2), is_low=a_RF is not None,
        is_dropped=drop.share > 0.0, block_m=tile.rows, block_n=tile.columns,
        block_r=rank_block(ranks), num_warps=tile.warps, ahead=tile.stages,
    )  # fmt: skip
    if a_RF is None:
        h_TJ[:, width:].zero_()
        return h_TJ, None
    low_TR = folded(partial_CTR, h_TJ.dtype)
    if room:
        h_TJ[:, width : width + ranks].copy_(low_TR)
        h_TJ[:, width + ranks :].zero_()
    return h_TJ, low_TR


@triton.jit(do_not_specialize=["rows", "per_chunk", "salt", "threshold"])
def _gate_back(both: Ptr, a: Ptr, dh: Ptr, dlow: Ptr, partial: Ptr, rows: int, per_chunk: int,
               width: int, ranks: int, dh_stride: int, dlow_stride: int, seed: Ptr, salt: int,
               threshold: int, times: float, is_low: tl.constexpr, is_dropped: tl.constexpr,
               is_kept: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
               block_r: tl.constexpr, ahead: tl.constexpr) -> None:  # fmt: skip
    c = tl.program_id(0) * block_n + tl.arange(0, block_n)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    inside_N, inside_R = c < width, r < ranks
    inside_RN = inside_R[:, None] & inside_N[None, :]
    narrow = both.dtype.element_ty
    a_RN = tl.zeros((block_r, block_n), narrow)
    if is_low:
        a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=inside_RN, other=0.0)
    da_RN = tl.zeros((block_r, block_n), tl.float32)
    last = tl.minimum(rows, (chunk + 1) * per_chunk)
    for start in tl.range(chunk * per_chunk, last, block_m, num_stages=ahead):
        m = start + tl.arange(0, block_m)
        inside_M, at_M = m < last, m.to(tl.int64)
        inside = inside_M[:, None] & inside_N[None, :]
        at_both = both + at_M[:, None] * 2 * width + c[None, :]
        at_h = dh + at_M[:, None] * dh_stride + c[None, :]
        g_MN = tl.load(at_both, mask=inside, other=0.0).to(tl.float32)
        u_MN = tl.load(at_both + width, mask=inside, other=0.0).to(tl.float32)
        dh_MN = tl.load(at_h, mask=inside, other=0.0).to(tl.float32)
        if is_low:
            dlow_MR = tl.load(dlow + at_M[:, None] * dlow_stride + r[None, :],
                              mask=inside_M[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
            g_MN, more_MN = in_step(g_MN, tl.dot(dlow_MR, a_RN) * times)
        sig_MN = 1.0 / (1.0 + tl.exp2(g_MN * -1.4426950408889634))
        silu_MN = g_MN * sig_MN
        h_MN = (silu_MN * u_MN).to(narrow)
        if is_kept:
            tl.store(at_h, h_MN, mask=inside)
        if is_low:
            if is_dropped:
                kept_MN = kept(seed, salt, m, c, threshold)
                more_MN = tl.where(kept_MN, more_MN, 0.0)
                h_MN = tl.where(kept_MN, h_MN, 0.0)
            dh_MN += more_MN
            da_RN += tl.dot(tl.trans(dlow_MR), h_MN)
        dgate_MN = dh_MN * u_MN * sig_MN * (1.0 + g_MN * (1.0 - sig_MN))
        tl.store(at_both, dgate_MN, mask=inside)
        tl.store(at_both + width, dh_MN * silu_MN, mask=inside)
    if is_low:
        to_RN = partial + (chunk * ranks + r).to(tl.int64)[:, None] * width + c[None, :]
        tl.store(to_RN, da_RN * times, mask=inside_RN)


class Gradients(NamedTuple):
    """Of `gated_low` by `both`, and by A. `h_TF` is its first result made again, where it is
    wanted."""

    both_TF2: Tensor
    h_TF: Tensor | None
    a_RF: Tensor | None


def gated_low_back(
    both_TF2: Tensor, a_RF: Tensor | None, dh_TF: Tensor, dlow_TR: Tensor | None, drop: Drop,
    *, again: bool = False,
) -> Gradients:  # fmt: skip
    """From those of `gated_low`'s two results; `both` is overwritten, and `dh` where the first
    result is wanted `again`. Always summed in the same order."""
    rows, width = dh_TF.shape
    ranks, tile = 1 if a_RF is None else len(a_RF), GATE_BACK
    wide = triton.cdiv(width, tile.columns)
    per_chunk = rows_of_chunk(rows, wide)
    chunks = triton.cdiv(rows, per_chunk)
    kept_chunks = chunks if a_RF is not None else 0
    partial_CRF = dh_TF.new_empty(kept_chunks, ranks, width, dtype=torch.float32)
    dlow = dh_TF if dlow_TR is None else dlow_TR
    _gate_back[(wide, chunks)](
        both_TF2, dh_TF if a_RF is None else a_RF, dh_TF, dlow, partial_CRF,
        rows, per_chunk, width, ranks, dh_TF.stride(0), dlow.stride(0), *drop.told(both_TF2),
        is_low=a_RF is not None, is_dropped=drop.share > 0.0, is_kept=again,
        block_m=tile.rows, block_n=tile.columns, block_r=rank_block(ranks),
        num_warps=tile.warps, ahead=tile.stages,
    )  # fmt: skip
    da_RF = None if a_RF is None else folded(partial_CRF, a_RF.dtype)
    return Gradients(both_TF2, dh_TF if again else None, da_RF)
