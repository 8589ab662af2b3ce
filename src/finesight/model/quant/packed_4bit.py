"""Base class of 4-bit matrices whose GEMV kernel reads eight codes per 32-bit word.

Shapes: I inputs, O outputs, R rows, N = I / 8 words of a row, G groups of inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.quant.base import QuantizedMatrix


class RmsNormParams(NamedTuple):
    """RMS norm that is applied to the input row before a GEMV."""

    weight_I: Tensor
    eps: float


class PackedInput(NamedTuple):
    """Input row in the layout that GEMV kernels for 4-bit matrices read.

    Attributes:
        values_8N: Inputs of the k-th code of all words, for each of the 8 codes of a word.
        group_sums_G: Sum of the inputs of each group, for formats with zero points; else None.
    """

    values_8N: Tensor
    group_sums_G: Tensor | None


class Packed4BitMatrix(QuantizedMatrix):
    """Quantized 4-bit matrix whose GEMV kernel requires a packed input row."""

    @property
    def is_unpermuted(self) -> bool:
        """True if the columns are in their original order.

        Matrices of a fused linear can then share the packed input.
        """
        return True

    @abstractmethod
    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        """Pack an input row [1, I] for `gemv_packed`, after an optional RMS norm."""

    @abstractmethod
    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        """Compute x W^T + bias + residual of a packed input row into `y_O`."""

    def gemv(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias [R, O], row by row."""
        y_RO = x_RI.new_empty(len(x_RI), self.out_features)
        for x_1I, y_O in zip(torch.split(x_RI, 1), y_RO, strict=True):
            self.gemv_packed(self.pack_input(x_1I, None), y_O, bias, None)
        return y_RO


def pack_inputs(
    matrices: Sequence[Packed4BitMatrix], x_1I: Tensor, norm: RmsNormParams | None
) -> Iterator[PackedInput]:
    """Yield the packed input row for each matrix of a fused linear.

    The row is packed once unless the columns of a matrix are permuted.
    """
    shared = matrices[0].pack_input(x_1I, norm)
    all_unpermuted = all(matrix.is_unpermuted for matrix in matrices)
    yield shared
    for matrix in matrices[1:]:
        yield shared if all_unpermuted else matrix.pack_input(x_1I, norm)
