"""Triton kernels of a step that fuse what lies between two readings of weights: a product of one
row with the norm before it or the gate or sum after it (of more rows, torch's are as quick), and
the turn of new heads on their way into the cache.

Sums are fp32; what the eager layers round to 16 bits on the way to a product is rounded once less
here. Shapes: R rows, I inputs, O outputs, S ranks of an adapter, H query heads, K key heads, D head
width. Imported only where Triton is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(x, norm, w, bias, low, ups, times, added, y, inputs, outputs, ranks, eps,
             is_normed: tl.constexpr, is_biased: tl.constexpr, is_adapted: tl.constexpr,
             is_gated: tl.constexpr, is_timed: tl.constexpr, is_added: tl.constexpr,
             block_o: tl.constexpr, block_i: tl.constexpr, block_s: tl.constexpr):  # fmt: skip
    o = tl.program_id(0) * block_o + tl.arange(0, block_o)
    places = tl.arange(0, block_i)
    inside_O = o < outputs
    w_at = w + o.to(tl.int64)[:, None] * inputs + places[None, :]
    up_at = w_at + outputs.to(tl.int64) * inputs
    sum_OI = tl.zeros((block_o, block_i), tl.float32)
    up_OI = tl.zeros((block_o, block_i), tl.float32)
    square_I = tl.zeros((block_i,), tl.float32)
    for start in range(0, inputs, block_i):
        inside_I = start + places < inputs
        inside = inside_O[:, None] & inside_I[None, :]
        x_I = tl.load(x + start + places, mask=inside_I, other=0.0).to(tl.float32)
        if is_normed:
            square_I += x_I * x_I
            x_I *= tl.load(norm + start + places, mask=inside_I, other=0.0).to(tl.float32)
        w_OI = tl.load(w_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
        sum_OI += w_OI.to(tl.float32) * x_I[None, :]
        if is_gated:
            w_OI = tl.load(up_at + start, mask=inside, other=0.0, eviction_policy="evict_first")
            up_OI += w_OI.to(tl.float32) * x_I[None, :]
    y_O = tl.sum(sum_OI, 1)
    up_O = tl.sum(up_OI, 1)
    if is_normed:
        scale = 1.0 / tl.sqrt(tl.sum(square_I, 0) / inputs + eps)
        y_O *= scale
        up_O *= scale
    if is_biased:
        y_O += tl.load(bias + o, mask=inside_O, other=0.0).to(tl.float32)
    if is_adapted:
        s = tl.arange(0, block_s)
        inside = inside_O[:, None] & (s < ranks)[None, :]
        at = ups + o.to(tl.int64)[:, None] * ranks + s[None, :]
        low_S = tl.load(low + s, mask=s < ranks, other=0.0).to(tl.float32)
        y_O += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32) * low_S[None, :], 1)
        if is_gated:
            at += outputs.to(tl.int64) * ranks
            up_O += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32) * low_S[None, :], 1)
    if is_timed:
        y_O *= tl.load(times + o, mask=inside_O, other=0.0).to(tl.float32)
    if is_gated:
        y_O = y_O * tl.sigmoid(y_O) * up_O
    if is_added:
        y_O += tl.load(added + o, mask=inside_O, other=0.0).to(tl.float32)
    tl.store(y + o, y_O, mask=inside_O)


@dataclass(frozen=True)
class Blocks:
    """How a product is shared out: outputs and inputs of a program at once, and its warps."""

    outputs: int
    inputs: int
    warps: int


def blocks_of(outputs: int, *, gated: bool, added: bool) -> Blocks:
    """What was quickest on an H200, of the shapes of the published models."""
    if outputs < 1024:
        # Of an adapter: there are more processors than outputs.
        return Blocks(1, 2048, 4)
    if gated:
        return Blocks(16, 256, 8)
    if added:
        return Blocks(4 if outputs >= 3072 else 2, 1024, 4)
    return Blocks(16, 256, 4) if outputs >= 65536 else Blocks(8, 512, 4)


class Update(NamedTuple):
    """What an adapter adds to a product: `low_1S` of its input by `ups_OS` of its outputs."""

    low_1S: Tensor
    ups_OS: Tensor


def product(
    x_1I: Tensor, w_OI: Tensor, *, norm_I: Tensor | None = None, eps: float = 0.0,
    bias_O: Tensor | None = None, update: Update | None = None, times_1O: Tensor | None = None,
    added_1O: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """norm(x) W^T + bias + update of one row, times `times_1O`: [1, O]. `gated`: the first half of
    the outputs is the gate of the second, and half as many come back. `added_1O` is added last."""
    assert len(x_1I) == 1, f"{len(x_1I)} rows"
    outputs = len(w_OI) // 2 if gated else len(w_OI)
    blocks = blocks_of(outputs, gated=gated, added=added_1O is not None)
    y_1O = torch.empty(1, outputs, dtype=x_1I.dtype, device=x_1I.device)
    low_1S, ups_OS = (None, None) if update is None else update
    ranks = 1 if low_1S is None else low_1S.shape[1]
    # What is not there is not read: any pointer does.
    norm, bias, low, ups, times, added = (
        x_1I if x is None else x for x in (norm_I, bias_O, low_1S, ups_OS, times_1O, added_1O)
    )
    _product[(triton.cdiv(outputs, blocks.outputs),)](
        x_1I.contiguous(), norm, w_OI, bias, low, ups, times, added, y_1O,
        x_1I.shape[1], outputs, ranks, eps,
        is_normed=norm_I is not None, is_biased=bias_O is not None, is_adapted=update is not None,
        is_gated=gated, is_timed=times_1O is not None, is_added=added_1O is not None,
        block_o=blocks.outputs, block_i=blocks.inputs, block_s=triton.next_power_of_2(ranks),
        num_warps=blocks.warps, num_stages=2,
    )  # fmt: skip
    return y_1O


@triton.jit
def _turn_in(q, k, v, q_norm, k_norm, cos, sin, at, q_to, keys, values, q_stride, k_stride,
             v_stride, heads, key_heads, half, eps, is_normed: tl.constexpr,
             round_first: tl.constexpr, block_f: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    f = tl.arange(0, block_f)
    inside = f < half
    place = tl.load(at + row)
    if head >= heads + key_heads:
        head = head - heads - key_heads
        source = v + row * v_stride + head * 2 * half + f
        to = values + (place * key_heads + head) * 2 * half + f
        tl.store(to, tl.load(source, mask=inside), mask=inside)
        tl.store(to + half, tl.load(source + half, mask=inside), mask=inside)
    else:
        if head < heads:
            source = q + row * q_stride + head * 2 * half + f
            to = q_to + (row * heads + head) * 2 * half + f
            norm = q_norm
        else:
            source = k + row * k_stride + (head - heads) * 2 * half + f
            to = keys + (place * key_heads + head - heads) * 2 * half + f
            norm = k_norm
        narrow = q_to.dtype.element_ty
        x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        if is_normed:
            mean = (tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / (2 * half)
            scale = 1.0 / tl.sqrt(mean + eps)
            x1 = x1 * scale * tl.load(norm + f, mask=inside, other=0.0).to(tl.float32)
            x2 = x2 * scale * tl.load(norm + half + f, mask=inside, other=0.0).to(tl.float32)
            x1, x2 = x1.to(narrow).to(tl.float32), x2.to(narrow).to(tl.float32)
        angle = row * 2 * half + f
        cos1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
        cos2 = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
        sin1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
        straight1, straight2 = x1 * cos1, x2 * cos2
        if round_first:
            straight1 = straight1.to(narrow).to(tl.float32)
            straight2 = straight2.to(narrow).to(tl.float32)
        tl.store(to, straight1 + x2 * sin1, mask=inside)
        tl.store(to + half, straight2 + x1 * sin2, mask=inside)


def turn_in(
    q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, norms: tuple[Tensor, Tensor, float] | None,
    cos_R1D: Tensor, sin_R1D: Tensor, at_R: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor,
) -> Tensor:  # fmt: skip
    """Norm and turn queries and keys; the keys and values into the cache at `at_R`, the queries
    back: [R, H, D]. `norms` are the weights of both norms and their eps."""
    rows, heads, width = q_RHD.shape
    q_norm, k_norm, eps = (cos_R1D, cos_R1D, 0.0) if norms is None else norms
    q_to = torch.empty(rows, heads, width, dtype=q_RHD.dtype, device=q_RHD.device)
    key_heads = k_RKD.shape[1]
    _turn_in[(rows, heads + 2 * key_heads)](
        q_RHD, k_RKD, v_RKD, q_norm, k_norm, cos_R1D, sin_R1D, at_R, q_to, keys_PSKD, values_PSKD,
        q_RHD.stride(0), k_RKD.stride(0), v_RKD.stride(0), heads, key_heads, width // 2, eps,
        is_normed=norms is not None, round_first=cos_R1D.dtype == q_RHD.dtype,
        block_f=triton.next_power_of_2(width // 2), num_warps=1,
    )  # fmt: skip
    return q_to


@triton.jit
def _gate(both, y, half, block: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * half + at, silu * up, mask=inside)


def gate(both_RX: Tensor) -> Tensor:
    """silu(first half) second half of each row."""
    rows, half = both_RX.shape[0], both_RX.shape[1] // 2
    y_RI = torch.empty(rows, half, dtype=both_RX.dtype, device=both_RX.device)
    _gate[(triton.cdiv(half, 1024), rows)](both_RX, y_RI, half, block=1024)
    return y_RI
