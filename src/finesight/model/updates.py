"""What adapters add to products, and in which order.

An update comes first, and the product is added to it: so both are summed up in fp32, and rounded
once. The other way round, what is smaller than half of the product's last digit is lost: of updates
of 1/4,000 of a product six sevenths, in bf16. A bias is added last, and the sum rounded again.

Shapes: T rows, I inputs, O outputs of one layer, R its rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
