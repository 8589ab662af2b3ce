"""Triton kernels for what eager torch does in several passes over memory.

Each does in one pass what its eager twin in `model.fused` does in several, and rounds to 16 bits
wherever the twin does: the results are the same but for the order of additions that the compiler
may fuse.

Shapes: T tokens or patches, H heads, D numbers of a head; E numbers of any shape, end to end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like

_WARPS = 4
_BLOCK = 4096
"""Numbers that one program of an elementwise kernel takes."""


@triton.jit
def _turn(x, y, cos, sin, stride_t, stride_h, heads, half, sign, round_first: tl.constexpr,
          block_h: tl.constexpr, block_f: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, f = tl.arange(0, block_h)[:, None], tl.arange(0, block_f)[None, :]
    inside_F, inside_HF = f < half, (h < heads) & (f < half)
    at = x + t * stride_t + h * stride_h + f
    x1 = tl.load(at, mask=inside_HF, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=inside_HF, other=0.0).to(tl.float32)
    angle = t * 2 * half + f
    cos1 = tl.load(cos + angle, mask=inside_F, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=inside_F, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=inside_F, other=0.0).to(tl.float32) * sign
    sin2 = tl.load(sin + angle + half, mask=inside_F, other=0.0).to(tl.float32) * sign
    straight1, straight2 = x1 * cos1, x2 * cos2
    if round_first:
        straight1 = straight1.to(y.dtype.element_ty).to(tl.float32)
        straight2 = straight2.to(y.dtype.element_ty).to(tl.float32)
    to = y + (t * heads + h) * 2 * half + f
    tl.store(to, straight1 + x2 * sin1, mask=inside_HF)
    tl.store(to + half, straight2 + x1 * sin2, mask=inside_HF)


def turned(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float) -> Tensor:
    """x cos + swap(x) sin sign, in fp32, in one piece; see `model.rope`."""
    tokens, heads, width = x_THD.shape
    x_THD = x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
    y_THD = x_THD.new_empty(x_THD.shape)
    half = width // 2
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    _turn[(tokens,)](
        x_THD, y_THD, cos_T1D, sin_T1D, x_THD.stride(0), x_THD.stride(1), heads, half, sign,
        round_first=cos_T1D.dtype == x_THD.dtype, block_h=blocks[0], block_f=blocks[1],
        num_warps=_WARPS,
    )  # fmt: skip
    return y_THD


@triton.jit
def quick_gelu_of(x, narrow: tl.constexpr):
    """x sigmoid(1.702 x) of numbers of 16 bits that stand in fp32, rounded to 16 bits."""
    scaled = (x * 1.702).to(narrow).to(tl.float32)
    gate = tl.sigmoid(scaled).to(narrow).to(tl.float32)
    return (x * gate).to(narrow)


@triton.jit
def _quick_gelu(x, y, total, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, quick_gelu_of(value, y.dtype.element_ty), mask=inside)


def quick_gelu(x_E: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    x_E = x_E.contiguous()
    y_E = empty_like(x_E)
    _quick_gelu[(triton.cdiv(x_E.numel(), _BLOCK),)](x_E, y_E, x_E.numel(), block=_BLOCK)
    return y_E


@triton.jit
def _gated(gate, up, y, total, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y.dtype.element_ty).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, silu * u, mask=inside)


@triton.jit
def _gated_back(gate, up, dy, dgate, dup, total, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    narrow = dgate.dtype.element_ty
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = (g * s).to(narrow).to(tl.float32)
    dsilu = (d * u).to(narrow).to(tl.float32)
    tl.store(dup + at, silu * d, mask=inside)
    tl.store(dgate + at, dsilu * s * (1.0 + g * (1.0 - s)), mask=inside)


def gated(gate_E: Tensor, up_E: Tensor) -> Tensor:
    """silu(gate) up."""
    gate_E, up_E = gate_E.contiguous(), up_E.contiguous()
    y_E = empty_like(gate_E)
    total = gate_E.numel()
    _gated[(triton.cdiv(total, _BLOCK),)](gate_E, up_E, y_E, total, block=_BLOCK)
    return y_E


def gated_back(gate_E: Tensor, up_E: Tensor, dy_E: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gated` by gate and by up."""
    gate_E, up_E, dy_E = gate_E.contiguous(), up_E.contiguous(), dy_E.contiguous()
    dgate_E, dup_E = empty_like(gate_E), empty_like(gate_E)
    total = gate_E.numel()
    grid = (triton.cdiv(total, _BLOCK),)
    _gated_back[grid](gate_E, up_E, dy_E, dgate_E, dup_E, total, block=_BLOCK)
    return dgate_E, dup_E
