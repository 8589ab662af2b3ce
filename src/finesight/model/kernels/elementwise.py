"""Elementwise Triton kernels for operations that need several memory passes in eager torch.

Those with an eager counterpart in `model.fused_ops` round to 16 bits at the same points. The
results are equal except where the compiler fuses a multiplication and an addition.

Shapes: T tokens or patches, H heads, D head dimension, E elements of a contiguous tensor.
"""

from __future__ import annotations

from torch import Tensor, empty_like

from finesight.model.kernels.runtime import jit, tl, triton

_GATE_ROWS = 8
"""Heads per program of the sigmoid gate."""

_BLOCK = 4096
"""Elements per program of an elementwise kernel."""


@jit
def quick_gelu_rounded(x, narrow: tl.constexpr):
    """Compute quick GELU, x sigmoid(1.702 x), with the rounding of eager torch.

    `x` holds values of the 16-bit dtype `narrow` in fp32.
    """
    scaled = (x * 1.702).to(narrow).to(tl.float32)
    gate = tl.sigmoid(scaled).to(narrow).to(tl.float32)
    return (x * gate).to(narrow)


@jit
def _quick_gelu_kernel(x, y, total, block: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < total
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, quick_gelu_rounded(value, y.dtype.element_ty), mask=mask)


def quick_gelu(x_E: Tensor) -> Tensor:
    """Compute quick GELU, x sigmoid(1.702 x), of a 16-bit tensor."""
    x_E = x_E.contiguous()
    y_E = empty_like(x_E)
    _quick_gelu_kernel[(triton.cdiv(x_E.numel(), _BLOCK),)](x_E, y_E, x_E.numel(), block=_BLOCK)
    return y_E


@jit
def _swiglu_kernel(gate, up, dy, out, dgate, total, is_backward: tl.constexpr, block: tl.constexpr):
    """Compute the result, or the gradients of the up projection and the gate."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < total
    narrow = out.dtype.element_ty
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = (g * s).to(narrow).to(tl.float32)
    if is_backward:
        d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        dsilu = (d * u).to(narrow).to(tl.float32)
        tl.store(out + offsets, silu * d, mask=mask)
        tl.store(dgate + offsets, dsilu * s * (1.0 + g * (1.0 - s)), mask=mask)
    else:
        tl.store(out + offsets, silu * u, mask=mask)


def swiglu(gate_E: Tensor, up_E: Tensor) -> Tensor:
    """Compute SwiGLU, silu(gate) * up."""
    gate_E, up_E = gate_E.contiguous(), up_E.contiguous()
    y_E, total = empty_like(gate_E), gate_E.numel()
    _swiglu_kernel[(triton.cdiv(total, _BLOCK),)](
        gate_E, up_E, gate_E, y_E, y_E, total, is_backward=False, block=_BLOCK
    )
    return y_E


def swiglu_backward(gate_E: Tensor, up_E: Tensor, dy_E: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of SwiGLU for the gate and up projections."""
    gate_E, up_E, dy_E = gate_E.contiguous(), up_E.contiguous(), dy_E.contiguous()
    dgate_E, dup_E, total = empty_like(gate_E), empty_like(gate_E), gate_E.numel()
    _swiglu_kernel[(triton.cdiv(total, _BLOCK),)](
        gate_E, up_E, dy_E, dup_E, dgate_E, total, is_backward=True, block=_BLOCK
    )
    return dgate_E, dup_E


@jit
def _sigmoid_gate_kernel(
    x, gate, dy, out, dgate, stride_t, stride_h, rows, heads: tl.constexpr, width: tl.constexpr,
    is_backward: tl.constexpr, block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Compute the result, or the gradients of input and gate."""
    m, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_d)
    mask = (m < rows)[:, None] & (d < width)[None, :]
    gate_rows = (m // heads).to(tl.int64) * stride_t + (m % heads) * stride_h
    g = tl.load(gate + gate_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = m.to(tl.int64)[:, None] * width + d[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    if is_backward:
        grad = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets, grad * s, mask=mask)
        tl.store(dgate + offsets, grad * value * s * (1.0 - s), mask=mask)
    else:
        tl.store(out + offsets, value * s, mask=mask)


def sigmoid_gate(x_THD: Tensor, gate_THD: Tensor) -> Tensor:
    """Compute x sigmoid(gate); tokens and heads of the gate may be strided."""
    return _launch_sigmoid_gate(x_THD, gate_THD, None)[0]


def sigmoid_gate_backward(x_THD: Tensor, gate_THD: Tensor, dy_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `sigmoid_gate`."""
    return _launch_sigmoid_gate(x_THD, gate_THD, dy_THD)


def _launch_sigmoid_gate(
    x_THD: Tensor, gate_THD: Tensor, dy_THD: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, heads, width = x_THD.shape
    out_THD = empty_like(x_THD)
    dgate_THD = out_THD if dy_THD is None else empty_like(x_THD)
    _sigmoid_gate_kernel[(triton.cdiv(tokens * heads, _GATE_ROWS),)](
        x_THD, gate_THD, x_THD if dy_THD is None else dy_THD, out_THD, dgate_THD,
        gate_THD.stride(0), gate_THD.stride(1), tokens * heads, heads=heads, width=width,
        is_backward=dy_THD is not None, block_m=_GATE_ROWS, block_d=triton.next_power_of_2(width),
    )  # fmt: skip
    return out_THD, dgate_THD
