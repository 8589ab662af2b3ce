"""A Triton kernel of a product and a GELU of its outputs, for the tensor cores of Hopper cards and
what copies tiles there.

A program goes from tile to tile, and what the next one needs is fetched while outputs of the last
one are finished. Sums are fp32, and what a GELU makes of them is rounded once. Shapes: N rows, D
inputs, F outputs, G half of those of a tile.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from finesight.model.kernels.programs import Ptr, times_sigmoid
from finesight.model.kernels.sizes import Blocks

TILE, STEP, BAND = Blocks(128, 256, 8, 3), 64, 16
"""Rows and outputs of a tile, inputs of a step, and tiles one above the other that come before
those beside them, so that what they read is in the cache: the quickest of 14 on an H200 for 25,600
rows of 1,280 numbers and 5,120 outputs."""

BUSY, ROUNDS = 0.9, 4
"""Share of a card that has to be busy, and tiles that each program takes at least, or smaller tiles
are quicker, with one kernel more."""


@triton.jit
def _gelu(y: tl.tensor, linear_2: tl.constexpr, cubic_2: tl.constexpr) -> tl.tensor:
    """Its factors are -log2(e) times those of a sigmoid."""
    power = y * linear_2
    if cubic_2 != 0.0:
        power += y * y * y * cubic_2
    return times_sigmoid(y, power)


@triton.jit(do_not_specialize=["rows", "programs"])
def _activated(x: tl.tensor_descriptor, w: tl.tensor_descriptor, bias: Ptr,
               y: tl.tensor_descriptor, rows: int, width: int, programs: int,
               inputs: tl.constexpr, linear_2: tl.constexpr, cubic_2: tl.constexpr,
               is_biased: tl.constexpr, block_n: tl.constexpr, block_f: tl.constexpr,
               block_d: tl.constexpr, high: tl.constexpr) -> None:  # fmt: skip
    tall, wide = tl.cdiv(rows, block_n), tl.cdiv(width, block_f)
    for tile in tl.range(tl.program_id(0), tall * wide, programs, flatten=True):
        first = tile // (high * wide) * high
        band, within = tl.minimum(tall - first, high), tile % (high * wide)
        n, f = (first + within % band) * block_n, within // band * block_f
        y_NF = tl.zeros((block_n, block_f), tl.float32)
        for d in range(0, inputs, block_d):
            y_NF = tl.dot(x.load([n, d]), w.load([f, d]).T, y_NF)
        if is_biased:
            f_F = f + tl.arange(0, block_f)
            y_NF += tl.load(bias + f_F, mask=f_F < width, other=0.0).to(tl.float32)[None, :]
        # In halves: one is written while the other is finished.
        y_N2G = tl.reshape(y_NF, (block_n, 2, block_f // 2))
        left_NG, right_NG = tl.split(tl.permute(y_N2G, (0, 2, 1)))
        y.store([n, f], _gelu(left_NG, linear_2, cubic_2).to(y.dtype))
        y.store([n, f + block_f // 2], _gelu(right_NG, linear_2, cubic_2).to(y.dtype))


def activated(
    x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None, *, linear: float, cubic: float
) -> Tensor:
    """y sigmoid(linear y + cubic y^3) for y = x W^T + bias [N, F]. Rows of both operands begin at
    multiples of 16 bytes."""
    (rows, inputs), width = x_ND.shape, len(w_FD)
    y_NF = x_ND.new_empty(rows, width)
    half, programs = TILE.columns // 2, min(_tiles(rows, width), _processors(x_ND.device))
    _activated[(programs,)](
        TensorDescriptor.from_tensor(x_ND, [TILE.rows, STEP]),
        TensorDescriptor.from_tensor(w_FD, [TILE.columns, STEP]),
        y_NF if bias_F is None else bias_F, TensorDescriptor.from_tensor(y_NF, [TILE.rows, half]),
        rows, width, programs, inputs=inputs, linear_2=-linear / math.log(2),
        cubic_2=-cubic / math.log(2), is_biased=bias_F is not None, block_n=TILE.rows,
        block_f=TILE.columns, block_d=STEP, high=BAND, num_warps=TILE.warps,
        num_stages=TILE.stages,
    )  # fmt: skip
    return y_NF


def fills(rows: int, width: int, device: torch.device) -> bool:
    """Whether a product of so many outputs keeps a card busy in tiles of this size, to the last.
    What it gives differs from that of two kernels in the last bit."""
    size, programs = TILE.rows * TILE.columns, _processors(device)
    rounds = -(-_tiles(rows, width) // programs)
    return rounds >= ROUNDS and rows * width >= BUSY * rounds * programs * size


def _tiles(rows: int, width: int) -> int:
    return -(-rows // TILE.rows) * -(-width // TILE.columns)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
