from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finesight.model.quant.base import (
    Packed4BitMatrix,
    PackedInput,
    RmsNormParams,
    WeightTensorSpec,
    pack_inputs,
)


class PermutedMatrix(Packed4BitMatrix):
    """Matrix with or without permuted columns."""

    def __init__(self, order: list[int] | None) -> None:
        super().__init__(4, 8)
        self.order, self.num_packed = order, 0

    @property
    def is_unpermuted(self) -> bool:
        return self.order is None

    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        self.num_packed += 1
        return PackedInput(x_1I if self.order is None else x_1I[:, self.order], None)

    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        raise AssertionError("not multiplied")

    def tensor_specs(self) -> tuple[WeightTensorSpec, ...]:
        return ()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        raise AssertionError("not made")

    def supports_kernels(self) -> bool:
        return True

    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("not multiplied")


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
