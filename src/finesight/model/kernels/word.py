"""Triton kernels that multiply a row with a matrix of four bits a number.

A thread reads words of eight numbers each, and what each of the eight is multiplied by lies in an
array of its own: so a word and its factors are in the same thread, and nothing is sent between
threads but sums. A kernel before the product lays the row out that way, and norms it meanwhile.

Shapes: I inputs, O outputs, N = I / 8 words of a row, J words that a program reads at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.words import Norm, Words

_AT_ONCE = 128
"""Words that one program lays out."""


@triton.jit
def _lay_out(x, norm, factors, sums, inputs, eps, is_normed: tl.constexpr, halves: tl.constexpr,
             group_words: tl.constexpr, block_j: tl.constexpr):  # fmt: skip
    words = inputs // 8
    scale = 1.0
    if is_normed:
        square = tl.zeros((1024,), tl.float32)
        for start in range(0, inputs, 1024):
            i = start + tl.arange(0, 1024)
            some = tl.load(x + i, mask=i < inputs, other=0.0).to(tl.float32)
            square += some * some
        scale = 1.0 / tl.sqrt(tl.sum(square, 0) / inputs + eps)
    j = tl.program_id(0) * block_j + tl.arange(0, block_j)
    k = tl.arange(0, 8)
    if halves:
        at = (k % 4 + k // 4 * (inputs // 2))[:, None] + 4 * j[None, :]
    else:
        at = k[:, None] + 8 * j[None, :]
    inside = (k >= 0)[:, None] & (j < words)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if is_normed:
        value = value * scale * tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    tl.store(factors + k[:, None] * words + j[None, :], value, mask=inside)
    if halves:
        groups: tl.constexpr = block_j // group_words
        summed = tl.sum(tl.sum(tl.reshape(value, (2, 4, groups, group_words)), 3), 1)
        g, h = tl.program_id(0) * groups + tl.arange(0, groups), tl.arange(0, 2)
        to = sums + h[:, None] * (words // group_words) + g[None, :]
        tl.store(to, summed, mask=(h >= 0)[:, None] & (g < words // group_words)[None, :])


def laid_out(x_1I: Tensor, norm: Norm | None, group: int | None) -> Words:
    """A row, normed where there is a norm, for a matrix whose words hold neighbours or, where
    `group` inputs share a scale and a zero, four inputs of its first half and four of its second.
    """
    inputs = x_1I.shape[1]
    factors_8N = torch.empty(8, inputs // 8, dtype=torch.float32, device=x_1I.device)
    halves = group is not None
    sums_G = factors_8N.new_empty(inputs // group) if group is not None else factors_8N
    _lay_out[(triton.cdiv(inputs // 8, _AT_ONCE),)](
        x_1I.contiguous(), x_1I if norm is None else norm.weight_I, factors_8N, sums_G, inputs,
        0.0 if norm is None else norm.eps, is_normed=norm is not None, halves=halves,
        group_words=1 if group is None else group // 4, block_j=_AT_ONCE,
    )  # fmt: skip
    return Words(factors_8N, sums_G if halves else None)


@triton.jit
def _above_128(words, shift: tl.constexpr):
    """128 + the four bits that lie `shift` below the sixteenth, as a number in fp32: these are the
    bits of 128 with the four as its last ones before the point. Exact, and without a conversion."""
    if shift > 0:
        words = words << shift
    if shift < 0:
        words = words >> -shift
    return ((words & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _finish(y_O, bias, added, y, o, inside_O, is_biased: tl.constexpr, is_added: tl.constexpr):
    if is_biased:
        y_O += tl.load(bias + o, mask=inside_O, other=0.0).to(tl.float32)
    if is_added:
        y_O += tl.load(added + o, mask=inside_O, other=0.0).to(tl.float32)
    tl.store(y + o, y_O.to(y.dtype.element_ty), mask=inside_O)


@triton.jit
def _int4(factors, sums, codes, scales, zeros, bias, added, y, outputs, words,
          is_biased: tl.constexpr, is_added: tl.constexpr, group_words: tl.constexpr,
          block_o: tl.constexpr, block_j: tl.constexpr):  # fmt: skip
    # The low bits of a word's bytes are inputs of the first half, the high ones of the second. What
    # numbers are above their codes by is taken off with the group's zero.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    inside_O = o < outputs
    groups: tl.constexpr = block_j // group_words
    half = words // group_words
    row = codes + o.to(tl.int64)[:, None] * words
    total_OG = tl.zeros((block_o, groups), tl.float32)
    for start in range(0, words, block_j):
        j = start + tl.arange(0, block_j)
        there = (j < words)[None, :]
        bits = tl.load(row + j[None, :], mask=inside_O[:, None] & there, other=0)
        x = factors + j[None, :]
        first = tl.zeros((block_o, block_j), tl.float32)
        for byte in tl.static_range(4):
            first += _above_128(bits, 16 - 8 * byte) * tl.load(x, mask=there, other=0.0)
            x += words
        second = tl.zeros((block_o, block_j), tl.float32)
        for byte in tl.static_range(4):
            second += _above_128(bits, 12 - 8 * byte) * tl.load(x, mask=there, other=0.0)
            x += words
        g = start // group_words + tl.arange(0, groups)
        inside = inside_O[:, None] & (g < half)[None, :]
        at = o[:, None] * (2 * half) + g[None, :]
        for part in tl.static_range(2):
            own = first if part == 0 else second
            own_OG = tl.sum(tl.reshape(own, (block_o, groups, group_words)), 2)
            scale = tl.load(scales + at + part * half, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros + at + part * half, mask=inside, other=0).to(tl.float32)
            sum_1G = tl.load(sums + part * half + g[None, :], mask=(g < half)[None, :], other=0.0)
            total_OG += (own_OG - (zero + 128.0) * sum_1G) * scale
    _finish(tl.sum(total_OG, 1), bias, added, y, o, inside_O, is_biased, is_added)


def int4_row(
    x: Words, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, group: int, y_O: Tensor,
    bias_O: Tensor | None, added_O: Tensor | None,
) -> None:  # fmt: skip
    """x W^T + bias + added into `y_O`, for W as in `model.int4`, its columns in order."""
    assert x.sums_G is not None, "a row without sums"
    outputs, words = len(codes), codes.shape[1] // 4
    # What was quickest on an H200 (benchmarks/few_bits.py).
    block_o, block_j = (8, 128) if outputs >= 65536 else (4, 512)
    _int4[(triton.cdiv(outputs, block_o),)](
        x.factors_8N, x.sums_G, codes.view(torch.int32), scales_OG, zeros_OG,
        y_O if bias_O is None else bias_O, y_O if added_O is None else added_O, y_O,
        outputs, words, is_biased=bias_O is not None, is_added=added_O is not None,
        group_words=group // 4, block_o=block_o, block_j=block_j, num_warps=block_j // 128,
    )  # fmt: skip


@triton.jit
def own_level(values, shuffled: tl.constexpr):
    """Of 16 levels the one that this thread keeps for `_level`."""
    value = 0.0
    if shuffled:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [0], dtype=tl.int32, is_pure=True, pack=1
        )
        value = tl.load(values + (lane & 15))
    return value


@triton.jit
def level(words, value, values, shift: tl.constexpr, shuffled: tl.constexpr):
    """What the four bits from `shift` on stand for.

    Each thread of a warp keeps one of the 16 levels, and fetches the one it wants from another: in
    a table in memory, every number would cost an address. Only the interpreter has no warps.
    """
    if shuffled:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=r,r,r",
            [value, words >> shift], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.load(values + ((words >> shift) & 15))


@triton.jit
def _nf4(factors, codes, scales, coarse, mean, scale_levels, values, bias, added, y, outputs, words,
         is_biased: tl.constexpr, is_added: tl.constexpr, shuffled: tl.constexpr,
         block_o: tl.constexpr, block_j: tl.constexpr):  # fmt: skip
    # A byte holds two neighbours, the first in its high bits; eight words share a scale.
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    inside_O = o < outputs
    blocks: tl.constexpr = block_j // 8
    row_blocks = words // 8
    offset = tl.load(mean)
    value = own_level(values, shuffled)
    row = codes + o.to(tl.int64)[:, None] * words
    total_OB = tl.zeros((block_o, blocks), tl.float32)
    for start in range(0, words, block_j):
        j = start + tl.arange(0, block_j)
        there = (j < words)[None, :]
        bits = tl.load(row + j[None, :], mask=inside_O[:, None] & there, other=0)
        own = tl.zeros((block_o, block_j), tl.float32)
        x = factors + j[None, :]
        for byte in tl.static_range(4):
            even, odd = tl.load(x, mask=there, other=0.0), tl.load(x + words, mask=there, other=0.0)
            own += level(bits, value, values, 8 * byte + 4, shuffled) * even
            own += level(bits, value, values, 8 * byte, shuffled) * odd
            x += 2 * words
        own_OB = tl.sum(tl.reshape(own, (block_o, blocks, 8)), 2)
        b = start // 8 + tl.arange(0, blocks)
        inside = inside_O[:, None] & (b < row_blocks)[None, :]
        at = o[:, None] * row_blocks + b[None, :]
        scale = tl.load(scales + at, mask=inside, other=0).to(tl.int32)
        share = tl.load(coarse + at // 256, mask=inside, other=0.0)
        total_OB += own_OB * (tl.load(scale_levels + scale) * share + offset)
    _finish(tl.sum(total_OB, 1), bias, added, y, o, inside_O, is_biased, is_added)


def nf4_row(
    x: Words, codes: Tensor, scales_B: Tensor, coarse: Tensor, mean: Tensor,
    levels: tuple[Tensor, Tensor], y_O: Tensor, bias_O: Tensor | None, added_O: Tensor | None,
) -> None:  # fmt: skip
    """x W^T + bias + added into `y_O`, for W as in `model.nf4`, whose rows are whole blocks;
    `levels` are those of scales and of numbers."""
    outputs, words = len(y_O), x.factors_8N.shape[1]
    # What was quickest on an H200 (benchmarks/few_bits.py).
    block_o, block_j, warps = (8, 512, 4) if words <= 1024 else (4, 512, 2)
    if outputs >= 65536:
        block_o, block_j, warps = 8, 128, 1
    _nf4[(triton.cdiv(outputs, block_o),)](
        x.factors_8N, codes.flatten().view(torch.int32), scales_B, coarse, mean, *levels,
        y_O if bias_O is None else bias_O, y_O if added_O is None else added_O, y_O,
        outputs, words, is_biased=bias_O is not None, is_added=added_O is not None,
        shuffled=y_O.is_cuda, block_o=block_o, block_j=block_j, num_warps=warps,
    )  # fmt: skip
