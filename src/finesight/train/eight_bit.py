"""AdamW whose moments take a byte each, scaled block by block (Dettmers et al. 2022,
arXiv:2110.02861).

Shapes: E numbers of a group of parameters end to end, B = E / 256 blocks of N = 256.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale. Parameters have to begin with a block."""

EPSILON = 1e-8
"""What torch's AdamW adds to the root of the second moment."""

DECADES = 7
"""Powers of ten below one that a byte reaches down to."""

MOST = 1 << 24
"""Numbers that are stepped at once: meanwhile each takes some 20 bytes."""


class Moment:
    """Numbers of a byte each, `codes_E`: which of 256 levels between the block's largest magnitude,
    `scale_B`, and zero, or its negative where `signed`."""

    def __init__(self, like_E: Tensor, signed: bool) -> None:
        self.signed = signed
        self.levels = levels(signed).to(like_E.device)
        self._borders = (self.levels[1:] + self.levels[:-1]) / 2
        if not signed:
            # What is not zero never becomes zero: it is divided by.
            self._borders[0] = 0.0
        zero = int((self.levels == 0).nonzero())
        self.codes_E = torch.full_like(like_E, zero, dtype=torch.uint8)
        self.scale_B = like_E.new_zeros(len(like_E) // BLOCK)

    def wide(self, blocks: slice) -> Tensor:
        """The numbers of some blocks in fp32, [blocks, N]."""
        codes_BN = self.codes_E.view(-1, BLOCK)[blocks]
        wide_BN = self.levels.index_select(0, codes_BN.flatten().int()).view(codes_BN.shape)
        return wide_BN.mul_(self.scale_B[blocks, None])

    def keep(self, wide_BN: Tensor, blocks: slice) -> None:
        """Round the numbers of some blocks to the nearest levels."""
        scale_B1 = wide_BN.abs().amax(1, keepdim=True)
        # A block of zeros has no scale to divide by.
        unit_BN = wide_BN / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)
        codes_BN = torch.bucketize(unit_BN, self._borders, out_int32=True)
        self.codes_E.view(-1, BLOCK)[blocks].copy_(codes_BN)
        self.scale_B[blocks].copy_(scale_B1.squeeze(1))


class AdamW8bit:
    """Steps for one group. Its moments are all that it remembers, and how many steps were `taken`;
    masters and gradients are fp32."""

    def __init__(self, master_E: Tensor, grad_E: Tensor, betas: tuple[float, float]) -> None:
        assert len(master_E) % BLOCK == 0, f"{len(master_E)} numbers are no whole blocks"
        self._master_E, self._grad_E, self._betas = master_E, grad_E, betas
        self.first, self.second = Moment(master_E, signed=True), Moment(master_E, signed=False)
        self.taken = 0

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """Move the masters by a step at this rate, and shrink them by `rate` times `decay`."""
        self.taken += 1
        at_once = MOST // BLOCK
        for start in range(0, len(self._master_E) // BLOCK, at_once):
            self._step(slice(start, start + at_once), rate, decay)

    def _step(self, blocks: slice, rate: float, decay: float) -> None:
        beta_1, beta_2 = self._betas
        master_BN, grad_BN = (x.view(-1, BLOCK)[blocks] for x in (self._master_E, self._grad_E))
        first_BN = self.first.wide(blocks).lerp_(grad_BN, 1 - beta_1)
        second_BN = self.second.wide(blocks).mul_(beta_2)
        second_BN.addcmul_(grad_BN, grad_BN, value=1 - beta_2)
        self.first.keep(first_BN, blocks)
        self.second.keep(second_BN, blocks)
        # Moved by the moments as they were before they were rounded.
        root_BN = second_BN.sqrt_().div_((1 - beta_2**self.taken) ** 0.5).add_(EPSILON)
        master_BN.mul_(1 - rate * decay)
        master_BN.addcdiv_(first_BN, root_BN, value=-rate / (1 - beta_1**self.taken))

    def moments(self, place: slice) -> dict[str, Tensor]:
        """Both moments and their scales of all blocks of a stretch that begins with one; views."""
        blocks = slice(place.start // BLOCK, -(-place.stop // BLOCK))
        whole = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        return {
            "first": self.first.codes_E[whole],
            "second": self.second.codes_E[whole],
            "first_scale": self.first.scale_B[blocks],
            "second_scale": self.second.scale_B[blocks],
        }


@lru_cache
def levels(signed: bool) -> Tensor:
    """The values of a byte, ascending: in each decade below one twice as many as in the one below
    it, spread evenly ("dynamic tree quantisation", section 1.3 of the paper); zero and one too."""
    some: list[Tensor] = [torch.zeros(1), torch.ones(1)]
    for decade in range(DECADES):
        number = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1.0, number + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - DECADES)
        some += [middles, -middles] if signed else [middles]
    return torch.cat(some).sort().values
