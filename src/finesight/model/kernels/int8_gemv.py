"""Triton GEMV kernels for 8-bit matrices (INT8 and FP8).

A thread reads 16 bytes of several outputs at once, converts them in registers and accumulates in
fp32; threads exchange only the final sums. Programs that compute the same outputs for several rows
are adjacent in the grid and share the cached codes.

Shapes: R rows, O outputs, T chunks of 16 bytes, E bytes of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class MatmulTiling(NamedTuple):
    """Tiling of a matmul with a quantized matrix.

    Attributes:
        block_outputs: Outputs per program.
        block_chunks: Chunks or groups of inputs per step.
        num_warps: Warps per program.
    """

    block_outputs: int
    block_chunks: int
    num_warps: int


def choose_gemv_tiling(out_features: int, row_bytes: int) -> MatmulTiling:
    """Choose the tiling of a GEMV by output count and bytes per output."""
    # With few outputs SMs are idle unless several warps share a row.
    warps = 4 if out_features <= 6144 and row_bytes >= 2048 else 2 if out_features <= 6144 else 1
    return MatmulTiling(block_outputs=4, block_chunks=32 * warps, num_warps=warps)


@triton.jit
def _store_sums(
    total_OTE, bias, y, first, out_features, has_bias: tl.constexpr, block_o: tl.constexpr
):
    sums_O = tl.sum(tl.sum(total_OTE, axis=2), axis=1)
    o = first + tl.arange(0, block_o)
    if has_bias:
        sums_O += tl.load(bias + o, mask=o < out_features, other=0.0).to(tl.float32)
    out_ptrs = y + tl.program_id(0).to(tl.int64) * out_features + o
    tl.store(out_ptrs, sums_O.to(y.dtype.element_ty), mask=o < out_features)


@triton.jit
def _rowwise_gemv_kernel(
    x, codes, scales, bias, y, out_features, in_features, has_bias: tl.constexpr,
    block_o: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    x += tl.program_id(0).to(tl.int64) * in_features
    first = tl.program_id(1) * block_o
    o, e = tl.arange(0, block_o), tl.arange(0, 16)
    num_chunks = in_features // 16
    codes += first.to(tl.int64) * in_features
    total_OTE = tl.zeros((block_o, block_t, 16), tl.float32)
    for start in range(0, num_chunks, block_t):
        t = start + tl.arange(0, block_t)
        mask_OT = (first + o < out_features)[:, None] & (t < num_chunks)[None, :]
        offsets_OTE = (o * in_features)[:, None, None] + (t * 16)[None, :, None] + e[None, None, :]
        w_OTE = tl.load(codes + offsets_OTE, mask=mask_OT[:, :, None], other=0.0).to(tl.float32)
        offsets_TE = (t * 16)[:, None] + e[None, :]
        x_TE = tl.load(x + offsets_TE, mask=(t < num_chunks)[:, None], other=0.0)
        total_OTE += w_OTE * x_TE.to(tl.float32)[None, :, :]
    scale_O = tl.load(scales + first + o, mask=first + o < out_features, other=0.0)
    _store_sums(total_OTE * scale_O[:, None, None], bias, y, first, out_features, has_bias, block_o)


def rowwise_gemv(
    x_RI: Tensor, codes_OI: Tensor, scales_O: Tensor, bias: Tensor | None, tiling: MatmulTiling
) -> Tensor:
    """Compute x W^T + bias [R, O] with an 8-bit matrix of `model.quant.rowwise_quant`.

    The number of inputs must be divisible by 16.
    """
    rows, (out_features, in_features) = len(x_RI), codes_OI.shape
    y_RO = x_RI.new_empty(rows, out_features)
    _rowwise_gemv_kernel[(rows, triton.cdiv(out_features, tiling.block_outputs))](
        x_RI, codes_OI, scales_O, x_RI if bias is None else bias, y_RO, out_features, in_features,
        has_bias=bias is not None, block_o=tiling.block_outputs, block_t=tiling.block_chunks,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return y_RO
