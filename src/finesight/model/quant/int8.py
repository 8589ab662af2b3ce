"""Frozen 8-bit weights with a scale per output: the base class of INT8 and FP8, and INT8.

Only weights are quantized, never activations: a matmul with many rows uses the dequantized matrix.
8-bit matmuls would be faster there, but they would round the prompt's tokens (in FP8 by up to 6 %
of an element) and not the tokens decoded after them.

Shapes: O outputs, I inputs of one layer, R rows of a chunk or of an input.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from finesight.model.kernels import quant_gemm as quant_gemm_kernels
from finesight.model.kernels import quant_gemv as quant_gemv_kernels
from finesight.model.quant.base import QuantizedMatrix

KERNEL_VECTOR_SIZE = 16
"""Number of inputs that a kernel reads at once, and divisor of supported row sizes."""


class RowwiseMatrix(QuantizedMatrix):
    """8-bit matrix [O, I] with the values `scales_O` times `codes_OI`.

    The largest magnitude of each output row has the code `max_code`.
    """

    codes_OI: Tensor
    scales_O: Tensor
    code_dtype: torch.dtype
    max_code: float

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        self.register_buffer(
            "codes_OI", torch.empty(out_features, in_features, dtype=self.code_dtype)
        )
        self.register_buffer("scales_O", torch.empty(out_features))

    @abstractmethod
    def round_to_codes(self, values_RI: Tensor) -> Tensor:
        """Round scaled values, with magnitudes up to `max_code`, to codes."""

    def quantize_rows(self, rows: slice, values_RI: Tensor) -> None:
        # A row of zeros has the scale 1, to avoid division by zero.
        amax_R = values_RI.abs().amax(1)
        scales_R = torch.where(amax_R > 0, amax_R / self.max_code, 1.0)
        self.codes_OI[rows] = self.round_to_codes(values_RI / scales_R[:, None])
        self.scales_O[rows] = scales_R

    def dequantize_rows(self, rows: slice) -> Tensor:
        return self.codes_OI[rows].float() * self.scales_O[rows, None]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.has_kernels:
            return quant_gemm_kernels.dequantize_rowwise(self.codes_OI, self.scales_O, dtype)
        return super().dequantize(dtype)

    def supports_kernels(self) -> bool:
        return self.in_features % KERNEL_VECTOR_SIZE == 0 and self.has_kernels

    def gemv(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        tiling = quant_gemv_kernels.choose_gemv_tiling(self.out_features, self.in_features)
        return quant_gemv_kernels.rowwise_gemv(x_RI, self.codes_OI, self.scales_O, bias, tiling)

    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        kernel = quant_gemm_kernels.rowwise_gemm_kernel
        weights = self.codes_OI, self.scales_O
        return quant_gemm_kernels.gemm(kernel, x_RI, weights, bias, self.out_features)


class Int8Matrix(RowwiseMatrix):
    """INT8 matrix with codes from -127 to 127."""

    code_dtype = torch.int8
    max_code = 127.0

    def round_to_codes(self, values_RI: Tensor) -> Tensor:
        return values_RI.round().clamp(-self.max_code, self.max_code).to(torch.int8)
