"""Attention backends of packed sequences: length buckets, explicit matmuls on a CPU, reference."""

import pytest
import torch
from hf_reference import CPU, max_relative_error
from torch import Tensor

from finesight.model.attention import (
    Segments,
    SharedPrefixAttention,
    bucket_by_length,
    bucket_with_padding,
    bucketed_attention,
    cpu_attention,
    varlen_attention,
)

MIXED_LENGTHS = [5, 9, 40, 33, 5, 64, 1, 70]


def reference_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], causal: bool
) -> Tensor:
    """Compute attention in fp64, one segment and head at a time."""
    shared = q_THD.shape[1] // k_TKD.shape[1]
    o_THD = torch.zeros_like(q_THD)
    start = 0
    for length in lengths:
        at = slice(start, start + length)
        for head in range(q_THD.shape[1]):
            q, k, v = q_THD[at, head], k_TKD[at, head // shared], v_TKD[at, head // shared]
            scores = q @ k.T / q.shape[-1] ** 0.5
            if causal:
                hidden = torch.ones(length, length, device=q.device).triu(1).bool()
                scores = scores.masked_fill(hidden, float("-inf"))
            o_THD[at, head] = scores.softmax(-1) @ v
        start += length
    return o_THD


def random_qkv(
    total: int, heads: int, kv_heads: int, dtype: torch.dtype, width: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, count, width) for count in (heads, kv_heads, kv_heads)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in values]


def with_gradients(found: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    # Values representable in bf16, so that every dtype has equal inputs.
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [found, *torch.autograd.grad((found * weights.to(found.dtype)).sum(), inputs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [1, 5, 2], [3, 1, 3, 1, 1, 3], MIXED_LENGTHS])
def test_segments_attend_only_to_themselves(lengths, kv_heads, causal):
    inputs = random_qkv(sum(lengths), 4, kv_heads, torch.float64)
    buckets = bucket_by_length(lengths, CPU)
    results = [
        varlen_attention(*inputs, Segments.from_lengths(lengths, CPU), causal=causal),
        bucketed_attention(*inputs, buckets, causal),
        cpu_attention(*inputs, buckets, causal=causal),
    ]
    if causal:
        results.append(cpu_attention(*inputs, bucket_with_padding(lengths, CPU), causal=True))
    expected = with_gradients(reference_attention(*inputs, lengths, causal), inputs)
    for result in results:
        assert max(map(max_relative_error, with_gradients(result, inputs), expected)) < 1e-12


def with_prefix_copies(lengths: list[int], q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """Compute reference attention of sequences with explicit copies of the prefix."""
    prefix_length, rows, start = lengths[0], [], 0
    for number, length in enumerate(lengths):
        before = prefix_length if number else 0
        own = [torch.cat([x[:before], x[start : start + length]]) for x in (q_THD, k_TKD, v_TKD)]
        rows.append(reference_attention(*own, [before + length], causal=True)[before:])
        start += length
    return torch.cat(rows)


SHORT_ONES = [15, 100, 1, 140, 64, 17]
LONG_ONES = [40, 300, 1, 129]
WITH_EMPTY_ONES = [33, 70, 12, 0, 0]


@pytest.mark.parametrize(
    ("lengths", "device", "dtype"),
    [
        (SHORT_ONES, "cpu", torch.float64),
        (LONG_ONES, "cpu", torch.float64),
        ([3, 1], "cpu", torch.float64),
        (SHORT_ONES, "cpu", torch.bfloat16),
        *(
            pytest.param(lengths, "cuda", dtype, marks=pytest.mark.gpu)
            for lengths in (SHORT_ONES, LONG_ONES, WITH_EMPTY_ONES, [256, *WITH_EMPTY_ONES])
            for dtype in (torch.bfloat16, torch.float16)
        ),
        pytest.param(SHORT_ONES, "cuda", torch.float32, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_shared_prefix_attention_matches_reference(lengths, device, dtype):
    """Forward and backward; gradients of the prefix are summed over all sequences."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(sum(lengths), heads, 32, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    segments = Segments.from_lengths(lengths, torch.device(device))
    attention = SharedPrefixAttention(segments)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = attention(0, q, k, v)
    ours = torch.autograd.grad(found, inputs, weights)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = with_prefix_copies(lengths, *wide)
    theirs = torch.autograd.grad(expected, wide, weights.double())
    most = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1.5e-2)
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        away = one.detach().double() - other.detach()
        assert float(away.norm() / other.detach().norm()) < most


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_bf16_error_is_close_to_fused_kernel(causal, spread, width):
    """Values and gradients, including peaked attention, by root mean square."""
    segments = Segments.from_lengths(MIXED_LENGTHS, CPU)
    drawings = random_qkv(sum(segments.lengths), 4, 2, torch.float64, width)
    factors = (spread, spread, 1)
    narrow, fused, wide = (
        [
            (x * by).detach().bfloat16().to(dtype).requires_grad_()
            for x, by in zip(drawings, factors, strict=True)
        ]
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float64)
    )
    found = with_gradients(varlen_attention(*narrow, segments, causal=causal), narrow)
    others = with_gradients(bucketed_attention(*fused, segments.length_buckets, causal), fused)
    exact = with_gradients(varlen_attention(*wide, segments, causal=causal), wide)
    for one, other, truth in zip(found, others, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, truth) < 1.5 * error(other, truth)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).square().mean().sqrt())
