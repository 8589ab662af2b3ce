from __future__ import annotations

import pytest
import torch
from hf_reference import CPU, max_relative_error
from torch import Tensor

from finesight.model.attention import (
    PackedAttention,
    Segments,
    SharedPrefixAttention,
    supports_varlen_attention,
    varlen_attention,
)


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


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [[7], [4, 4, 4], [1, 5, 2], [3, 1, 3, 1, 1, 3], [5, 5, 2, 5, 2, 2, 1]],
    ids=str,
)
def test_segments_attend_only_to_themselves(
    lengths: list[int], kv_heads: int, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    found = varlen_attention(q, k, v, Segments.from_lengths(lengths, CPU), causal=causal)
    expected = reference_attention(q, k, v, lengths, causal)
    assert max_relative_error(found, expected) < 1e-12
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    assert max(map(max_relative_error, ours, theirs)) < 1e-12


def test_packed_attention_is_causal() -> None:
    segments = Segments.from_lengths([3, 4], CPU)
    q, k, v = (torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    causal = varlen_attention(q, k, v, segments, causal=True)
    for layer in (0, 5):
        assert torch.equal(PackedAttention(segments)(layer, q, k, v), causal)


def test_cu_seqlens_are_cumulative_lengths() -> None:
    segments = Segments.from_lengths([3, 1, 4], CPU)
    assert segments.cu_seqlens_S1.tolist() == [0, 3, 4, 8]
    assert segments.cu_seqlens_S1.dtype == torch.int32
    assert segments.max_seqlen == 4


def test_equal_lengths_are_batched() -> None:
    inline = Segments.from_lengths([2, 2, 5], CPU).length_buckets
    assert (inline.shapes, inline.order_T) == (((2, 2), (5, 1)), None)
    mixed = Segments.from_lengths([2, 5, 2], CPU).length_buckets
    assert mixed.shapes == ((2, 2), (5, 1))
    assert mixed.order_T is not None
    assert mixed.inverse_T is not None
    assert mixed.order_T.tolist() == [0, 1, 7, 8, 2, 3, 4, 5, 6]
    assert mixed.order_T[mixed.inverse_T].tolist() == list(range(9))


def test_varlen_kernel_is_unavailable_on_cpu() -> None:
    assert not supports_varlen_attention(torch.zeros(1, 1, 8, dtype=torch.bfloat16))


ON_CARD = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


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
            pytest.param(lengths, "cuda", dtype, marks=ON_CARD)
            for lengths in (SHORT_ONES, LONG_ONES, WITH_EMPTY_ONES, [256, *WITH_EMPTY_ONES])
            for dtype in (torch.bfloat16, torch.float16)
        ),
        pytest.param(SHORT_ONES, "cuda", torch.float32, marks=ON_CARD),
    ],
    ids=str,
)
def test_shared_prefix_attention_matches_reference(
    lengths: list[int], device: str, dtype: torch.dtype
) -> None:
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


def test_shared_prefix_layout() -> None:
    segments = Segments.from_lengths([4, 2, 3], CPU)
    attention = SharedPrefixAttention(segments)
    with pytest.raises(AssertionError, match="several sequences"):
        attention.context_lengths_T  # noqa: B018
    assert attention.full_segments.max_seqlen == 7
    assert attention.full_segments.lengths == (4, 6, 7)
    assert attention.full_segments.cu_seqlens_S1.tolist() == [0, 4, 10, 17]
    assert attention.indices.source_indices_M.tolist() == [*range(4), *range(6), *range(4), 6, 7, 8]
