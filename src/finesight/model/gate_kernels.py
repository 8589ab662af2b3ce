"""Triton kernels between the two products of a gated MLP, adapters included, and back.

The wide products are read once each way. What an adapter adds to them is never written: gate and
up are made again from `both` and `low` on the way back. Sums are fp32.

Shapes: T rows, F inner width, D width, R ranks of each layer, C chunks. Imported only where Triton
is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.lora_kernels import (
    PROGRAMS,
    Blocks,
    Drop,
    Ptr,
    folded,
    kept,
    rank_block,
)

GATE, GATE_BACK = Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2)
"""What was quickest on an H200."""


SUMMED = True


class Ups(NamedTuple):
    """What adapters add to gate and up: `low_TS`, the ranks of gate before those of up, times
    `gate_FR` and `up_FR`."""

    low_TS: Tensor
    gate_FR: Tensor
    up_FR: Tensor


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _gate(both: Ptr, low: Ptr, gates: Ptr, ups: Ptr, a: Ptr, h: Ptr, partial: Ptr, rows: int,
          width: int, ranks: int, per_chunk: int, seed: Ptr, salt: int, threshold: int,
          times: float, is_updated: tl.constexpr, is_low: tl.constexpr, is_dropped: tl.constexpr,
          block_m: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    inside_M, inside_R, at_M = m < rows, r < ranks, m.to(tl.int64)
    inside_MR = inside_M[:, None] & inside_R[None, :]
    gate_MR = tl.zeros((block_m, block_r), both.dtype.element_ty)
    up_MR = gate_MR
    if is_updated:
        from_MR = low + at_M[:, None] * 2 * ranks + r[None, :]
        gate_MR = tl.load(from_MR, mask=inside_MR, other=0.0)
        up_MR = tl.load(from_MR + ranks, mask=inside_MR, other=0.0)
    low_MR = tl.zeros((block_m, block_r), tl.float32)
    last = tl.minimum(width, (chunk + 1) * per_chunk)
    for start in range(chunk * per_chunk, last, block_n):
        c = start + tl.arange(0, block_n)
        inside_N = c < width
        inside = inside_M[:, None] & inside_N[None, :]
        from_MN = both + at_M[:, None] * 2 * width + c[None, :]
        gate_MN = tl.load(from_MN, mask=inside, other=0.0).to(tl.float32)
        up_MN = tl.load(from_MN + width, mask=inside, other=0.0).to(tl.float32)
        if is_updated:
            inside_NR = inside_N[:, None] & inside_R[None, :]
            at_NR = c[:, None] * ranks + r[None, :]
            gate_NR = tl.load(gates + at_NR, mask=inside_NR, other=0.0)
            up_NR = tl.load(ups + at_NR, mask=inside_NR, other=0.0)
            gate_MN += tl.dot(gate_MR, tl.trans(gate_NR))
            up_MN += tl.dot(up_MR, tl.trans(up_NR))
        h_MN = (gate_MN * tl.sigmoid(gate_MN) * up_MN).to(h.dtype.element_ty)
        tl.store(h + at_M[:, None] * width + c[None, :], h_MN, mask=inside)
        if is_low:
            if is_dropped:
                h_MN = tl.where(kept(seed, salt, m, c, threshold), h_MN, 0.0)
            inside_RN = inside_R[:, None] & inside_N[None, :]
            a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=inside_RN, other=0.0)
            low_MR += tl.dot(h_MN, tl.trans(a_RN))
    if is_low:
        to_MR = partial + (chunk * rows + at_M)[:, None] * ranks + r[None, :]
        tl.store(to_MR, low_MR * times, mask=inside_MR)


def gated_low(
    both_TF2: Tensor, ups: Ups | None, a_RF: Tensor | None, drop: Drop
) -> tuple[Tensor, Tensor | None]:
    """silu(gate) up [T, F] of the joint product `both` (gate before up) and what adapters add to
    it; and drop(that) A^T [T, R]."""
    rows, width = len(both_TF2), both_TF2.shape[1] // 2
    h_TF = both_TF2.new_empty(rows, width)
    ranks = _ranks(ups, a_RF)
    tile = GATE
    tall, chunks, per_chunk = _shared(rows, width, tile)
    partial_CTR = torch.empty(chunks, rows, ranks, dtype=torch.float32, device=h_TF.device)
    low, gates, uppers = (both_TF2, both_TF2, both_TF2) if ups is None else ups
    _gate[(tall, chunks)](
        both_TF2, low, gates, uppers, h_TF if a_RF is None else a_RF, h_TF, partial_CTR,
        rows, width, ranks, per_chunk, *drop.told(both_TF2),
        is_updated=ups is not None, is_low=a_RF is not None, is_dropped=drop.share > 0.0,
        block_m=tile.rows, block_n=tile.columns, block_r=rank_block(ranks),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h_TF, None if a_RF is None else folded(partial_CTR, h_TF.dtype)


def _ranks(ups: Ups | None, a_RF: Tensor | None) -> int:
    if ups is not None:
        ranks = ups.gate_FR.shape[1]
        assert a_RF is None or len(a_RF) == ranks, f"{len(a_RF)} ranks after {ranks}"
        return ranks
    return 1 if a_RF is None else len(a_RF)


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _gate_back(both: Ptr, low: Ptr, gates: Ptr, ups: Ptr, a: Ptr, dh: Ptr, dlow: Ptr,
               dlow_back: Ptr, rows: int, width: int, ranks: int, per_chunk: int, seed: Ptr,
               salt: int, threshold: int, times: float, is_updated: tl.constexpr,
               is_low: tl.constexpr, is_dropped: tl.constexpr, is_summed: tl.constexpr,
               is_kept: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
               block_r: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    chunk = tl.program_id(1)
    r = tl.arange(0, block_r)
    inside_M, inside_R, at_M = m < rows, r < ranks, m.to(tl.int64)
    inside_MR = inside_M[:, None] & inside_R[None, :]
    narrow = both.dtype.element_ty
    at_MS = at_M[:, None] * 2 * ranks + r[None, :]
    gate_MR = tl.zeros((block_m, block_r), narrow)
    up_MR, dlow_MR = gate_MR, gate_MR
    if is_updated:
        gate_MR = tl.load(low + at_MS, mask=inside_MR, other=0.0)
        up_MR = tl.load(low + at_MS + ranks, mask=inside_MR, other=0.0)
    if is_low:
        dlow_MR = tl.load(dlow + at_M[:, None] * ranks + r[None, :], mask=inside_MR, other=0.0)
    dgate_MR = tl.zeros((block_m, block_r), tl.float32)
    dup_MR = tl.zeros((block_m, block_r), tl.float32)
    last = tl.minimum(width, (chunk + 1) * per_chunk)
    for start in range(chunk * per_chunk, last, block_n):
        c = start + tl.arange(0, block_n)
        inside_N = c < width
        inside = inside_M[:, None] & inside_N[None, :]
        at_both = both + at_M[:, None] * 2 * width + c[None, :]
        at_h = dh + at_M[:, None] * width + c[None, :]
        g_MN = tl.load(at_both, mask=inside, other=0.0).to(tl.float32)
        u_MN = tl.load(at_both + width, mask=inside, other=0.0).to(tl.float32)
        dh_MN = tl.load(at_h, mask=inside, other=0.0).to(tl.float32)
        inside_RN = inside_R[:, None] & inside_N[None, :]
        if is_updated:
            gate_NR = tl.load(gates + c[:, None] * ranks + r[None, :],
                              mask=inside_N[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
            up_NR = tl.load(ups + c[:, None] * ranks + r[None, :],
                            mask=inside_N[:, None] & inside_R[None, :], other=0.0)  # fmt: skip
            g_MN += tl.dot(gate_MR, tl.trans(gate_NR))
            u_MN += tl.dot(up_MR, tl.trans(up_NR))
        sig_MN = tl.sigmoid(g_MN)
        silu_MN = g_MN * sig_MN
        h_MN = silu_MN * u_MN
        if is_low:
            a_RN = tl.load(a + r[:, None] * width + c[None, :], mask=inside_RN, other=0.0)
            more_MN = tl.dot(dlow_MR, a_RN) * times
            h_MN *= times
            if is_dropped:
                kept_MN = kept(seed, salt, m, c, threshold)
                more_MN = tl.where(kept_MN, more_MN, 0.0)
                h_MN = tl.where(kept_MN, h_MN, 0.0)
            dh_MN += more_MN
        if is_kept:
            tl.store(at_h, h_MN, mask=inside)
        dgate_MN = (dh_MN * u_MN * sig_MN * (1.0 + g_MN * (1.0 - sig_MN))).to(narrow)
        dup_MN = (dh_MN * silu_MN).to(narrow)
        tl.store(at_both, dgate_MN, mask=inside)
        tl.store(at_both + width, dup_MN, mask=inside)
        if is_summed:
            dgate_MR += tl.dot(dgate_MN, gate_NR)
            dup_MR += tl.dot(dup_MN, up_NR)
    if is_summed:
        to_MR = dlow_back + chunk.to(tl.int64) * rows * 2 * ranks + at_MS
        tl.store(to_MR, dgate_MR, mask=inside_MR)
        tl.store(to_MR + ranks, dup_MR, mask=inside_MR)


class Gradients(NamedTuple):
    """Of `gated_low` by `both`; by `low_TS`, gate and up of `Ups`; and by A. `h_TF` is its first
    result made again, where it is wanted."""

    both_TF2: Tensor
    h_TF: Tensor | None
    low_TS: Tensor | None
    gate_FR: Tensor | None
    up_FR: Tensor | None
    a_RF: Tensor | None


def gated_low_back(
    both_TF2: Tensor, ups: Ups | None, a_RF: Tensor | None, dh_TF: Tensor,
    dlow_TR: Tensor | None, drop: Drop, *, again: bool = False,
) -> Gradients:  # fmt: skip
    """From those of `gated_low`'s two results; `both` and `dh` are overwritten. `again` says that
    the first result is wanted, too: not with an A, which wants another in its place."""
    assert not (again and a_RF is not None), "the down-projection is learned and has an adapter"
    rows, width = dh_TF.shape
    ranks, tile = _ranks(ups, a_RF), GATE_BACK
    tall, chunks, per_chunk = _shared(rows, width, tile)
    partial_CTS = dh_TF.new_empty(
        chunks if ups is not None else 0, rows, 2 * ranks, dtype=torch.float32
    )
    low, gates, uppers = (both_TF2, both_TF2, both_TF2) if ups is None else ups
    _gate_back[(tall, chunks)](
        both_TF2, low, gates, uppers, dh_TF if a_RF is None else a_RF, dh_TF,
        dh_TF if dlow_TR is None else dlow_TR, partial_CTS,
        rows, width, ranks, per_chunk, *drop.told(both_TF2),
        is_updated=ups is not None, is_low=a_RF is not None, is_dropped=drop.share > 0.0,
        is_summed=SUMMED and ups is not None, is_kept=again or a_RF is not None,
        block_m=tile.rows, block_n=tile.columns, block_r=rank_block(ranks),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    # Where `dh` lay is now the input of the down-projection; for an adapter dropped out and scaled.
    h_TF = dh_TF if again else None
    da_RF = None if dlow_TR is None else dlow_TR.T @ dh_TF
    if ups is None:
        return Gradients(both_TF2, h_TF, None, None, None, da_RF)
    (dgate_TF, dup_TF), (gate_TR, up_TR) = both_TF2.chunk(2, 1), ups.low_TS.chunk(2, 1)
    if SUMMED:
        dlow_TS = folded(partial_CTS, dh_TF.dtype)
    else:
        dlow_TS = torch.empty_like(ups.low_TS)
        torch.mm(dgate_TF, gates, out=dlow_TS[:, :ranks])
        torch.mm(dup_TF, uppers, out=dlow_TS[:, ranks:])
    return Gradients(both_TF2, h_TF, dlow_TS, dgate_TF.T @ gate_TR, dup_TF.T @ up_TR, da_RF)


def _shared(rows: int, width: int, tile: Blocks) -> tuple[int, int, int]:
    """Programs beside each other over the rows, over the columns, and columns of one of these."""
    tall = triton.cdiv(rows, tile.rows)
    chunks = max(1, min(PROGRAMS // max(1, tall), triton.cdiv(width, 4 * tile.columns)))
    per_chunk = triton.cdiv(triton.cdiv(width, chunks), tile.columns) * tile.columns
    return tall, triton.cdiv(width, per_chunk), per_chunk
