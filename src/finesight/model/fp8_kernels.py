"""A Triton kernel that puts rows of numbers into FP8, for `model.fp8`.

A row is read once where a program's registers hold it, else twice, the second time from the cache.

Shapes: T rows, I numbers of one. Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_IN_REGISTERS = 16384
"""Longest row that one program holds."""

_PIECE = 4096
"""Numbers of a longer one that are read at once."""


@triton.jit
def _read(x, by, at_I, inside_I, is_scaled: tl.constexpr):
    x_I = tl.load(x + at_I, mask=inside_I, other=0.0).to(tl.float32)
    if is_scaled:
        x_I *= tl.load(by + at_I, mask=inside_I, other=0.0)
    return x_I


@triton.jit
def _quantise(x, by, codes, scales, inputs, stride, most, least, is_scaled: tl.constexpr,
              is_whole: tl.constexpr, block_i: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * inputs
    i = tl.arange(0, block_i)
    kind = codes.dtype.element_ty
    # Quotients are rounded as torch rounds them: the codes are the same.
    if is_whole:
        x_I = _read(x, by, i, i < inputs, is_scaled)
        largest = tl.maximum(tl.max(tl.abs(x_I), 0), least)
        tl.store(codes + i, (x_I * tl.div_rn(most, largest)).to(kind), mask=i < inputs)
    else:
        largest_I = tl.zeros((block_i,), tl.float32)
        for start in range(0, inputs, block_i):
            at_I = start + i
            x_I = _read(x, by, at_I, at_I < inputs, is_scaled)
            largest_I = tl.maximum(largest_I, tl.abs(x_I))
        largest = tl.maximum(tl.max(largest_I, 0), least)
        inverse = tl.div_rn(most, largest)
        for start in range(0, inputs, block_i):
            at_I = start + i
            x_I = _read(x, by, at_I, at_I < inputs, is_scaled)
            tl.store(codes + at_I, (x_I * inverse).to(kind), mask=at_I < inputs)
    tl.store(scales + row, tl.div_rn(largest, most))


def quantised(
    x_TI: Tensor, by_I: Tensor | None, kind: torch.dtype, most: float, least: float
) -> tuple[Tensor, Tensor]:
    """Codes [T, I] of x by_I and scales [T, 1] in fp32; a row's largest magnitude, or `least` where
    that is less, has the code `most`."""
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, inputs = x_TI.shape
    codes_TI = torch.empty(rows, inputs, dtype=kind, device=x_TI.device)
    scales_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    is_whole = inputs <= _IN_REGISTERS
    block = triton.next_power_of_2(inputs) if is_whole else _PIECE
    _quantise[(rows,)](
        x_TI, x_TI if by_I is None else by_I, codes_TI, scales_T1, inputs, x_TI.stride(0), most,
        least, is_scaled=by_I is not None, is_whole=is_whole, block_i=block,
        num_warps=min(16, max(2, block // 1024)),
    )  # fmt: skip
    return codes_TI, scales_T1
