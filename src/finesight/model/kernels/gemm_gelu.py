"""Triton kernel of a matmul fused with GELU, for Hopper tensor cores and TMA copies.

Persistent programs iterate over output tiles; loads of the next tile overlap the epilogue of the
last one. Accumulation is fp32, and the GELU is rounded once.

Shapes: N rows, D inputs, F outputs, G half of a tile's outputs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.kernels.runtime import (
    Ptr,
    TensorDescriptor,
    TileConfig,
    jit,
    times_sigmoid,
    tl,
)

GEMM_TILE, BLOCK_K, GROUP_M = TileConfig(128, 256, 8, 3), 64, 16
"""Rows and outputs per tile, inputs per step, and row tiles per group that share cached operands.

The fastest of 14 configurations on an H200 for 25,600 rows of 1,280 elements and 5,120 outputs.
"""

MIN_UTILIZATION, MIN_TILES_PER_PROGRAM = 0.9, 4
"""Minimum GPU utilization and tiles per program of the fused kernel.

Below them, separate kernels with smaller tiles are faster.
"""


@jit
def _gelu_value(y: tl.tensor, linear_2: tl.constexpr, cubic_2: tl.constexpr) -> tl.tensor:
    """Compute the GELU of an fp32 tile.

    The factors `linear_2` and `cubic_2` are -log2(e) times those in the argument of the sigmoid.
    """
    power = y * linear_2
    if cubic_2 != 0.0:
        power += y * y * y * cubic_2
    return times_sigmoid(y, power)


@jit(do_not_specialize=["rows", "num_programs"])
def _gemm_gelu_kernel(
    x: tl.tensor_descriptor, w: tl.tensor_descriptor, bias: Ptr, y: tl.tensor_descriptor, rows: int,
    out_features: int, num_programs: int, in_features: tl.constexpr, linear_2: tl.constexpr,
    cubic_2: tl.constexpr, has_bias: tl.constexpr, block_n: tl.constexpr, block_f: tl.constexpr,
    block_d: tl.constexpr, group_m: tl.constexpr,
) -> None:  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(rows, block_n), tl.cdiv(out_features, block_f)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, num_programs, flatten=True):
        first_row_tile = tile // (group_m * column_tiles) * group_m
        group_rows = tl.minimum(row_tiles - first_row_tile, group_m)
        tile_in_group = tile % (group_m * column_tiles)
        n = (first_row_tile + tile_in_group % group_rows) * block_n
        f = tile_in_group // group_rows * block_f
        y_NF = tl.zeros((block_n, block_f), tl.float32)
        for d in range(0, in_features, block_d):
            y_NF = tl.dot(x.load([n, d]), w.load([f, d]).T, y_NF)
        if has_bias:
            f_F = f + tl.arange(0, block_f)
            y_NF += tl.load(bias + f_F, mask=f_F < out_features, other=0.0).to(tl.float32)[None, :]
        # Process the tile in halves: one is stored while the other is computed.
        y_N2G = tl.reshape(y_NF, (block_n, 2, block_f // 2))
        left_NG, right_NG = tl.split(tl.permute(y_N2G, (0, 2, 1)))
        y.store([n, f], _gelu_value(left_NG, linear_2, cubic_2).to(y.dtype))
        y.store([n, f + block_f // 2], _gelu_value(right_NG, linear_2, cubic_2).to(y.dtype))


def gemm_gelu(
    x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None, *, linear: float, cubic: float
) -> Tensor:
    """Compute a matmul followed by GELU, y sigmoid(linear y + cubic y^3), [N, F]."""
    (rows, in_features), out_features = x_ND.shape, len(w_FD)
    y_NF = x_ND.new_empty(rows, out_features)
    half = GEMM_TILE.block_n // 2
    num_programs = min(_count_tiles(rows, out_features), _count_sms(x_ND.device))
    _gemm_gelu_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(x_ND, [GEMM_TILE.block_m, BLOCK_K]),
        TensorDescriptor.from_tensor(w_FD, [GEMM_TILE.block_n, BLOCK_K]),
        y_NF if bias_F is None else bias_F,
        TensorDescriptor.from_tensor(y_NF, [GEMM_TILE.block_m, half]), rows, out_features,
        num_programs, in_features=in_features, linear_2=-linear / math.log(2),
        cubic_2=-cubic / math.log(2), has_bias=bias_F is not None, block_n=GEMM_TILE.block_m,
        block_f=GEMM_TILE.block_n, block_d=BLOCK_K, group_m=GROUP_M, num_warps=GEMM_TILE.num_warps,
        num_stages=GEMM_TILE.num_stages,
    )  # fmt: skip
    return y_NF


def saturates_device(rows: int, out_features: int, device: torch.device) -> bool:
    """Return True if a matmul of this size saturates the GPU with the fused kernel."""
    tile_elements, num_programs = GEMM_TILE.block_m * GEMM_TILE.block_n, _count_sms(device)
    tiles_per_program = -(-_count_tiles(rows, out_features) // num_programs)
    return (
        tiles_per_program >= MIN_TILES_PER_PROGRAM
        and rows * out_features
        >= MIN_UTILIZATION * tiles_per_program * num_programs * tile_elements
    )


def _count_tiles(rows: int, out_features: int) -> int:
    return -(-rows // GEMM_TILE.block_m) * -(-out_features // GEMM_TILE.block_n)


@lru_cache
def _count_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
