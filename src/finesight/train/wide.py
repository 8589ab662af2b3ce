"""fp32 numbers beside those that a model computes with, at the price of the bits that these lack.

A bf16 number is the upper half of an fp32 number's bits. Rounded to the nearest, it is what the
model computes with; the lower half of the bits, kept beside it, gives the fp32 number back exactly:
its own highest bit says whether the upper half was rounded up.

Shapes: E numbers of a group of parameters end to end, N of a stretch of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Wide:
    """fp32 numbers. `narrow_E` are the model's own, `rest_E` what is kept beside them: the lower
    half of the bits for bf16, the whole number for fp16, whose range is another, and nothing where
    the model computes in fp32.

    A number in the middle between two of bf16 is rounded to the longer one (to nearest even, it
    could not be told which way it went).
    """

    def __init__(self, narrow_E: Tensor) -> None:
        self.narrow_E = narrow_E
        self.rest_E: Tensor | None = None
        if narrow_E.dtype == torch.bfloat16:
            self.rest_E = torch.zeros_like(narrow_E, dtype=torch.int16)
        elif narrow_E.dtype != torch.float32:
            self.rest_E = narrow_E.float()

    def __len__(self) -> int:
        return len(self.narrow_E)

    def of(self, place: slice) -> Tensor:
        """The numbers of a stretch, [N]. Changed in place, they have to be given to `keep`."""
        narrow_N = self.narrow_E[place]
        if self.rest_E is None:
            return narrow_N
        rest_N = self.rest_E[place]
        return joined(narrow_N, rest_N) if rest_N.dtype == torch.int16 else rest_N

    def keep(self, wide_N: Tensor, place: slice) -> None:
        """Take what `of` gave and somebody has changed."""
        if self.rest_E is None:
            return
        narrow_N, rest_N = self.narrow_E[place], self.rest_E[place]
        if rest_N.dtype == torch.int16:
            split(wide_N, narrow_N, rest_N)
        else:
            narrow_N.copy_(wide_N)

    def load(self, wide_N: Tensor, place: slice) -> None:
        """Take these numbers, from wherever they are."""
        own_N = self.of(place)
        own_N.copy_(wide_N)
        self.keep(own_N, place)


def joined(narrow_N: Tensor, rest_N: Tensor) -> Tensor:
    """The fp32 numbers that `split` took apart."""
    bits_N = narrow_N.view(torch.int16).int().bitwise_left_shift_(16)
    return bits_N.add_(rest_N).view(torch.float32)


def split(wide_N: Tensor, narrow_N: Tensor, rest_N: Tensor) -> None:
    """Write fp32 numbers as bf16 ones, rounded, and the lower half of their bits."""
    bits_N = wide_N.view(torch.int32)
    rest_N.copy_(bits_N)
    # Halves of bits are added in whole numbers: a carry goes up into the exponent as it should.
    upper_N = bits_N.add(1 << 15).bitwise_right_shift_(16)
    narrow_N.view(torch.int16).copy_(upper_N)


def rounded_alike(wide: Tensor) -> Tensor:
    """fp32 numbers of which those in the middle between two of bf16 are longer by their last bit:
    rounded to nearest even, they become what `split` makes of them."""
    bits = wide.view(torch.int32)
    middle = bits.bitwise_and(0xFFFF).eq_(1 << 15)
    return bits.add(middle).view(torch.float32)
