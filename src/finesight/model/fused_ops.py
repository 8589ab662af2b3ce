"""Elementwise operations of transformer layers: fused Triton kernels, or eager torch.

Each operation saves only its inputs for the backward pass.

Shapes: T tokens or patches, H heads, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.kernels import elementwise, rotary
from finesight.model.kernels import swiglu as swiglu_kernels
from finesight.model.kernels.runtime import HAS_TRITON, NO_DROPOUT, get_device_capability

_KERNEL_TYPES = (torch.bfloat16, torch.float16)


def apply(function: type[torch.autograd.Function], *inputs: object) -> Tensor:
    """Apply an autograd function with one output."""
    y: Tensor = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return y


def apply_rotary(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Apply rotary embeddings: x cos + swap(x) sin."""
    return apply(_ApplyRotary, x_THD, cos_T1D, sin_T1D)


def quick_gelu(x_TD: Tensor) -> Tensor:
    """Compute quick GELU, x sigmoid(1.702 x)."""
    return apply(_QuickGelu, x_TD)


def swiglu(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    """Compute SwiGLU, silu(gate) * up (Shazeer 2020)."""
    return apply(_Swiglu, gate_TD, up_TD)


def sigmoid_gate(x_THD: Tensor, gate_THD: Tensor) -> Tensor:
    """Compute x sigmoid(gate)."""
    if not has_kernels(x_THD):
        return x_THD * gate_THD.sigmoid()
    return apply(_SigmoidGate, x_THD.contiguous(), gate_THD)


def norm_rotary(
    x_THD: Tensor, weight_D: Tensor, eps: float, weight_offset: float, *angles: Tensor
) -> Tensor:
    """Apply RMS norm and rotary position embeddings in one kernel.

    Requires Triton. The norm weight is weight + offset; R leading elements of a head are rotated by
    `angles`, the cosines and sines [T, 1, R].
    """
    return apply(_NormRotary, x_THD, weight_D, eps, weight_offset, *angles)


def swiglu_concat(gate_up_TF2: Tensor, padding: int) -> Tensor:
    """Compute SwiGLU of concatenated gate and up projections, with `padding` zero columns appended.

    Requires Triton kernels. The backward pass overwrites `gate_up_TF2`.
    """
    return apply(_SwigluConcat, gate_up_TF2, padding)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute RMS norm, x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""
    if x_TD.is_cuda or x_TD.dtype not in _KERNEL_TYPES:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    # For 16-bit dtypes on a CPU, torch saves fp32 copies of intermediate results for the backward
    # pass.
    return apply(RmsNormFunction, x_TD, weight_D, eps)


def dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Apply dropout with probability `p` (Srivastava et al. 2014).

    Returns:
        The scaled output, and the mask that `dropout_matmul` applies to gradients: flags of the
        retained elements on a GPU, indices of the dropped elements on a CPU.
    """
    if x.is_cuda:
        return torch.native_dropout(x, p, True)
    dropped_indices = draw_dropped_indices(x.numel(), p, x.device)
    return _zero_indices(x * (1.0 / (1.0 - p)), dropped_indices), dropped_indices


def dropout_matmul(x_TS: Tensor, y_SD: Tensor, dropout_mask: Tensor, p: float) -> Tensor:
    """Compute the matmul x y and apply the mask and scale of an earlier `dropout`."""
    scale = 1.0 / (1.0 - p)
    if dropout_mask.dtype == torch.bool:
        z: Tensor = torch.ops.aten.native_dropout_backward(x_TS @ y_SD, dropout_mask, scale)
        return z
    # With beta 0 the first operand only sets the dtype; its content is not read.
    return _zero_indices(torch.addmm(x_TS[:1, :1], x_TS, y_SD, beta=0, alpha=scale), dropout_mask)


def draw_dropped_indices(num_elements: int, p: float, device: torch.device) -> Tensor:
    """Sample the indices of dropped elements in ascending order; undefined on the meta device.

    On a CPU torch draws one random value per element. Here each random value is the gap to the next
    dropped element.
    """
    expected = num_elements * p
    if device.type == "meta":
        return torch.empty(round(expected), dtype=torch.int64, device=device)
    # Eight standard deviations of slack. Too few values have a probability of 1e-14 and would only
    # retain the last few elements.
    draws = int(expected + 8 * expected**0.5) + 16
    # With p below 1e-12, no tensor that fits into memory has a dropped element; log1p would become
    # 0.
    gaps = torch.rand(draws).neg_().log1p_().div_(math.log1p(-max(p, 1e-12)))
    indices = gaps.long().add_(1).cumsum(0).sub_(1)
    return indices[: int(torch.searchsorted(indices, num_elements))]


def _zero_indices(x: Tensor, indices: Tensor) -> Tensor:
    """Set elements of a contiguous tensor to zero in place."""
    x.view(-1).index_fill_(0, indices, 0)
    return x


def split_outputs(x: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    """Split the rows of a fused parameter by layer; None values for a missing parameter."""
    if x is None:
        return [None] * len(sizes)
    return torch.split(x, list(sizes))


def has_kernels(x: Tensor) -> bool:
    """Return True if Triton is installed and a tensor has 16-bit elements on a GPU."""
    return HAS_TRITON and x.is_cuda and x.dtype in _KERNEL_TYPES


def has_tensor_cores(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if Triton and flash attention can use tensor cores for this dtype."""
    is_16_bit_gpu = dtype in _KERNEL_TYPES and device.type != "cpu"
    return is_16_bit_gpu and get_device_capability(device) >= (8, 0)


class _ApplyRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotate(x_THD, cos_T1D, sin_T1D, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THD: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a rotation is the inverse rotation.
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotate(dy_THD, cos_T1D, sin_T1D, -1.0), None, None


def _rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float) -> Tensor:
    if has_kernels(x_THD):
        return rotary.apply_rotary(x_THD, cos_T1D, sin_T1D, sign)
    # Convert once: with mixed dtypes every operation would convert.
    wide_THD = x_THD.to(torch.promote_types(x_THD.dtype, cos_T1D.dtype))
    y_THD = wide_THD * cos_T1D
    wide_1, wide_2 = wide_THD.chunk(2, dim=-1)
    sin_1, sin_2 = sin_T1D.chunk(2, dim=-1)
    y_1, y_2 = y_THD.chunk(2, dim=-1)
    y_1.addcmul_(wide_2, sin_1, value=sign)
    y_2.addcmul_(wide_1, sin_2, value=sign)
    return y_THD.to(x_THD.dtype)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD)
        if has_kernels(x_TD):
            return elementwise.quick_gelu(x_TD)
        # silu(a x) / a needs less memory traffic, but rounds a x to 16 bits.
        return _quick_gelu_gate(x_TD).mul_(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> Tensor:
        (x_TD,) = ctx.saved_tensors
        gate_TD = _quick_gelu_gate(x_TD)
        slope_TD = torch.addcmul(gate_TD, x_TD * gate_TD, 1.0 - gate_TD, value=1.702)
        return dy_TD * slope_TD


def _quick_gelu_gate(x_TD: Tensor) -> Tensor:
    return (x_TD * 1.702).sigmoid_()


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TD: Tensor, up_TD: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TD, up_TD)
        if has_kernels(gate_TD):
            return elementwise.swiglu(gate_TD, up_TD)
        return F.silu(gate_TD).mul_(up_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_TD, up_TD = ctx.saved_tensors
        if has_kernels(gate_TD):
            return elementwise.swiglu_backward(gate_TD, up_TD, dy_TD)
        dgate_TD: Tensor = torch.ops.aten.silu_backward(dy_TD * up_TD, gate_TD)
        return dgate_TD, F.silu(gate_TD).mul_(dy_TD)


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, gate_THD: Tensor) -> Tensor:
        ctx.save_for_backward(x_THD, gate_THD)
        return elementwise.sigmoid_gate(x_THD, gate_THD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THD: Tensor) -> tuple[Tensor, Tensor]:
        x_THD, gate_THD = ctx.saved_tensors
        return elementwise.sigmoid_gate_backward(x_THD, gate_THD, dy_THD.contiguous())


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_THD: Tensor, weight_D: Tensor, eps: float, weight_offset: float, *angles: Tensor
    ) -> Tensor:
        y_THD, rstd_N = rotary.norm_rotary(x_THD, weight_D, eps, weight_offset, *angles)
        ctx.save_for_backward(x_THD, weight_D, *angles, rstd_N)
        ctx.weight_offset = weight_offset
        return y_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THD: Tensor) -> tuple[Tensor | None, ...]:
        x_THD, weight_D, cos_T1R, sin_T1R, rstd_N = ctx.saved_tensors
        dx_THD, dweight_D = rotary.norm_rotary_backward(
            x_THD,
            weight_D,
            ctx.weight_offset,
            cos_T1R,
            sin_T1R,
            rstd_N,
            dy_THD.contiguous(),
            needs_weight_grad=ctx.needs_input_grad[1],
        )
        return dx_THD, dweight_D, None, None, None, None


