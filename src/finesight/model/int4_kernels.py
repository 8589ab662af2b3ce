"""Triton kernels for the matrices of `model.int4`: a product with few rows, and the whole matrix.

Shapes: R rows, O outputs, I inputs, G groups of inputs. A byte of `codes` [O, I / 2] holds an input
of the first half in its low bits and that of the second half in its high ones. Imported only where
Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Bytes of a row that one program unpacks."""

_OUTPUTS, _GROUPS = 4, 4
"""Outputs of one program of the product, and groups of each half that it reads at once: 16 bytes
for each of its threads."""


@triton.jit
def _unpack(codes, scales, zeros, order, w, half, groups, group, block: tl.constexpr):
    o = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < half
    pairs = tl.load(codes + o * half + at, mask=inside, other=0).to(tl.int32)
    for second in tl.static_range(2):
        i = at + second * half
        place = o * groups + i // group
        scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
        value = (((pairs >> (4 * second)) & 15) - zero).to(tl.float32) * scale
        to = tl.load(order + i, mask=inside, other=0)
        tl.store(w + o * 2 * half + to, value.to(w.dtype.element_ty), mask=inside)


def unpacked(
    codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, order_I: Tensor, group: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix [O, I]: scale (code - zero), rounded once; column n of the codes goes to
    `order_I[n]`."""
    outputs, half = codes.shape
    w_OI = torch.empty(outputs, 2 * half, dtype=dtype, device=codes.device)
    _unpack[(outputs, triton.cdiv(half, _BLOCK))](
        codes, scales_OG, zeros_OG, order_I, w_OI, half, scales_OG.shape[1], group, block=_BLOCK
    )
    return w_OI


@triton.jit
def _product(x, codes, scales, zeros, bias, y, outputs, half, group: tl.constexpr,
             biased: tl.constexpr, block_o: tl.constexpr, block_g: tl.constexpr):  # fmt: skip
    # Rows first: programs of the same outputs follow each other, and find the codes in the cache.
    r = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * block_o + tl.arange(0, block_o)
    groups = half // group
    total = tl.zeros((block_o, block_g, group), tl.float32)
    for start in range(0, groups, block_g):
        g = start + tl.arange(0, block_g)
        inside_OG = (o < outputs)[:, None] & (g < groups)[None, :]
        i = g[:, None] * group + tl.arange(0, group)[None, :]
        at = (o * half)[:, None, None] + i[None, :, :]
        pairs = tl.load(codes + at, mask=inside_OG[:, :, None], other=0).to(tl.int32)
        for second in tl.static_range(2):
            x_GE = tl.load(x + (2 * r + second) * half + i, mask=(g < groups)[:, None], other=0.0)
            place = (o * 2 * groups)[:, None] + (second * groups + g)[None, :]
            scale = tl.load(scales + place, mask=inside_OG, other=0.0).to(tl.float32)
            zero = tl.load(zeros + place, mask=inside_OG, other=0).to(tl.float32)
            # These are the bits of 2^23 + code: a whole number becomes a float without the
            # conversion, of which a card does few at a time. The difference is exact.
            code = (((pairs >> (4 * second)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)
            value = (code - (zero + 8388608.0)[:, :, None]) * scale[:, :, None]
            total += value * x_GE.to(tl.float32)[None, :, :]
    sums = tl.sum(tl.sum(total, axis=2), axis=1)
    if biased:
        sums += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    tl.store(y + r * outputs + o, sums.to(y.dtype.element_ty), mask=o < outputs)


def product(
    x_RI: Tensor, codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, bias: Tensor | None,
    group: int,
) -> Tensor:  # fmt: skip
    """x W^T + bias [R, O], added up in fp32; each half of a row holds whole groups, of a power of
    two inputs."""
    x_RI = x_RI.contiguous()
    outputs, half = codes.shape
    y_RO = x_RI.new_empty(len(x_RI), outputs)
    _product[(len(x_RI), triton.cdiv(outputs, _OUTPUTS))](
        x_RI, codes, scales_OG, zeros_OG, x_RI if bias is None else bias, y_RO, outputs, half,
        group=group, biased=bias is not None, block_o=_OUTPUTS, block_g=_GROUPS,
    )  # fmt: skip
    return y_RO
