"""Triton kernel that dequantizes the matrices of `model.quant.int4`.

Shapes: O outputs, I inputs, G groups of inputs. A byte of `codes` [O, I / 2] holds an element of
the first half in its low bits and one of the second half in its high bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Number of bytes of a row per program."""


@triton.jit
def _dequantize_int4_kernel(
    codes, scales, zeros, permutation, w, half, num_groups, group_size, block: tl.constexpr
):
    o = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * block + tl.arange(0, block)
    mask = offsets < half
    pairs = tl.load(codes + o * half + offsets, mask=mask, other=0).to(tl.int32)
    for half_index in tl.static_range(2):
        i = offsets + half_index * half
        group_offsets = o * num_groups + i // group_size
        scale = tl.load(scales + group_offsets, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group_offsets, mask=mask, other=0).to(tl.int32)
        value = (((pairs >> (4 * half_index)) & 15) - zero).to(tl.float32) * scale
        columns = tl.load(permutation + i, mask=mask, other=0)
        tl.store(w + o * 2 * half + columns, value.to(w.dtype.element_ty), mask=mask)


def dequantize_int4(
    codes: Tensor, scales_OG: Tensor, zeros_OG: Tensor, permutation_I: Tensor, group_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the dequantized matrix [O, I], scale * (code - zero), rounded once.

    Column n of the codes is written to column `permutation_I[n]`.
    """
    out_features, half = codes.shape
    w_OI = torch.empty(out_features, 2 * half, dtype=dtype, device=codes.device)
    _dequantize_int4_kernel[(out_features, triton.cdiv(half, _BLOCK))](
        codes,
        scales_OG,
        zeros_OG,
        permutation_I,
        w_OI,
        half,
        scales_OG.shape[1],
        group_size,
        block=_BLOCK,
    )
    return w_OI
