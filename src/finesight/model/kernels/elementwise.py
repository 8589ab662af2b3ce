"""Elementwise Triton kernels for operations that need several memory passes in eager torch.

Those with an eager counterpart in `model.fused_ops` round to 16 bits at the same points. The
results are equal except where the compiler fuses a multiplication and an addition.

Shapes: T tokens or patches, H heads, D head dimension, E elements of a contiguous tensor.
"""

from __future__ import annotations

from torch import Tensor, empty_like

from finesight.model.kernels.runtime import jit, tl, triton

_WARPS = 4

_GATE_ROWS = 8
"""Heads per program of the sigmoid gate."""

_BLOCK = 4096
"""Elements per program of an elementwise kernel."""


@jit
def _rotary_kernel(
    x, y, cos, sin, stride_t, stride_h, num_heads, half, sign, round_first: tl.constexpr,
    block_h: tl.constexpr, block_f: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, f = tl.arange(0, block_h)[:, None], tl.arange(0, block_f)[None, :]
    mask_F, mask_HF = f < half, (h < num_heads) & (f < half)
    ptrs = x + t * stride_t + h * stride_h + f
    x1 = tl.load(ptrs, mask=mask_HF, other=0.0).to(tl.float32)
    x2 = tl.load(ptrs + half, mask=mask_HF, other=0.0).to(tl.float32)
    angle = t * 2 * half + f
    cos1 = tl.load(cos + angle, mask=mask_F, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=mask_F, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=mask_F, other=0.0).to(tl.float32) * sign
    sin2 = tl.load(sin + angle + half, mask=mask_F, other=0.0).to(tl.float32) * sign
    cos_term1, cos_term2 = x1 * cos1, x2 * cos2
    if round_first:
        cos_term1 = cos_term1.to(y.dtype.element_ty).to(tl.float32)
        cos_term2 = cos_term2.to(y.dtype.element_ty).to(tl.float32)
    out_ptrs = y + (t * num_heads + h) * 2 * half + f
    tl.store(out_ptrs, cos_term1 + x2 * sin1, mask=mask_HF)
    tl.store(out_ptrs + half, cos_term2 + x1 * sin2, mask=mask_HF)


def apply_rotary(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float) -> Tensor:
    """Apply rotary embeddings, x cos + sign swap(x) sin, in fp32; see `model.layers`."""
    tokens, num_heads, head_dim = x_THD.shape
    x_THD = x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
    y_THD = x_THD.new_empty(x_THD.shape)
    half = head_dim // 2
    blocks = triton.next_power_of_2(num_heads), triton.next_power_of_2(half)
    _rotary_kernel[(tokens,)](
        x_THD, y_THD, cos_T1D, sin_T1D, x_THD.stride(0), x_THD.stride(1), num_heads, half, sign,
        round_first=cos_T1D.dtype == x_THD.dtype, block_h=blocks[0], block_f=blocks[1],
        num_warps=_WARPS,
    )  # fmt: skip
    return y_THD


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
def _swiglu_kernel(gate, up, y, total, block: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < total
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    u = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, silu * u, mask=mask)


@jit
def _swiglu_backward_kernel(gate, up, dy, dgate, dup, total, block: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = offsets < total
    narrow = dgate.dtype.element_ty
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = (g * s).to(narrow).to(tl.float32)
    dsilu = (d * u).to(narrow).to(tl.float32)
    tl.store(dup + offsets, silu * d, mask=mask)
    tl.store(dgate + offsets, dsilu * s * (1.0 + g * (1.0 - s)), mask=mask)


def swiglu(gate_E: Tensor, up_E: Tensor) -> Tensor:
    """Compute SwiGLU, silu(gate) * up."""
    gate_E, up_E = gate_E.contiguous(), up_E.contiguous()
    y_E = empty_like(gate_E)
    total = gate_E.numel()
    _swiglu_kernel[(triton.cdiv(total, _BLOCK),)](gate_E, up_E, y_E, total, block=_BLOCK)
    return y_E


def swiglu_backward(gate_E: Tensor, up_E: Tensor, dy_E: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of SwiGLU for the gate and up projections."""
    gate_E, up_E, dy_E = gate_E.contiguous(), up_E.contiguous(), dy_E.contiguous()
    dgate_E, dup_E = empty_like(gate_E), empty_like(gate_E)
    total = gate_E.numel()
    grid = (triton.cdiv(total, _BLOCK),)
    _swiglu_backward_kernel[grid](gate_E, up_E, dy_E, dgate_E, dup_E, total, block=_BLOCK)
    return dgate_E, dup_E


@jit
def _sigmoid_gate_kernel(
    x, gate, y, stride_t, stride_h, rows, heads: tl.constexpr, width: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    m, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_d)
    mask = (m < rows)[:, None] & (d < width)[None, :]
    gate_rows = (m // heads).to(tl.int64) * stride_t + (m % heads) * stride_h
    g = tl.load(gate + gate_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = m.to(tl.int64)[:, None] * width + d[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, value * tl.sigmoid(g), mask=mask)


@jit
def _sigmoid_gate_backward_kernel(
    x, gate, dy, dx, dgate, stride_t, stride_h, rows, heads: tl.constexpr, width: tl.constexpr,
    block_m: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    m, d = tl.program_id(0) * block_m + tl.arange(0, block_m), tl.arange(0, block_d)
    mask = (m < rows)[:, None] & (d < width)[None, :]
    gate_rows = (m // heads).to(tl.int64) * stride_t + (m % heads) * stride_h
    g = tl.load(gate + gate_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = m.to(tl.int64)[:, None] * width + d[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dx + offsets, grad * s, mask=mask)
    tl.store(dgate + offsets, grad * value * s * (1.0 - s), mask=mask)


def sigmoid_gate(x_THD: Tensor, gate_THD: Tensor) -> Tensor:
    """Compute x sigmoid(gate); tokens and heads of the gate may be strided."""
    tokens, heads, width = x_THD.shape
    y_THD = empty_like(x_THD)
    _sigmoid_gate_kernel[(triton.cdiv(tokens * heads, _GATE_ROWS),)](
        x_THD, gate_THD, y_THD, gate_THD.stride(0), gate_THD.stride(1), tokens * heads, heads=heads,
        width=width, block_m=_GATE_ROWS, block_d=triton.next_power_of_2(width),
    )  # fmt: skip
    return y_THD


def sigmoid_gate_backward(x_THD: Tensor, gate_THD: Tensor, dy_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `sigmoid_gate`."""
    tokens, heads, width = x_THD.shape
    dx_THD, dgate_THD = empty_like(x_THD), empty_like(x_THD)
    _sigmoid_gate_backward_kernel[(triton.cdiv(tokens * heads, _GATE_ROWS),)](
        x_THD, gate_THD, dy_THD, dx_THD, dgate_THD, gate_THD.stride(0), gate_THD.stride(1),
        tokens * heads, heads=heads, width=width, block_m=_GATE_ROWS,
        block_d=triton.next_power_of_2(width),
    )  # fmt: skip
    return dx_THD, dgate_THD
