"""How kernels share their work out among programs, as far as the memory of their sums hangs on it:
without Triton, for `plan`, too."""

from __future__ import annotations

from typing import NamedTuple

PROGRAMS, AT_ONCE = 2048, 264
"""Of a kernel that fill a large card; and two for each of an H200's processors."""

SUMS = 512
"""Most programs that each have a sum for the weight of a norm; these are added up afterwards."""


class Blocks(NamedTuple):
    """How a kernel's programs share the work: rows and columns of a tile, warps, and tiles that are
    loaded ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


GATE, GATE_BACK = Blocks(32, 64, 4, 3), Blocks(32, 64, 4, 3)
"""Of `gate_kernels`. What was quickest on an H200."""

LOWERED_BACK = Blocks(32, 64, 4, 4)
"""Of `lora_kernels`. What was quickest on an H200."""


def rows_of_chunk(rows: int, beside: int, programs: int = PROGRAMS) -> int:
    """Rows that one of a kernel's programs takes, where `beside` of them take each row."""
    chunks = max(1, min(programs // beside, _pieces(rows, 64)))
    return max(1, _pieces(_pieces(rows, chunks), 64)) * 64


def columns_of_chunk(rows: int, width: int, tile: Blocks) -> int:
    """Columns that a program takes where each has the rows of one tile, so that there are enough of
    them."""
    tall = max(1, _pieces(rows, tile.rows))
    chunks = max(1, min(PROGRAMS // tall, _pieces(width, 4 * tile.columns)))
    return _pieces(_pieces(width, chunks), tile.columns) * tile.columns


def _pieces(number: int, size: int) -> int:
    return -(-number // size)
