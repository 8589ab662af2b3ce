from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finesight.model.frozen import Piece
from finesight.model.words import Norm, WordMatrix, Words, laid_out_for


class Sorting(WordMatrix):
    """A matrix whose columns are sorted by `order`, or not sorted."""

    def __init__(self, order: list[int] | None) -> None:
        super().__init__(4, 8)
        self.order, self.laid_out = order, 0

    @property
    def in_order(self) -> bool:
        return self.order is None

    def lay_out(self, x_1I: Tensor, norm: Norm | None) -> Words:
        self.laid_out += 1
        return Words(x_1I if self.order is None else x_1I[:, self.order], None)

    def row(self, x: Words, y_O: Tensor, bias_O: Tensor | None, added_O: Tensor | None) -> None:
        raise AssertionError("not multiplied")

    def pieces(self) -> tuple[Piece, ...]:
        return ()

    def dense(self, dtype: torch.dtype) -> Tensor:
        raise AssertionError("not made")

    def fits(self) -> bool:
        return True

    def tiles(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("not multiplied")


BACK = [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("orders", "times"),
    [([None, None, None], 1), ([BACK, None, None], 3), ([None, BACK, None], 3), ([BACK], 1)],
)
def test_each_matrix_meets_the_row_in_its_own_order(orders, times):
    x_1I = torch.arange(8.0).unsqueeze(0)
    matrices = [Sorting(order) for order in orders]
    found = list(laid_out_for(matrices, x_1I, None))
    assert len(found) == len(orders)
    for order, words in zip(orders, found, strict=True):
        wanted = x_1I if order is None else x_1I[:, order]
        assert torch.equal(words.factors_8N, wanted)
    assert sum(matrix.laid_out for matrix in matrices) == times
