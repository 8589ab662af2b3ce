"""Triton kernels of a step: attention to rows that lie in pages, a share of a row a program.

Shapes: R rows, P pages, S tokens of a page, B pages that a row may have, H query heads, K key and
value heads, G = H / K, D head width, X shares of a row. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 512
"""About so many programs keep a card busy: rows are cut into shares until there are as many."""

_MOST_SHARES = 64


@triton.jit
def _look(q, keys, values, table, lengths, part, scale_out, scale, q_stride, table_stride,
          heads, key_heads, width, group: tl.constexpr, page: tl.constexpr, shares: tl.constexpr,
          block_g: tl.constexpr, block_d: tl.constexpr):  # fmt: skip
    row, head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    pages = (length + page - 1) // page
    first = pages * share // shares
    last = pages * (share + 1) // shares
    g = tl.arange(0, block_g)
    d = tl.arange(0, block_d)
    s = tl.arange(0, page)
    inside_GD = (g < group)[:, None] & (d < width)[None, :]
    inside_SD = (s >= 0)[:, None] & (d < width)[None, :]
    q_at = q + row.to(tl.int64) * q_stride + (head * group + g)[:, None] * width + d[None, :]
    q_GD = tl.load(q_at, mask=inside_GD, other=0.0)
    most_G = tl.full((block_g,), -float("inf"), tl.float32)
    sum_G = tl.zeros((block_g,), tl.float32)
    o_GD = tl.zeros((block_g, block_d), tl.float32)
    for block in range(first, last):
        here = tl.load(table + row.to(tl.int64) * table_stride + block).to(tl.int64)
        at_SD = ((here * page + s[:, None]) * key_heads + head) * width + d[None, :]
        k_SD = tl.load(keys + at_SD, mask=inside_SD, other=0.0)
        # What overflowed in an earlier answer may lie beyond this one's last token, and 0 times NaN
        # is NaN.
        there_S = block * page + s < length
        v_SD = tl.load(values + at_SD, mask=inside_SD & there_S[:, None], other=0.0)
        scores_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * scale
        scores_GS = tl.where(there_S[None, :], scores_GS, -float("inf"))
        new_G = tl.maximum(most_G, tl.max(scores_GS, 1))
        weights_GS = tl.exp(scores_GS - new_G[:, None])
        kept_G = tl.exp(most_G - new_G)
        sum_G = sum_G * kept_G + tl.sum(weights_GS, 1)
        added = tl.dot(weights_GS.to(v_SD.dtype), v_SD, input_precision="ieee")
        o_GD = o_GD * kept_G[:, None] + added
        most_G = new_G
    at = (row.to(tl.int64) * heads + head * group + g) * shares + share
    if shares == 1:
        to = part + (row.to(tl.int64) * heads + head * group + g)[:, None] * width + d[None, :]
        tl.store(to, o_GD / sum_G[:, None], mask=inside_GD)
    else:
        tl.store(part + at[:, None] * width + d[None, :], o_GD, mask=inside_GD)
        tl.store(scale_out + at * 2, most_G, mask=g < group)
        tl.store(scale_out + at * 2 + 1, sum_G, mask=g < group)


@triton.jit
def _join(part, scales, o, width, shares: tl.constexpr, block_x: tl.constexpr,
          block_d: tl.constexpr):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    x, d = tl.arange(0, block_x), tl.arange(0, block_d)
    at = head * shares + x
    most_X = tl.load(scales + at * 2, mask=x < shares, other=-float("inf"))
    sum_X = tl.load(scales + at * 2 + 1, mask=x < shares, other=0.0)
    weight_X = tl.exp(most_X - tl.max(most_X, 0))
    inside = (x < shares)[:, None] & (d < width)[None, :]
    part_XD = tl.load(part + at[:, None] * width + d[None, :], mask=inside, other=0.0)
    o_D = tl.sum(part_XD * weight_X[:, None], 0) / tl.sum(sum_X * weight_X, 0)
    tl.store(o + head * width + d, o_D, mask=d < width)


def attend_pages(
    q_RHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, table_RB: Tensor, lengths_R: Tensor
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of one query a row, over the `lengths_R` tokens that lie in the
    row's pages: [R, H, D], computed in fp32. A row of no tokens gives NaN, which nobody reads."""
    rows, heads, width = q_RHD.shape
    _, page, key_heads, _ = keys_PSKD.shape
    group = heads // key_heads
    q_RHD = q_RHD if q_RHD.stride()[1:] == (width, 1) else q_RHD.contiguous()
    shares = min(_MOST_SHARES, max(1, _PROGRAMS // (rows * key_heads)))
    block_d = max(16, triton.next_power_of_2(width))
    o_RHD = q_RHD.new_empty(rows, heads, width)
    part, scales = o_RHD, o_RHD
    if shares > 1:
        part = torch.empty(rows, heads, shares, width, dtype=torch.float32, device=q_RHD.device)
        scales = torch.empty(rows, heads, shares, 2, dtype=torch.float32, device=q_RHD.device)
    _look[(rows, key_heads, shares)](
        q_RHD, keys_PSKD, values_PSKD, table_RB, lengths_R, part, scales, width**-0.5,
        q_RHD.stride(0), table_RB.stride(0), heads, key_heads, width,
        group=group, page=page, shares=shares, block_g=max(16, triton.next_power_of_2(group)),
        block_d=block_d,
    )  # fmt: skip
    if shares > 1:
        blocks = triton.next_power_of_2(shares)
        _join[(rows * heads,)](
            part, scales, o_RHD, width, shares=shares, block_x=blocks, block_d=block_d
        )
    return o_RHD
