"""Frozen FP8 weights (e4m3, Micikevicius et al. 2022, arXiv:2209.05433), with FP8 matmuls.

On supported GPUs, FP8 matmuls have twice the throughput of 16-bit matmuls. Weights are quantized as
in `model.quant.int8`, with a scale per output. The other operand is quantized on the fly with a
scale per row: the layer's input in the forward pass, the output gradient in the backward pass. Rows
are quantized independently, so that a sample gives the same result in any packed batch. Gradients
use e4m3 as well: e5m2 has a wider range with one mantissa bit less, and row scales make the range
unnecessary.

In evaluation mode only the weights are in FP8. Evaluation during a run then matches later
inference, which never quantizes activations.

Shapes: T rows, O concatenated outputs of a fused linear, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.errors import UserError
from finesight.model.fused_ops import has_kernels, quick_gelu, split_outputs
from finesight.model.kernels import fp8_quantize as fp8_kernels
from finesight.model.kernels.runtime import HAS_TRITON, get_device_capability
from finesight.model.quant.base import Fp8Rows, QuantizedMatrix, QuantizedWeight
from finesight.model.quant.int8 import RowwiseMatrix


class Fp8Matrix(RowwiseMatrix):
    """FP8 matrix (e4m3, three mantissa bits)."""

    code_dtype = torch.float8_e4m3fn
    max_code = 448.0

    def round_to_codes(self, values_RI: Tensor) -> Tensor:
        # The next code after the largest value is NaN; clamp quotients that were rounded up.
        return values_RI.clamp(-self.max_code, self.max_code).to(torch.float8_e4m3fn)

    @property
    def has_kernels(self) -> bool:
        # Older GPUs cannot convert this dtype.
        return super().has_kernels and get_device_capability(self.device) >= (8, 9)


FP8_ALIGNMENT = 16
"""Divisor that FP8 tensor cores require of the inputs and of each layer's outputs."""

FP8_DTYPE = Fp8Matrix.code_dtype
"""Dtype of FP8 codes."""

FP8_MAX = Fp8Matrix.max_code
"""Largest FP8 value."""

MIN_AMAX = 1e-30
"""Lower bound of the largest magnitude of a row, so that the quantization factor is finite."""


def require_fp8_support(device: torch.device, setting: str) -> None:
    """Raise UserError if the GPU has no FP8 matmuls."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, without FP8 matmuls",
            where=setting,
            expected="8.9 or newer (Ada, Hopper, Blackwell), or a CPU, which emulates FP8",
            remedy=f"leave {setting} out",
        )


def empty_fp8_rows(x_TI: Tensor) -> Fp8Rows:
    scales_T1 = x_TI.new_empty(len(x_TI), 1, dtype=torch.float32)
    codes_TI = x_TI.new_empty(x_TI.shape, dtype=FP8_DTYPE)
    return Fp8Rows(codes_TI, scales_T1)


def quantize_fp8(
    x_TI: Tensor, column_scales_I: Tensor | None = None, *, gelu: bool = False
) -> Fp8Rows:
    """Quantize the rows of a tensor to FP8.

    Its columns are scaled before, or quick GELU is applied, if requested.
    """
    uses_kernel = has_kernels(x_TI) if gelu else HAS_TRITON and x_TI.is_cuda
    if uses_kernel:
        codes_TI, scales_T1 = fp8_kernels.quantize_fp8_rows(
            x_TI, column_scales_I, FP8_DTYPE, FP8_MAX, MIN_AMAX, gelu=gelu
        )
        return Fp8Rows(codes_TI, scales_T1)
    if gelu:
        return quantize_fp8(quick_gelu(x_TI), column_scales_I)
    wide_TI = x_TI.float() if column_scales_I is None else x_TI * column_scales_I
    amax_T1 = wide_TI.abs().amax(1, keepdim=True).clamp_min(MIN_AMAX)
    codes_TI = (wide_TI * (FP8_MAX / amax_T1)).to(FP8_DTYPE)
    return Fp8Rows(codes_TI, amax_T1 / FP8_MAX)


def fp8_linear(
    x: Fp8Rows, w_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute x W^T + bias [T, O] with FP8 operands and fp32 accumulation."""
    if not len(x.codes_TI):
        return w_OI.new_empty(0, len(w_OI), dtype=dtype)
    # With row scales, some GPUs support no output dtype wider than bf16.
    out_dtype = torch.float32
    if w_OI.is_cuda or dtype == torch.bfloat16:
        out_dtype = torch.bfloat16
    if bias_O is not None:
        bias_O = bias_O.to(out_dtype)
    y_TO = torch._scaled_mm(
        x.codes_TI,
        w_OI.t(),
        scale_a=x.scales_T1,
        scale_b=scales_O.unsqueeze(0),
        bias=bias_O,
        out_dtype=out_dtype,
        use_fast_accum=w_OI.is_cuda,
    )
    return y_TO.to(dtype)


