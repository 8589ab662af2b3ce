import pytest
import torch
from torch import Tensor

from finesight.model.quant.base import PackedInput, RmsNormParams, pack_inputs


class PermutedMatrix:
    """Matrix with or without permuted columns, of which only the input is packed."""

    def __init__(self, order: list[int] | None) -> None:
        self.order, self.num_packed, self.is_unpermuted = order, 0, order is None

    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        self.num_packed += 1
        return PackedInput(x_1I if self.order is None else x_1I[:, self.order], None)


BACK = [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("orders", "times"),
    [([None, None, None], 1), ([BACK, None, None], 3), ([None, BACK, None], 3), ([BACK], 1)],
)
def test_each_matrix_uses_its_input_permutation(orders, times):
    x_1I = torch.arange(8.0).unsqueeze(0)
    matrices = [PermutedMatrix(order) for order in orders]
    found = list(pack_inputs(matrices, x_1I, None))
    assert len(found) == len(orders)
    for order, words in zip(orders, found, strict=True):
        wanted = x_1I if order is None else x_1I[:, order]
        assert torch.equal(words.values_8N, wanted)
    assert sum(matrix.num_packed for matrix in matrices) == times
