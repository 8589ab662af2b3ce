"""What layers do to their activations number by number: one kernel where Triton is, eager else.

Each keeps only its inputs for the backward pass. Shapes: T tokens or patches, H heads, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from finesight.model.frozen import KERNELS

_KERNEL_TYPES = (torch.bfloat16, torch.float16)

if KERNELS:
    from finesight.model.kernels import elementwise
    from finesight.model.kernels import gate as gate_kernels
    from finesight.model.kernels.drop import UNDROPPED


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


def gated_jointly(both_TF2: Tensor, room: int) -> Tensor:
    """`gated` of what lies side by side, gate before up, with so many zeros behind each row. Only
    where there are kernels; what is given is overwritten on the way back."""
    y_TJ: Tensor = _GatedJointly.apply(both_TF2, room)  # type: ignore[no-untyped-call]
    return y_TJ


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight (Zhang & Sennrich 2019), rounded once."""
    if x_TD.is_cuda or x_TD.dtype not in _KERNEL_TYPES:
        return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    # For 16-bit numbers on a CPU, torch keeps a wide copy of each step for its backward pass.
    y_TD: Tensor = RmsNormed.apply(x_TD, weight_D, eps)  # type: ignore[no-untyped-call]
    return y_TD


def drop(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """`x` with about `share` of its numbers set to zero and the others scaled up (Srivastava et al.
    2014), and what `dropped_product` needs to do the same to a gradient."""
    if x.is_cuda:
        return torch.native_dropout(x, share, True)
    dropped = _drawn(x.numel(), share)
    return _without(x * (1.0 / (1.0 - share)), dropped), dropped


def dropped_product(x_TS: Tensor, y_SD: Tensor, dropped: Tensor, share: float) -> Tensor:
    """x y, set to zero where `drop` did so to another tensor, and scaled up like that."""
    scale = 1.0 / (1.0 - share)
    if dropped.dtype == torch.bool:
        z: Tensor = torch.ops.aten.native_dropout_backward(x_TS @ y_SD, dropped, scale)
        return z
    # With beta 0 the first operand only gives the type, its content is not read.
    return _without(torch.addmm(x_TS[:1, :1], x_TS, y_SD, beta=0, alpha=scale), dropped)


def _drawn(number: int, share: float) -> Tensor:
    """Which of so many numbers are dropped, ascending. On a CPU torch draws for one number after
    the other; here a draw says how many are kept before the next that is not."""
    expected = number * share
    # Eight deviations more: not to reach the end is a matter of 10^14 draws, and then means that
    # the last few numbers are kept.
    draws = int(expected + 8 * expected**0.5) + 16
    # Below 1e-12 not one of as many numbers as fit into memory is dropped; log1p would become 0.
    kept = torch.rand(draws).neg_().log1p_().div_(math.log1p(-max(share, 1e-12)))
    places = kept.long().add_(1).cumsum(0).sub_(1)
    return places[: int(torch.searchsorted(places, number))]


def _without(x: Tensor, dropped: Tensor) -> Tensor:
    """`x`, which lies in one piece, with zeros at these places."""
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def has_kernels(x: Tensor) -> bool:
    """Kernels are for 16-bit numbers on a card: these wait for memory, not for arithmetic."""
    return KERNELS and x.is_cuda and x.dtype in _KERNEL_TYPES


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
    if has_kernels(x_THD):
        return elementwise.turned(x_THD, cos_T1D, sin_T1D, sign)
    # Widened once: numbers of different types are widened in every operation.
    wide_THD = x_THD.to(torch.promote_types(x_THD.dtype, cos_T1D.dtype))
    y_THD = wide_THD * cos_T1D
    halves = (x.chunk(2, dim=-1) for x in (wide_THD, sin_T1D, y_THD))
    (wide_1, wide_2), (sin_1, sin_2), (y_1, y_2) = halves
    y_1.addcmul_(wide_2, sin_1, value=sign)
    y_2.addcmul_(wide_1, sin_2, value=sign)
    return y_THD.to(x_THD.dtype)


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD)
        # silu(a x) / a is the same with less traffic, but rounds a x where it matters in 16 bits.
        return elementwise.quick_gelu(x_TD) if has_kernels(x_TD) else _gate(x_TD).mul_(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> Tensor:
        (x_TD,) = ctx.saved_tensors
        gate_TD = _gate(x_TD)
        slope_TD = torch.addcmul(gate_TD, x_TD * gate_TD, 1.0 - gate_TD, value=1.702)
        return dy_TD * slope_TD


def _gate(x_TD: Tensor) -> Tensor:
    return (x_TD * 1.702).sigmoid_()


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TD: Tensor, up_TD: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TD, up_TD)
        if has_kernels(gate_TD):
            return elementwise.gated(gate_TD, up_TD)
        return F.silu(gate_TD).mul_(up_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_TD, up_TD = ctx.saved_tensors
        if has_kernels(gate_TD):
            return elementwise.gated_back(gate_TD, up_TD, dy_TD)
        dgate_TD: Tensor = torch.ops.aten.silu_backward(dy_TD * up_TD, gate_TD)
        return dgate_TD, F.silu(gate_TD).mul_(dy_TD)


class _GatedJointly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_TF2: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(both_TF2)
        ctx.gone = False
        y_TJ, _ = gate_kernels.gated_low(both_TF2, None, UNDROPPED, room)
        return y_TJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TJ: Tensor) -> tuple[Tensor, None]:
        (both_TF2,) = ctx.saved_tensors
        assert not ctx.gone, "a second way back"
        ctx.gone = True
        dy_TF = dy_TJ[:, : both_TF2.shape[1] // 2]
        return gate_kernels.gated_low_back(both_TF2, None, dy_TF, None, UNDROPPED).both_TF2, None


class RmsNormed(torch.autograd.Function):
    """`rms_norm` that computes in fp32, or in fp64 where its inputs are."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        scale_T1 = wide_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return (wide_TD * scale_T1).mul_(weight_D).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        wide_TD, dwide_TD = x_TD.to(scale_T1.dtype), dy_TD.to(scale_T1.dtype)
        dweight_D = None
        if ctx.needs_input_grad[1]:
            dweight_D = (wide_TD * scale_T1 * dwide_TD).flatten(0, -2).sum(0).to(weight_D.dtype)
        dwide_TD = dwide_TD * weight_D
        along_T = torch.linalg.vecdot(dwide_TD, wide_TD).div_(wide_TD.shape[-1])
        along_T1 = along_T.unsqueeze(-1).mul_(scale_T1).mul_(scale_T1)
        dx_TD = dwide_TD.addcmul_(wide_TD, along_T1, value=-1).mul_(scale_T1)
        return dx_TD.to(x_TD.dtype), dweight_D, None
