"""What low-rank adapters need beside products: the gradient by a dropped input, and copies of what
was learned.

Sums are fp32. Shapes: T rows (tokens), I inputs, S ranks of a group end to end, P matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.drop import Drop, kept
from finesight.model.kernels.programs import Ptr, rank_block
from finesight.model.kernels.sizes import Blocks

LOWERED_BACK = Blocks(64, 64, 4, 2)
"""What was quickest on an H200."""


@triton.jit(do_not_specialize=["rows", "salt", "threshold"])
def _lowered_back(dn: Ptr, dlow: Ptr, a: Ptr, dx: Ptr, rows: int, width: int, ranks: int,
                  dn_stride: int, dlow_stride: int, seed: Ptr, salt: int, threshold: int,
                  times: float, is_dropped: tl.constexpr, block_m: tl.constexpr,
                  block_n: tl.constexpr, block_s: tl.constexpr) -> None:  # fmt: skip
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    c = tl.program_id(1) * block_n + tl.arange(0, block_n)
    inside_M, inside_N, at_M = m < rows, c < width, m.to(tl.int64)
    inside = inside_M[:, None] & inside_N[None, :]
    more_MN = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, ranks, block_s):
        s = start + tl.arange(0, block_s)
        inside_S = s < ranks
        dlow_MS = tl.load(dlow + at_M[:, None] * dlow_stride + s[None, :],
                          mask=inside_M[:, None] & inside_S[None, :], other=0.0)  # fmt: skip
        a_SN = tl.load(a + s[:, None] * width + c[None, :],
                       mask=inside_S[:, None] & inside_N[None, :], other=0.0)  # fmt: skip
        more_MN += tl.dot(dlow_MS, a_SN)
    more_MN *= times
    if is_dropped:
        more_MN = tl.where(kept(seed, salt, m, c, threshold), more_MN, 0.0)
    dn_MN = tl.load(dn + at_M[:, None] * dn_stride + c[None, :], mask=inside, other=0.0)
    to_MN = dx + at_M[:, None] * width + c[None, :]
    tl.store(to_MN, more_MN + dn_MN.to(tl.float32), mask=inside)


def lowered_back(dn_TI: Tensor, dlow_TS: Tensor, a_SI: Tensor, drop: Drop) -> Tensor:
    """`dn` plus the gradient by `x` of `drop.times` times dropped(x) A^T, from that of the latter:
    in a piece of its own."""
    (rows, width), ranks, tile = dn_TI.shape, len(a_SI), LOWERED_BACK
    dx_TI = dn_TI.new_empty(rows, width)
    _lowered_back[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns))](
        dn_TI, dlow_TS, a_SI, dx_TI, rows, width, ranks, dn_TI.stride(0), dlow_TS.stride(0),
        *drop.told(dn_TI), is_dropped=drop.share > 0.0, block_m=tile.rows,
        block_n=tile.columns, block_s=min(64, rank_block(ranks)), num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    return dx_TI


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
