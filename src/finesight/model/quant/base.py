"""Base classes of quantized weights, implemented by `nf4`, `int4`, `int8` and `fp8`.

Shapes: O outputs, I inputs of one layer, R input rows, N = I / 8 words of a row, G groups of
inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finesight.model.fused_ops import apply, has_tensor_cores, split_outputs
from finesight.model.kernels.runtime import HAS_TRITON

SAFETENSORS_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""Names of dense dtypes in settings, by their names in safetensors files."""

MAX_GEMV_ROWS = 8
"""Maximum number of input rows for GEMV kernels on quantized weights."""

MAX_GEMM_ROWS = 64
"""Maximum number of input rows for tensor-core (GEMM) kernels on quantized weights. With more rows
the weight is dequantized."""

CHUNK_ELEMENTS = 1 << 22
"""Maximum number of elements held in fp32 during quantization, and during dequantization without a
kernel."""


@dataclass(frozen=True)
class WeightTensorSpec:
    """Tensor in a weight file that a matrix is loaded from."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    load: Callable[[Tensor], None]


class QuantizedMatrix(nn.Module, ABC):
    """Frozen quantized matrix [O, I] with matmul kernels and dequantization.

    By default it is computed from a dense weight while loading, in chunks of rows. The codes of a
    row depend on that row alone.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    @property
    def num_elements(self) -> int:
        return self.out_features * self.in_features

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def tensor_specs(self) -> tuple[WeightTensorSpec, ...]:
        """Return the file tensors that the matrix is loaded from, by default a dense weight."""
        shape = self.out_features, self.in_features
        return (WeightTensorSpec("weight", shape, tuple(SAFETENSORS_DTYPES), self.quantize),)

    def quantize(self, values_OI: Tensor) -> None:
        """Quantize a dense matrix [O, I] on the device of the quantized weights."""
        for rows in self._row_chunks():
            self.quantize_rows(rows, values_OI[rows].to(self.device).float())

    def quantize_rows(self, rows: slice, values_RI: Tensor) -> None:
        raise NotImplementedError

    def dequantize_rows(self, rows: slice) -> Tensor:
        """Return the dequantized values of a range of rows, [R, I] in fp32."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrix [O, I] in bf16, fp16 or fp32, each element rounded once."""
        w_OI = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        for rows in self._row_chunks():
            w_OI[rows] = self.dequantize_rows(rows).to(dtype)
        return w_OI

    def _row_chunks(self) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, step):
            yield slice(start, start + step)

    @property
    def has_kernels(self) -> bool:
        """True if Triton kernels can run on the device of the codes."""
        return HAS_TRITON and self.device.type == "cuda"

    @abstractmethod
    def supports_kernels(self) -> bool:
        """Return True if the GEMV and GEMM kernels support this matrix and its device."""

    @abstractmethod
    def gemv(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias [R, O] with a GEMV kernel, row by row."""

    @abstractmethod
    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias [R, O] with a tensor-core kernel, for 16-bit rows."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias with autograd, [..., I] to [..., O]."""
        return apply(_QuantizedMatmul, x, bias, self)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias without autograd, by a kernel for quantized weights if possible."""
        num_rows = x.numel() // self.in_features
        if x.is_cuda and 0 < num_rows <= MAX_GEMM_ROWS and self.supports_kernels():
            use_gemm = num_rows > 1 and has_tensor_cores(x.dtype, x.device)
            if use_gemm or num_rows <= MAX_GEMV_ROWS:
                x_RI = x.reshape(num_rows, self.in_features).contiguous()
                y_RO = self.gemm(x_RI, bias) if use_gemm else self.gemv(x_RI, bias)
                return y_RO.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.dequantize(x.dtype), bias)


class _QuantizedMatmul(torch.autograd.Function):
    """Autograd function of x W^T + bias that dequantizes W again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: QuantizedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix.matmul(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.matrix.dequantize(dy.dtype), None, None


class Fp8Rows(NamedTuple):
    """Rows quantized to FP8, with the values `codes_TI` times `scales_T1`."""

    codes_TI: Tensor
    scales_T1: Tensor


class QuantizedWeight(nn.Module):
    """Quantized weight of a fused linear, with one matrix per layer."""

    def __init__(self, matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.layers = nn.ModuleList(matrices)

    @property
    def matrices(self) -> tuple[QuantizedMatrix, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, QuantizedMatrix))

    @property
    def device(self) -> torch.device:
        return self.matrices[0].device

    @property
    def num_elements(self) -> int:
        return sum(matrix.num_elements for matrix in self.matrices)

    def dequantize(self) -> Tensor:
        matrices = list(self.dequantize_layers())
        if len(matrices) == 1:
            return matrices[0]
        return torch.cat(matrices)

    def dequantize_layers(self) -> Iterator[Tensor]:
        """Yield the dequantized matrix [O, I] of each layer, one at a time."""
        for matrix in self.matrices:
            yield matrix.dequantize(self.dtype)

    def linear_per_layer(self, x: Tensor | Fp8Rows, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Compute x W_i^T + bias_i of each layer, with autograd unless `x` is FP8."""
        biases = split_outputs(bias, self.output_sizes)
        layers = zip(self.matrices, biases, strict=True)
        return tuple(matrix(require_dense(x), layer_bias) for matrix, layer_bias in layers)

    def add_input_gradient(self, dx_TI: Tensor, dys_TO: Sequence[Tensor]) -> None:
        """Add the input gradient of a fused linear, the sum of dy_i W_i, to `dx_TI`."""
        for dy_TO, w_OI in zip(dys_TO, self.dequantize_layers(), strict=True):
            dx_TI.addmm_(dy_TO, w_OI)

    def linear_concat(self, x_TI: Tensor | Fp8Rows, bias: Tensor | None) -> Tensor:
        return F.linear(require_dense(x_TI), self.dequantize(), bias)

    def linear_concat_backward(self, dy_TO: Tensor) -> Tensor:
        return dy_TO @ self.dequantize()

    @property
    def output_sizes(self) -> list[int]:
        """Number of outputs of each layer."""
        return [matrix.out_features for matrix in self.matrices]


def require_dense(x: Tensor | Fp8Rows) -> Tensor:
    """Return the input of a weight that is not FP8."""
    assert isinstance(x, Tensor), "FP8 input for a weight that is not FP8"
    return x


def find_quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a model by parameter name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedWeight)}


class RmsNormParams(NamedTuple):
    """RMS norm that is applied to the input row before a GEMV."""

    weight_I: Tensor
    eps: float


class PackedInput(NamedTuple):
    """Input row in the layout that GEMV kernels for 4-bit matrices read."""

    values_8N: Tensor
    group_sums_G: Tensor | None


class Packed4BitMatrix(QuantizedMatrix):
    """Quantized 4-bit matrix whose GEMV kernel requires a packed input row."""

    is_unpermuted = True
    """True if the columns are in their original order."""

    @abstractmethod
    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        """Pack an input row [1, I] for `gemv_packed`, after an optional RMS norm."""

    @abstractmethod
    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        """Compute x W^T + bias + residual of a packed input row into `y_O`."""

    def gemv(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        y_RO = x_RI.new_empty(len(x_RI), self.out_features)
        for x_1I, y_O in zip(torch.split(x_RI, 1), y_RO, strict=True):
            self.gemv_packed(self.pack_input(x_1I, None), y_O, bias, None)
        return y_RO


def pack_inputs(
    matrices: Sequence[Packed4BitMatrix], x_1I: Tensor, norm: RmsNormParams | None
) -> Iterator[PackedInput]:
    """Yield the packed input row for each matrix of a fused linear."""
    shared = matrices[0].pack_input(x_1I, norm)
    all_unpermuted = all(matrix.is_unpermuted for matrix in matrices)
    yield shared
    for matrix in matrices[1:]:
        if all_unpermuted:
            yield shared
        else:
            yield matrix.pack_input(x_1I, norm)
