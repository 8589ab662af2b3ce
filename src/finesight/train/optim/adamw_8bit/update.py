"""AdamW with moments in 8 bits, block-wise quantized (Dettmers et al. 2022, arXiv:2110.02861).

Shapes: E flat elements of a parameter group, M elements of a slice of complete blocks, B = E / 256
blocks of N = 256 elements.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.kernels.param_tiles import BLOCK_SIZE
from finesight.train.optim.adamw.update import AdamW, OptimState


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments. Each parameter starts a new block."""

    alignment = BLOCK_SIZE
    eager_traffic = 270
    kernel_traffic = 29
    """The kernel moves 16 bytes, but takes as long as this value."""

    def create_moment(self, num_elements: int, device: torch.device, signed: bool) -> OptimState:
        """Create a moment in 8 bits, initially zero."""
        return OptimState8bit(num_elements, device, signed)


NUM_DECADES = 7
"""Number of powers of ten below one that the 8-bit levels cover."""


class OptimState8bit(OptimState):
    """AdamW moment of a parameter group in 8 bits, with one scale per block.

    The scale of a block is its largest magnitude. Each byte selects one of 256 levels between zero
    and the scale, or between minus and plus the scale if `signed`.
    """

    scale_B: Tensor

    def __init__(self, num_elements: int, device: torch.device, signed: bool) -> None:
        assert num_elements % BLOCK_SIZE == 0, (
            f"{num_elements} elements are not a multiple of the block size"
        )
        self.signed = signed
        levels = create_dynamic_map(signed)
        self._levels = levels.to(device)
        self._boundaries = (self._levels[1:] + self._levels[:-1]) / 2
        if not signed:
            # Non-zero values never round to zero, because the update divides by them.
            self._boundaries[0] = 0.0
        zero = int((levels == 0).nonzero())
        self.values_E = torch.full((num_elements,), zero, dtype=torch.uint8, device=device)
        self.scale_B = torch.zeros(num_elements // BLOCK_SIZE, device=device)

    def read(self, flat_slice: slice) -> Tensor:
        """Dequantize a slice of complete blocks to fp32 [M]."""
        values_M = self._levels.index_select(0, self.values_E[flat_slice].int())
        values_M.view(-1, BLOCK_SIZE).mul_(self.scale_B[_block_slice(flat_slice), None])
        return values_M

    def write(self, values_M: Tensor, flat_slice: slice) -> None:
        """Quantize a slice of complete blocks to the nearest levels."""
        values_BN = values_M.view(-1, BLOCK_SIZE)
        scale_B1 = values_BN.abs().amax(1, keepdim=True)
        # Avoid division by the scale of a zero block.
        scaled_BN = values_BN / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)
        codes_BN = torch.bucketize(scaled_BN, self._boundaries, out_int32=True)
        self.values_E[flat_slice].view(-1, BLOCK_SIZE).copy_(codes_BN)
        self.scale_B[_block_slice(flat_slice)].copy_(scale_B1.squeeze(1))

    def state_tensors(self, flat_slice: slice, shape: torch.Size) -> dict[str, Tensor]:
        """Return views of the 8-bit codes and scales of one parameter's blocks, by key suffix."""
        blocks = _block_slice(flat_slice)
        codes = self.values_E[blocks.start * BLOCK_SIZE : blocks.stop * BLOCK_SIZE]
        return {"": codes, "_scale": self.scale_B[blocks]}


def _block_slice(flat_slice: slice) -> slice:
    """Return the slice of the blocks that contain a slice of elements."""
    return slice(flat_slice.start // BLOCK_SIZE, -(-flat_slice.stop // BLOCK_SIZE))


@lru_cache
def create_dynamic_map(signed: bool) -> Tensor:
    """Create the 256 ascending levels of dynamic tree quantization (section 1.3 of the paper).

    Each power of ten below one has two times as many evenly spaced levels as the next smaller one.
    Zero and one are levels as well.
    """
    levels: list[Tensor] = [torch.zeros(1), torch.ones(1)]
    for decade in range(NUM_DECADES):
        num_levels = 2**decade
        if not signed:
            num_levels *= 2
        edges = torch.linspace(0.1, 1.0, num_levels + 1)
        midpoints = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - NUM_DECADES)
        levels.append(midpoints)
        if signed:
            levels.append(-midpoints)
    return torch.cat(levels).sort().values
