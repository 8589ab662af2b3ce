"""Triton kernels that put rows of numbers into FP8, for `model.fp8`.

A row is read once where a program's registers hold it, else twice, the second time from the cache.

Shapes: T rows, I numbers of one, or as many of its first as a power of two, J those left of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finesight.model.kernels.elementwise import quick_gelu_of

_IN_REGISTERS = 16384
"""Longest row that one program holds."""

_PIECE = 4096
"""Numbers of a longer one that are read at once."""


@triton.jit
def factor_and_scale(largest, most, least):
    """What rows whose largest magnitudes these are multiplied by to be codes, and their scales."""
    largest = tl.maximum(largest, least)
    # Quotients are rounded as torch rounds them: the codes are the same.
    return tl.div_rn(most, largest), tl.div_rn(largest, most)


@triton.jit
def _read(x, by, at_I, inside_I, is_scaled: tl.constexpr, is_gelu: tl.constexpr):
    x_I = tl.load(x + at_I, mask=inside_I, other=0.0).to(tl.float32)
    if is_gelu:
        x_I = quick_gelu_of(x_I, x.dtype.element_ty).to(tl.float32)
    if is_scaled:
        x_I *= tl.load(by + at_I, mask=inside_I, other=0.0)
    return x_I


@triton.jit
def _quantise(x, by, codes, scales, inputs, stride, most, least, is_scaled: tl.constexpr,
              is_gelu: tl.constexpr, is_whole: tl.constexpr, block_i: tl.constexpr,
              block_j: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * inputs
    i = tl.arange(0, block_i)
    kind = codes.dtype.element_ty
    if is_whole:
        x_I = _read(x, by, i, i < inputs, is_scaled, is_gelu)
        largest = tl.max(tl.abs(x_I), 0)
        if block_j > 0:
            j = block_i + tl.arange(0, block_j)
            x_J = _read(x, by, j, j < inputs, is_scaled, is_gelu)
            largest = tl.maximum(largest, tl.max(tl.abs(x_J), 0))
        factor, scale = factor_and_scale(largest, most, least)
        tl.store(codes + i, (x_I * factor).to(kind), mask=i < inputs)
        if block_j > 0:
            tl.store(codes + j, (x_J * factor).to(kind), mask=j < inputs)
    else:
        largest_I = tl.zeros((block_i,), tl.float32)
        for start in range(0, inputs, block_i):
            at_I = start + i
            x_I = _read(x, by, at_I, at_I < inputs, is_scaled, is_gelu)
            largest_I = tl.maximum(largest_I, tl.abs(x_I))
        factor, scale = factor_and_scale(tl.max(largest_I, 0), most, least)
        for start in range(0, inputs, block_i):
            at_I = start + i
            x_I = _read(x, by, at_I, at_I < inputs, is_scaled, is_gelu)
            tl.store(codes + at_I, (x_I * factor).to(kind), mask=at_I < inputs)
    tl.store(scales + row, scale)


def quantised(
    x_TI: Tensor, by_I: Tensor | None, kind: torch.dtype, most: float, least: float,
    *, gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes [T, I] of x by_I, or of quick_gelu(x) in its own type, and scales [T, 1] in fp32; a
    row's largest magnitude, or `least` where that is less, has the code `most`."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, inputs = x_TI.shape
    codes_TI = torch.empty(rows, inputs, dtype=kind, device=x_TI.device)
    scales_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    is_whole = inputs <= _IN_REGISTERS
    # Two powers of two: padded to a single one, most rows would be computed up to twice.
    largest = 1 << (inputs.bit_length() - 1)
    first = largest if is_whole else _PIECE
    left = inputs - first if is_whole else 0
    _quantise[(rows,)](
        x_TI, x_TI if by_I is None else by_I, codes_TI, scales_T1, inputs, x_TI.stride(0), most,
        least, is_scaled=by_I is not None, is_gelu=gelu, is_whole=is_whole, block_i=first,
        block_j=triton.next_power_of_2(left) if left else 0,
        num_warps=min(32, max(2, largest // 1024)),
    )  # fmt: skip
    return codes_TI, scales_T1