class Fp8Weight(QuantizedWeight):
    """Weight of a fused linear that uses FP8 matmuls in training.

    The backward matmul is dy W = (dy s) C for W = s C with output scales s: it uses the same codes
    in the transposed layout. The transposed copy is created by the first backward pass, so that
    layers without one, as in a frozen vision encoder, never hold it.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], dtype: torch.dtype) -> None:
        super().__init__(matrices, dtype)
        self._forward_codes: tuple[Tensor, Tensor] | None = None
        self.backward_codes: tuple[Tensor, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Weight:
        # `nn.Module` would not move these copies with the codes: they are no buffers.
        self._forward_codes = self.backward_codes = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _fp8_matrices(self) -> list[Fp8Matrix]:
        return [layer for layer in self.layers if isinstance(layer, Fp8Matrix)]

    def _concatenate(self) -> tuple[Tensor, Tensor]:
        """Concatenate codes and scales of all layers; the layers' tensors become views of them."""
        if self._forward_codes is None:
            layers = self._fp8_matrices
            codes_OI = _concat([layer.codes_OI for layer in layers], 0)
            scales_O = _concat([layer.scales_O for layer in layers], 0)
            code_views = torch.split(codes_OI, self.output_sizes)
            scale_views = torch.split(scales_O, self.output_sizes)
            for layer, codes, scales in zip(layers, code_views, scale_views, strict=True):
                layer.codes_OI = codes
                layer.scales_O = scales
            self._forward_codes = codes_OI, scales_O
        return self._forward_codes

    def _transpose(self) -> tuple[Tensor, Tensor]:
        """Return the transposed codes, with unit scales."""
        if self.backward_codes is None:
            codes_IO = self._concatenate()[0].t().contiguous()
            unit_scales_I = codes_IO.new_ones(len(codes_IO), dtype=torch.float32)
            self.backward_codes = codes_IO, unit_scales_I
        return self.backward_codes

    def linear_per_layer(self, x: Tensor | Fp8Rows, bias: Tensor | None) -> tuple[Tensor, ...]:
        if isinstance(x, Fp8Rows):
            return self.linear_fp8(x, bias)
        if not self.training:
            return super().linear_per_layer(x, bias)
        x_TI = x.reshape(-1, x.shape[-1])
        ys_TO = _Fp8Linear.apply(x_TI, bias, self)  # type: ignore[no-untyped-call]
        return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[1]) for y_TO in ys_TO)

    def linear_fp8(
        self, x_TI: Tensor | Fp8Rows, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Compute x W_i^T + bias_i for each layer in FP8, without autograd."""
        rows, input_dtype = self._to_fp8_rows(x_TI)
        out_dtype = dtype or input_dtype
        biases = split_outputs(bias, self.output_sizes)
        layers = zip(self._fp8_matrices, biases, strict=True)
        return tuple(
            fp8_linear(rows, layer.codes_OI, layer.scales_O, layer_bias, out_dtype)
            for layer, layer_bias in layers
        )

    def linear_concat(self, x_TI: Tensor | Fp8Rows, bias: Tensor | None) -> Tensor:
        if not (self.training or isinstance(x_TI, Fp8Rows)):
            return super().linear_concat(x_TI, bias)
        rows, dtype = self._to_fp8_rows(x_TI)
        return fp8_linear(rows, *self._concatenate(), bias, dtype)

    def _to_fp8_rows(self, x_TI: Tensor | Fp8Rows) -> tuple[Fp8Rows, torch.dtype]:
        if isinstance(x_TI, Fp8Rows):
            return x_TI, self.dtype
        return quantize_fp8(x_TI), x_TI.dtype

    def linear_concat_backward(self, dy_TO: Tensor) -> Tensor:
        if not self.training:
            return super().linear_concat_backward(dy_TO)
        _, scales_O = self._concatenate()
        rows = quantize_fp8(dy_TO, scales_O)
        codes_IO, unit_scales_I = self._transpose()
        return fp8_linear(rows, codes_IO, unit_scales_I, None, dy_TO.dtype)

    def add_input_gradient(self, dx_TI: Tensor, dys_TO: Sequence[Tensor]) -> None:
        if not self.training:
            super().add_input_gradient(dx_TI, dys_TO)
            return
        dx_TI.add_(self.linear_concat_backward(_concat(dys_TO, 1)))


def _concat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


class _Fp8Linear(torch.autograd.Function):
    """Autograd function of x W_i^T + bias_i for each layer; saves no activations."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, bias_O: Tensor | None, weight: Fp8Weight
    ) -> tuple[Tensor, ...]:
        ctx.weight = weight
        return weight.linear_fp8(x_TI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys_TO: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.weight.linear_concat_backward(_concat(dys_TO, 1)), None, None
