"""Launch configs that determine the size of partial-sum buffers.

Does not import Triton, since `plan` uses it as well.
"""

from __future__ import annotations

from typing import NamedTuple

TARGET_PROGRAMS, CONCURRENT_PROGRAMS = 2048, 264
"""Programs that saturate a large GPU; two programs for each SM of an H200."""

MAX_PARTIAL_SUMS = 512
"""Maximum number of partial sums for a norm weight, which are reduced after the kernel."""


class TileConfig(NamedTuple):
    """Tile of a kernel: rows, columns, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


SWIGLU_TILE, SWIGLU_BACKWARD_TILE = TileConfig(32, 64, 4, 3), TileConfig(32, 64, 4, 3)
"""Tiles of the `swiglu` kernels; fastest on an H200."""

LORA_DOWN_BACKWARD_TILE = TileConfig(32, 64, 4, 4)
"""Tile of the `lora_gemm` backward kernel; fastest on an H200."""


def rows_per_chunk(rows: int, programs_per_row: int, programs: int = TARGET_PROGRAMS) -> int:
    """Return the rows per program, if each row is processed by `programs_per_row` programs."""
    chunks = max(1, min(programs // programs_per_row, _ceil_div(rows, 64)))
    return max(1, _ceil_div(_ceil_div(rows, chunks), 64)) * 64


def columns_per_chunk(rows: int, width: int, tile: TileConfig) -> int:
    """Return the columns per program, if each program has one row tile, for enough programs."""
    row_tiles = max(1, _ceil_div(rows, tile.block_m))
    chunks = max(1, min(TARGET_PROGRAMS // row_tiles, _ceil_div(width, 4 * tile.block_n)))
    return _ceil_div(_ceil_div(width, chunks), tile.block_n) * tile.block_n


def _ceil_div(total: int, size: int) -> int:
    return -(-total // size)
