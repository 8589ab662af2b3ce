"""Triton kernels that quantize rows to FP8, for `model.quant.fp8`.

A row is read once if it fits the registers of a program; otherwise it is read again from the cache.

Shapes: T rows, I elements of a row or of its power-of-two head, J elements of the remaining tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.kernels.elementwise import quick_gelu_rounded
from finesight.model.kernels.runtime import jit, tl, triton

_MAX_REGISTER_ROW = 16384
"""Maximum number of elements of a row that fits the registers of a program."""

_CHUNK_SIZE = 4096
"""Number of elements of a longer row that are read at once."""


@jit
def fp8_factor_and_scale(amax, max_code, min_amax):
    """Return the FP8 quantization factor and the scale of rows.

    `amax` is the largest magnitude of each row; `min_amax` is its lower bound.
    """
    amax = tl.maximum(amax, min_amax)
    # The division is rounded as in torch, so that the codes are equal.
    return tl.div_rn(max_code, amax), tl.div_rn(amax, max_code)


@jit
def _load_row(x, column_scales, offsets_I, mask_I, is_scaled: tl.constexpr, is_gelu: tl.constexpr):
    x_I = tl.load(x + offsets_I, mask=mask_I, other=0.0).to(tl.float32)
    if is_gelu:
        x_I = quick_gelu_rounded(x_I, x.dtype.element_ty).to(tl.float32)
    if is_scaled:
        x_I *= tl.load(column_scales + offsets_I, mask=mask_I, other=0.0)
    return x_I


@jit
def _quantize_kernel(
    x, column_scales, codes, scales, num_columns, stride, max_code, min_amax,
    is_scaled: tl.constexpr, is_gelu: tl.constexpr, fits_registers: tl.constexpr,
    block_i: tl.constexpr, block_j: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * num_columns
    i = tl.arange(0, block_i)
    dtype = codes.dtype.element_ty
    if fits_registers:
        x_I = _load_row(x, column_scales, i, i < num_columns, is_scaled, is_gelu)
        amax = tl.max(tl.abs(x_I), 0)
        if block_j > 0:
            j = block_i + tl.arange(0, block_j)
            x_J = _load_row(x, column_scales, j, j < num_columns, is_scaled, is_gelu)
            amax = tl.maximum(amax, tl.max(tl.abs(x_J), 0))
        factor, scale = fp8_factor_and_scale(amax, max_code, min_amax)
        tl.store(codes + i, (x_I * factor).to(dtype), mask=i < num_columns)
        if block_j > 0:
            tl.store(codes + j, (x_J * factor).to(dtype), mask=j < num_columns)
    else:
        amax_I = tl.zeros((block_i,), tl.float32)
        for start in range(0, num_columns, block_i):
            offsets_I = start + i
            x_I = _load_row(
                x, column_scales, offsets_I, offsets_I < num_columns, is_scaled, is_gelu
            )
            amax_I = tl.maximum(amax_I, tl.abs(x_I))
        factor, scale = fp8_factor_and_scale(tl.max(amax_I, 0), max_code, min_amax)
        for start in range(0, num_columns, block_i):
            offsets_I = start + i
            x_I = _load_row(
                x, column_scales, offsets_I, offsets_I < num_columns, is_scaled, is_gelu
            )
            tl.store(codes + offsets_I, (x_I * factor).to(dtype), mask=offsets_I < num_columns)
    tl.store(scales + row, scale)


def quantize_fp8_rows(
    x_TI: Tensor, column_scales_I: Tensor | None, dtype: torch.dtype, max_code: float,
    min_amax: float, *, gelu: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Quantize rows to FP8, with one scale per row.

    With `column_scales_I` the columns are scaled first; with `gelu` quick GELU is applied first,
    rounded to the dtype of `x_TI`. The largest magnitude of a row, at least `min_amax`, has the
    code `max_code`.
    """
    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, num_columns = x_TI.shape
    codes_TI = torch.empty(rows, num_columns, dtype=dtype, device=x_TI.device)
    scales_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    fits_registers = num_columns <= _MAX_REGISTER_ROW
    # Two power-of-two blocks: a single one would compute up to twice the elements of most rows.
    largest_block = 1 << (num_columns.bit_length() - 1)
    first_block = largest_block if fits_registers else _CHUNK_SIZE
    remainder = num_columns - first_block if fits_registers else 0
    _quantize_kernel[(rows,)](
        x_TI, x_TI if column_scales_I is None else column_scales_I, codes_TI, scales_T1,
        num_columns, x_TI.stride(0), max_code, min_amax, is_scaled=column_scales_I is not None,
        is_gelu=gelu, fits_registers=fits_registers, block_i=first_block,
        block_j=triton.next_power_of_2(remainder) if remainder else 0,
        num_warps=min(32, max(2, largest_block // 1024)),
    )  # fmt: skip
    return codes_TI, scales_T1