class _SwigluConcat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_TF2: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(gate_up_TF2)
        ctx.is_consumed = False
        y_TJ, _ = swiglu_kernels.swiglu_lora(gate_up_TF2, None, NO_DROPOUT, padding)
        return y_TJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TJ: Tensor) -> tuple[Tensor, None]:
        (gate_up_TF2,) = ctx.saved_tensors
        assert not ctx.is_consumed, "backward can run only once"
        ctx.is_consumed = True
        dy_TF = dy_TJ[:, : gate_up_TF2.shape[1] // 2]
        grads = swiglu_kernels.swiglu_lora_backward(gate_up_TF2, None, dy_TF, None, NO_DROPOUT)
        return grads.gate_up_TF2, None


class RmsNormFunction(torch.autograd.Function):
    """Autograd function of RMS norm, computed in fp32 (fp64 for fp64 inputs)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        rstd_T1 = wide_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, rstd_T1)
        return (wide_TD * rstd_T1).mul_(weight_D).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T1 = ctx.saved_tensors
        wide_TD = x_TD.to(rstd_T1.dtype)
        dwide_TD = dy_TD.to(rstd_T1.dtype)
        dweight_D = None
        if ctx.needs_input_grad[1]:
            dweight_D = (wide_TD * rstd_T1 * dwide_TD).flatten(0, -2).sum(0).to(weight_D.dtype)
        dwide_TD = dwide_TD * weight_D
        projection_T = torch.linalg.vecdot(dwide_TD, wide_TD).div_(wide_TD.shape[-1])
        projection_T1 = projection_T.unsqueeze(-1).mul_(rstd_T1).mul_(rstd_T1)
        dx_TD = dwide_TD.addcmul_(wide_TD, projection_T1, value=-1).mul_(rstd_T1)
        return dx_TD.to(x_TD.dtype), dweight_D, None
