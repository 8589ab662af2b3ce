"""What adapters add to products, and how nothing of it is lost in the sum's last digit.

Added to a product that is rounded to bf16 already, what is smaller than half of the product's last
digit is lost if the sum is rounded to the nearest: of updates of 1/4,000 of it six sevenths.

A processor sums up in fp32 what it adds to a tensor, and rounds once: there an update comes first,
and the product is added to it; a bias is added last, and the sum rounded again. A card may round a
product before it adds it (cuBLAS on Hopper does): there the product comes first, and its sum with
an update is rounded up or down by chance, so that on average all of the update is left.

Shapes: T rows, I inputs, O outputs of one layer, R its rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from finesight.model.frozen import KERNELS
from finesight.model.fused import has_kernels

if KERNELS:
    from finesight.model.kernels import lora as lora_kernels


class Update(NamedTuple):
    """That of one of a group's layers: scale low B^T."""

    layer: int
    low_TR: Tensor
    b_OR: Tensor
    scale: float

    def made(self) -> Tensor:
        """[T, O]."""
        y_TO = self.low_TR.new_empty(len(self.low_TR), len(self.b_OR))
        # With beta 0 what is there is not read.
        return y_TO.addmm_(self.low_TR, self.b_OR.T, beta=0, alpha=self.scale)


def added_product(y_TO: Tensor, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """An update plus x W^T + bias, in its place."""
    y_TO.addmm_(x_TI, w_OI.T)
    return y_TO if bias_O is None else y_TO.add_(bias_O)


def add_update(y_TO: Tensor, low_TR: Tensor, b_OR: Tensor, scale: float = 1.0) -> Tensor:
    """A product plus scale low B^T, in its place; by chance as above where there are kernels."""
    if has_kernels(y_TO):
        lora_kernels.raised(y_TO, low_TR, b_OR, scale)
        return y_TO
    return y_TO.addmm_(low_TR, b_OR.T, alpha=scale)
