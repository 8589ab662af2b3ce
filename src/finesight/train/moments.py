"""AdamW's moments: in fp32, or in a byte each, scaled block by block (Dettmers et al. 2022,
arXiv:2110.02861).

Shapes: E numbers of a group of parameters end to end, M of a stretch of whole blocks; B = E / 256
blocks of N = 256.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale. Parameters have to begin with a block."""

DECADES = 7
"""Powers of ten below one that a byte reaches down to."""

EPSILON = 1e-8
"""What torch's AdamW adds to the root of the second moment."""


class Pace(NamedTuple):
    """How far one step goes, and how much of the gradients before it still counts."""

    rate: float
    decay: float
    betas: tuple[float, float]

    @property
    def kept(self) -> float:
        """What a step leaves of a number, before it moves it."""
        return 1 - self.rate * self.decay

    def length(self, taken: int) -> float:
        """The rate, and what the first moment lacks as long as steps are few, this one included."""
        return self.rate / (1 - self.betas[0] ** taken)

    def root(self, taken: int) -> float:
        """The second moment's share of what it will be once steps are many, as its root."""
        return float((1 - self.betas[1] ** taken) ** 0.5)


class Moment:
    """One number for every number of a group, `numbers_E`, in fp32 and zero at first."""

    numbers_E: Tensor
    scale_B: Tensor | None = None

    def __init__(self, length: int, device: torch.device) -> None:
        self.numbers_E = torch.zeros(length, dtype=torch.float32, device=device)

    def of(self, place: slice) -> Tensor:
        """Those of a stretch, [M] in fp32. Changed in place, they have to be given to `keep`."""
        return self.numbers_E[place]

    def keep(self, wide_M: Tensor, place: slice) -> None:
        """Take what `of` gave and somebody has changed."""

    def stored(self, place: slice, shape: torch.Size) -> dict[str, Tensor]:
        """What a checkpoint keeps of a parameter, by what follows the moment's name; views."""
        return {"": self.numbers_E[place].view(shape)}


class EightBits(Moment):
    """A byte for each number: which of 256 levels between the block's largest magnitude, `scale_B`,
    and zero, or its negative where `signed`."""

    scale_B: Tensor

    def __init__(self, length: int, device: torch.device, signed: bool) -> None:
        assert length % BLOCK == 0, f"{length} numbers are no whole blocks"
        self.signed = signed
        self._levels = levels(signed).to(device)
        self._borders = (self._levels[1:] + self._levels[:-1]) / 2
        if not signed:
            # What is not zero never becomes zero: it is divided by.
            self._borders[0] = 0.0
        zero = int((self._levels == 0).nonzero())
        self.numbers_E = torch.full((length,), zero, dtype=torch.uint8, device=device)
        self.scale_B = torch.zeros(length // BLOCK, device=device)

    def of(self, place: slice) -> Tensor:
        """Those of a stretch of whole blocks, [M] in fp32."""
        wide_M = self._levels.index_select(0, self.numbers_E[place].int())
        wide_M.view(-1, BLOCK).mul_(self.scale_B[_blocks(place), None])
        return wide_M

    def keep(self, wide_M: Tensor, place: slice) -> None:
        """Round the numbers of a stretch of whole blocks to the nearest levels."""
        wide_BN = wide_M.view(-1, BLOCK)
        scale_B1 = wide_BN.abs().amax(1, keepdim=True)
        # A block of zeros has no scale to divide by.
        unit_BN = wide_BN / scale_B1.clamp(min=torch.finfo(torch.float32).tiny)
        codes_BN = torch.bucketize(unit_BN, self._borders, out_int32=True)
        self.numbers_E[place].view(-1, BLOCK).copy_(codes_BN)
        self.scale_B[_blocks(place)].copy_(scale_B1.squeeze(1))

    def stored(self, place: slice, shape: torch.Size) -> dict[str, Tensor]:
        """The codes of all blocks of a parameter, flat, and their scales; views."""
        blocks = _blocks(place)
        codes = self.numbers_E[blocks.start * BLOCK : blocks.stop * BLOCK]
        return {"": codes, "_scale": self.scale_B[blocks]}


def _blocks(place: slice) -> slice:
    """Those that hold a stretch which begins with one."""
    return slice(place.start // BLOCK, -(-place.stop // BLOCK))


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
