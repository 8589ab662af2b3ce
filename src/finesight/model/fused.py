"""What layers do to their activations number by number: one kernel where Triton is, eager else.

Each keeps only its inputs for the backward pass. Shapes: T tokens or patches, H heads, D width.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_TRITON = find_spec("triton") is not None
_KERNEL_TYPES = (torch.bfloat16, torch.float16)

if _TRITON:
    from finesight.model import kernels


def turn(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """x cos + swap(x) sin, where swap exchanges the halves of a head and `sin` carries the minus
    of its first half; computed in the wider of both types, returned in that of `x`."""
    turned_THD: Tensor = _Turn.apply(x_THD, cos_T1D, sin_T1D)  # type: ignore[no-untyped-call]
    return turned_THD


def quick_gelu(x_TD: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    y_TD: Tensor = _QuickGelu.apply(x_TD)  # type: ignore[no-untyped-call]
    return y_TD


def gated(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    """silu(gate) up (Shazeer 2020)."""
    y_TD: Tensor = _Gated.apply(gate_TD, up_TD)  # type: ignore[no-untyped-call]
    return y_TD


def _has_kernels(x: Tensor) -> bool:
    """Kernels are for 16-bit numbers on a card: these wait for memory, not for arithmetic."""
    return _TRITON and x.is_cuda and x.dtype in _KERNEL_TYPES


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _turned(x_THD, cos_T1D, sin_T1D, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THD: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a turn is the turn back.
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _turned(dy_THD, cos_T1D, sin_T1D, -1.0), None, None


def _turned(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float) -> Tensor:
    if _has_kernels(x_THD):
        return kernels.turned(x_THD, cos_T1D, sin_T1D, sign)
    straight_THD = x_THD * cos_T1D
    y_THD = x_THD.new_empty(x_THD.shape)
    halves = (x.chunk(2, dim=-1) for x in (straight_THD, x_THD, sin_T1D, y_THD))
    (straight_1, straight_2), (x_1, x_2), (sin_1, sin_2), (y_1, y_2) = halves
    torch.addcmul(straight_1, x_2, sin_1, value=sign, out=y_1)
    torch.addcmul(straight_2, x_1, sin_2, value=sign, out=y_2)
    return y_THD


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD)
        # silu(a x) / a is the same with less traffic, but rounds a x where it matters in 16 bits.
        return kernels.quick_gelu(x_TD) if _has_kernels(x_TD) else x_TD * _gate(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> Tensor:
        (x_TD,) = ctx.saved_tensors
        gate_TD = _gate(x_TD)
        slope_TD = torch.addcmul(gate_TD, x_TD * gate_TD, 1.0 - gate_TD, value=1.702)
        return dy_TD * slope_TD


def _gate(x_TD: Tensor) -> Tensor:
    return torch.sigmoid(x_TD * 1.702)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TD: Tensor, up_TD: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TD, up_TD)
        if _has_kernels(gate_TD):
            return kernels.gated(gate_TD, up_TD)
        return F.silu(gate_TD).mul_(up_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_TD, up_TD = ctx.saved_tensors
        if _has_kernels(gate_TD):
            return kernels.gated_back(gate_TD, up_TD, dy_TD)
        dgate_TD: Tensor = torch.ops.aten.silu_backward(dy_TD * up_TD, gate_TD)
        return dgate_TD, F.silu(gate_TD).mul_(dy_TD)
