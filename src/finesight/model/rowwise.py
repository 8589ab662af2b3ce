"""Frozen weights in a byte a number, a scale for each output: int8, symmetric, and FP8 (e4m3 of
Micikevicius et al. 2022, arXiv:2209.05433).

Only weights are in a byte, never what is multiplied with them: a product of many rows is of the
matrix made in full. Products of FP8 by FP8 would be quicker there, and their rounding (up to 6 % of
a number) would make a prompt's tokens other ones than those that follow it are computed from.

Shapes: O outputs, I inputs of one layer.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from finesight.model.frozen import KERNELS, DenseSource

if KERNELS:
    from finesight.model.kernels import row as row_kernels
    from finesight.model.kernels import tile as tile_kernels

PIECE = 16
"""Inputs that a kernel reads at once."""


class RowwiseMatrix(DenseSource):
    """A frozen matrix [O, I]: `scales_O` times `codes_OI`. An output's largest magnitude is at
    `most`, the largest code."""

    codes_OI: Tensor
    scales_O: Tensor
    kind: torch.dtype
    most: float

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)
        self.register_buffer("codes_OI", torch.empty(outputs, inputs, dtype=self.kind))
        self.register_buffer("scales_O", torch.empty(outputs))

    @abstractmethod
    def nearest(self, values_RI: Tensor) -> Tensor:
        """Codes of numbers up to `most`."""

    def take(self, some: slice, values_RI: Tensor) -> None:
        """Quantise these outputs, [R, I] in fp32."""
        # An output of zeros has the scale 1: nothing is divided by zero.
        largest_R = values_RI.abs().amax(1)
        scales_R = torch.where(largest_R > 0, largest_R / self.most, 1.0)
        self.codes_OI[some] = self.nearest(values_RI / scales_R[:, None])
        self.scales_O[some] = scales_R

    def values(self, some: slice) -> Tensor:
        """What the codes of these outputs stand for."""
        return self.codes_OI[some].float() * self.scales_O[some, None]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], made anew, each number rounded once."""
        if self._has_kernels():
            return tile_kernels.whole_bytes(self.codes_OI, self.scales_O, dtype)
        return super().dense(dtype)

    def _has_kernels(self) -> bool:
        return KERNELS and self.codes_OI.is_cuda

    def fits(self) -> bool:
        """Whether its rows are whole pieces."""
        return self.inputs % PIECE == 0 and self._has_kernels()

    def rows(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, row by row."""
        plan = row_kernels.plan(self.outputs, self.inputs)
        return row_kernels.byte_rows(x_RI, self.codes_OI, self.scales_O, bias, plan)

    def tiles(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias by tensor cores."""
        plan = tile_kernels.plan(self.outputs, len(x_RI))
        return tile_kernels.byte_tiles(x_RI, self.codes_OI, self.scales_O, bias, plan)


class Int8Matrix(RowwiseMatrix):
    """In whole numbers from -127 to 127: no number is off by more than half a scale, 1/254 of its
    output's largest."""

    kind = torch.int8
    most = 127.0

    def nearest(self, values_RI: Tensor) -> Tensor:
        """The nearest whole numbers."""
        return values_RI.round().clamp(-self.most, self.most).to(torch.int8)


class Fp8Matrix(RowwiseMatrix):
    """In floats of three bits after the first: no number is off by more than a sixteenth of itself
    or 2^-10 of a scale, whichever is more."""

    kind = torch.float8_e4m3fn
    most = 448.0

    def nearest(self, values_RI: Tensor) -> Tensor:
        """The nearest numbers that there are."""
        # Beyond the largest there is only NaN: what division rounded up stays below.
        return values_RI.clamp(-self.most, self.most).to(torch.float8_e4m3fn)

    def _has_kernels(self) -> bool:
        # Older cards do not convert these numbers.
        return super()._has_kernels() and torch.cuda.get_device_capability(self.device) >= (8, 9)
