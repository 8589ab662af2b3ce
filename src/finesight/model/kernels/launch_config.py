"""Launch configs and arguments of Triton kernels.

This module does not import Triton, since memory estimates and CPU code use it as well.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TARGET_PROGRAMS, CONCURRENT_PROGRAMS = 2048, 264
"""Number of programs that saturates a large GPU, and two programs for each SM of an H200."""

MAX_PARTIAL_SUMS = 512
"""Maximum number of partial sums for the gradient of a norm weight, which a second kernel
reduces."""


class TileConfig(NamedTuple):
    """Tile of a Triton kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


SWIGLU_TILE, SWIGLU_BACKWARD_TILE = TileConfig(32, 64, 4, 3), TileConfig(32, 64, 4, 3)
"""Tiles of the kernels in `kernels.swiglu`; fastest on an H200."""

LORA_DOWN_BACKWARD_TILE = TileConfig(32, 64, 4, 4)
"""Tile of the backward kernel in `kernels.lora_gemm`; fastest on an H200."""


def rows_per_chunk(rows: int, programs_per_row: int, programs: int = TARGET_PROGRAMS) -> int:
    """Return the number of rows per program, a multiple of 64."""
    chunks = max(1, min(programs // programs_per_row, _ceil_div(rows, 64)))
    return max(1, _ceil_div(_ceil_div(rows, chunks), 64)) * 64


def columns_per_chunk(rows: int, width: int, tile: TileConfig) -> int:
    """Return the number of columns per program, a multiple of the tile's columns."""
    row_tiles = max(1, _ceil_div(rows, tile.block_m))
    chunks = max(1, min(TARGET_PROGRAMS // row_tiles, _ceil_div(width, 4 * tile.block_n)))
    return _ceil_div(_ceil_div(width, chunks), tile.block_n) * tile.block_n


def _ceil_div(total: int, size: int) -> int:
    return -(-total // size)


class SeededDropout(NamedTuple):
    """Dropout of an adapter's input, with a reproducible mask.

    The mask is a hash of seed, salt, row and column, so that the backward pass can recompute it.
    """

    seed_1: Tensor | None
    salt: int
    p: float
    scale: float

    def kernel_args(self, placeholder: Tensor) -> tuple[Tensor, int, int, float]:
        """Return the kernel arguments: seed, salt, threshold and scale.

        An element is dropped if its hash, a signed 32-bit integer, is below the threshold. Without
        a seed `placeholder` is passed, which kernels do not read.
        """
        seed_1 = placeholder if self.seed_1 is None else self.seed_1
        return seed_1, self.salt, round(self.p * 2**32) - 2**31, self.scale


NO_DROPOUT = SeededDropout(None, 0, 0.0, 1.0)
