"""AdamW whose moments take a byte each, by bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861).

Shapes: E numbers of a group of parameters end to end, B = E / 256 blocks of them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.nf4 import bitsandbytes

BLOCK = 256
"""Numbers that share a scale: bitsandbytes's own figure. Parameters have to begin with a block."""

EPSILON = 1e-8
"""What torch's AdamW adds to the root of the second moment."""

MOST = 1 << 28
"""Numbers that are stepped at once; on a CPU their moments are widened for it."""


class AdamW8bit:
    """Steps for one group. A moment is kept as `first_E` or `second_E`, one of 256 values between
    the block's largest, `first_scale_B` or `second_scale_B`, and zero (below it, too, for the
    first). Masters and gradients are fp32.
    """

    def __init__(self, master_E: Tensor, grad_E: Tensor, betas: tuple[float, float]) -> None:
        assert len(master_E) % BLOCK == 0, f"{len(master_E)} numbers are no whole blocks"
        self._master_E, self._grad_E, self._betas = master_E, grad_E, betas
        blocks = len(master_E) // BLOCK
        bytes_E = torch.zeros_like(master_E, dtype=torch.uint8)
        self.first_E, self.second_E = bytes_E, bytes_E.clone()
        self.first_scale_B, self.second_scale_B = (master_E.new_zeros(blocks) for _ in range(2))
        self.taken = 0

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """Move the masters by a step at this rate, and shrink them by `rate` times `decay`."""
        self.taken += 1
        device = self._master_E.device
        for start in range(0, len(self._master_E), MOST):
            place = slice(start, min(start + MOST, len(self._master_E)))
            moments = self.moments(place)
            bitsandbytes("train.optimizer").functional.optimizer_update_8bit_blockwise(
                "adam",
                self._grad_E[place],
                self._master_E[place],
                moments["first"],
                moments["second"],
                *self._betas,
                # Of other optimisers.
                0.0,
                0.0,
                EPSILON,
                self.taken,
                rate,
                _levels(device, True),
                _levels(device, False),
                moments["first_scale"],
                moments["second_scale"],
                decay,
            )

    def moments(self, place: slice) -> dict[str, Tensor]:
        """Both moments and their scales of all blocks of a stretch that begins with one; views."""
        blocks = slice(place.start // BLOCK, -(-place.stop // BLOCK))
        # Also what is beyond the stretch: bytes of zero stand for zero only while the scale is.
        whole = slice(place.start, blocks.stop * BLOCK)
        return {
            "first": self.first_E[whole],
            "second": self.second_E[whole],
            "first_scale": self.first_scale_B[blocks],
            "second_scale": self.second_scale_B[blocks],
        }


@lru_cache
def _levels(device: torch.device, signed: bool) -> Tensor:
    """The 256 values that a byte stands for."""
    functional = bitsandbytes("train.optimizer").functional
    levels: Tensor = functional.create_dynamic_map(signed=signed).to(device)
    return levels
