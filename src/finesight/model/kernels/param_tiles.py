"""Tiles of the gradients of a parameter group, and kernels that sum gradients and their squares.

Each gradient is a separate tensor, so the kernels find it in a table of addresses. A program
processes one tile of one parameter. Launches require Triton.

Shapes: P parameters, T tiles of R rows of N = 256 elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finesight.model.kernels.runtime import jit, tl, triton

BLOCK_SIZE = 256
"""Number of elements of a row, and of a block of 8-bit values that share a scale."""

TILE_ROWS = 8
"""Number of rows of a tile; a row has 256 elements."""

NUM_WARPS = 4

ALIGNED_ELEMENTS = 16
"""Vectorized loads require parameter sizes that are multiples of this number of elements."""


class ParamTiles:
    """Tiles of a parameter group; one kernel program processes one tile.

    Attributes:
        param_index_T: Index of the parameter of each tile.
        param_table_P3: First tile, offset in the group and number of elements of each parameter.
        is_aligned: Whether all parameter sizes allow vectorized loads.
    """

    def __init__(self, flat_slices: Sequence[slice], device: torch.device) -> None:
        sizes = [flat_slice.stop - flat_slice.start for flat_slice in flat_slices]
        tile_counts = [triton.cdiv(size, TILE_ROWS * BLOCK_SIZE) for size in sizes]
        param_indices_P = torch.arange(len(flat_slices), dtype=torch.int32)
        self.param_index_T = param_indices_P.repeat_interleave(torch.tensor(tile_counts)).to(device)
        first_tiles = [sum(tile_counts[:n]) for n in range(len(tile_counts))]
        rows = [*zip(first_tiles, (p.start for p in flat_slices), sizes, strict=True)]
        self.param_table_P3 = torch.tensor(rows, dtype=torch.int64).to(device)
        self.is_aligned = all(size % ALIGNED_ELEMENTS == 0 for size in sizes)

    def data_pointers(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the gradient addresses as a device tensor [P]; 0 for None.

        The gradients must stay allocated until the kernel is launched. The copy to the device does
        not synchronize.
        """
        pointers = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        table_P = torch.tensor(pointers, dtype=torch.int64)
        if self.param_table_P3.is_cuda:
            table_P = table_P.pin_memory()
        return table_P.to(self.param_table_P3.device, non_blocking=True)


def align_gradients(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copy gradients that are not aligned to 16 bytes, such as slices."""
    return [g.clone() if g is not None and g.data_ptr() % 16 else g for g in gradients]


@jit
def locate_tile(param_index_T, param_table_P3, is_aligned: tl.constexpr, rows: tl.constexpr):
    """Return the position of this program's tile.

    Returns:
        Parameter index, first element in the parameter, first element in the group, element offsets
        [R, N], and mask of existing elements [R, N].
    """
    t = tl.program_id(0)
    p = tl.load(param_index_T + t)
    row = param_table_P3 + p * 3
    size = tl.load(row + 2)
    param_offset = tl.multiple_of(tl.load(row + 1), 64)
    if is_aligned:
        size = tl.multiple_of(size, 16)
    first = (t - tl.load(row)) * (rows * 256)
    offset_RN = tl.arange(0, rows)[:, None] * 256 + tl.arange(0, 256)[None, :]
    return p, first, param_offset + first, offset_RN, first + offset_RN < size


@jit
def load_gradient(pointers_P, p, first, offset_RN, mask_RN, like):
    """Load the gradient of a tile in fp32; zeros if the parameter has no gradient."""
    address = tl.load(pointers_P + p)
    grad_RN = tl.zeros_like(offset_RN).to(tl.float32)
    if address != 0:
        pointer = tl.multiple_of(address.to(like.dtype), 16)
        grad_RN = tl.load(pointer + first + offset_RN, mask=mask_RN, other=0.0).to(tl.float32)
    return grad_RN


@jit
def _accumulate_kernel(
    param_index_T, param_table_P3, gradients_P, sums_P, previous_P, grad_like, sum_like,
    is_aligned: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    p, first, _, offset_RN, mask_RN = locate_tile(param_index_T, param_table_P3, is_aligned, rows)
    if tl.load(gradients_P + p) != 0:
        grad_RN = load_gradient(gradients_P, p, first, offset_RN, mask_RN, grad_like)
        grad_RN += load_gradient(previous_P, p, first, offset_RN, mask_RN, sum_like)
        sums = tl.multiple_of(tl.load(sums_P + p).to(sum_like.dtype), 16)
        tl.store(sums + first + offset_RN, grad_RN, mask=mask_RN)


def accumulate_gradients(
    tiles: ParamTiles,
    gradients: Sequence[Tensor | None],
    sums: Sequence[Tensor],
    has_sum: Sequence[bool],
) -> None:
    """Add gradients to fp32 sums with one kernel.

    Args:
        gradients: Gradient of each parameter; None leaves its sum unchanged.
        sums: fp32 sums of each parameter.
        has_sum: Whether a sum contains values; otherwise, it is overwritten.
    """
    gradients = align_gradients(gradients)
    like = next(gradient for gradient in gradients if gradient is not None)
    previous = [sum_ if is_set else None for sum_, is_set in zip(sums, has_sum, strict=True)]
    _accumulate_kernel[(len(tiles.param_index_T),)](
        tiles.param_index_T, tiles.param_table_P3, tiles.data_pointers(gradients),
        tiles.data_pointers(sums), tiles.data_pointers(previous), like, sums[0],
        is_aligned=tiles.is_aligned, rows=TILE_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip


@jit
def _squared_norm_kernel(
    param_index_T, param_table_P3, gradients_P, sums_T, like, is_aligned: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    p, first, _, offset_RN, mask_RN = locate_tile(param_index_T, param_table_P3, is_aligned, rows)
    grad_RN = load_gradient(gradients_P, p, first, offset_RN, mask_RN, like)
    tl.store(sums_T + tl.program_id(0), tl.sum(tl.sum(grad_RN * grad_RN, 1), 0))


def squared_norm(tiles: ParamTiles, gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of squares of all gradients, a scalar in fp32.

    The summation order is deterministic. At least one gradient must not be None.
    """
    gradients = align_gradients(gradients)
    like = next(gradient for gradient in gradients if gradient is not None)
    sums_T = torch.empty(len(tiles.param_index_T), device=like.device)
    _squared_norm_kernel[(len(sums_T),)](
        tiles.param_index_T, tiles.param_table_P3, tiles.data_pointers(gradients), sums_T, like,
        is_aligned=tiles.is_aligned, rows=TILE_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums_T.sum()
