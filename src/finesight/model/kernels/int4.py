"""A Triton kernel for the matrices of `model.int4`: the whole matrix.

Shapes: O outputs, I inputs, G groups of inputs. A byte of `codes` [O, I / 2] holds an input
of the first half in its low bits and that of the second half in its high ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Bytes of a row that one program unpacks."""


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
