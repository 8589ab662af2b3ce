"""Attention as explicit matmuls: equal to the fused kernel in fp64, close in bf16."""

from __future__ import annotations

import pytest
import torch
from hf_reference import CPU, max_relative_error
from torch import Tensor

from finesight.model import attention
from finesight.model.attention import Segments, bucketed_attention, varlen_attention
from finesight.model.cpu_attention import MAX_CPU_SEQLEN, cpu_attention
from finesight.model.length_buckets import LengthBuckets, bucket_by_length, bucket_with_padding

LENGTHS = [[7], [4, 4], [5, 9, 40, 33, 5, 64, 1, 70]]


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


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "padding"), [(True, True), (True, False), (False, False)])
def test_fp64_matches_fused_kernel(
    lengths: list[int], kv_heads: int, causal: bool, padding: bool
) -> None:
    inputs = random_qkv(sum(lengths), 4, kv_heads, torch.float64)
    runs = (bucket_with_padding if padding else bucket_by_length)(lengths, CPU)
    found = with_gradients(cpu_attention(*inputs, runs, causal=causal), inputs)
    fused = bucketed_attention(*inputs, bucket_by_length(lengths, CPU), causal)
    assert max(map(max_relative_error, found, with_gradients(fused, inputs))) < 1e-12


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_bf16_error_is_close_to_fused_kernel(causal: bool, spread: int, width: int) -> None:
    """Values and gradients, including peaked attention, by root mean square."""
    segments = Segments.from_lengths(LENGTHS[-1], CPU)
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
    """Return the root mean square of the differences."""
    return float((found.detach().double() - exact.detach()).square().mean().sqrt())


def test_long_sequences_use_the_fused_kernel() -> None:
    segments = Segments.from_lengths([MAX_CPU_SEQLEN + 1], CPU)
    inputs = random_qkv(MAX_CPU_SEQLEN + 1, 2, 1, torch.bfloat16)
    fused = bucketed_attention(*inputs, segments.length_buckets, True)
    assert torch.equal(varlen_attention(*inputs, segments, causal=True), fused)


def test_non_causal_padding_is_rejected() -> None:
    with pytest.raises(AssertionError, match="padded buckets"):
        cpu_attention(
            *random_qkv(3, 2, 2, torch.float64),
            LengthBuckets(((2, 2),), None, None, torch.zeros(4)),
            causal=False,
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tiles", [True, False])
def test_inference_uses_the_fused_kernel_with_tiles(
    tiles: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_amx_bf16", lambda: tiles)
    segments = Segments.from_lengths([40, 70, 40], CPU)
    inputs = random_qkv(150, 4, 2, torch.bfloat16)
    fused = bucketed_attention(*inputs, segments.length_buckets, causal)
    runs = segments.padded_buckets if causal else segments.length_buckets
    short = cpu_attention(*inputs, runs, causal=causal)
    assert not torch.equal(fused, short)
    assert torch.equal(varlen_attention(*inputs, segments, causal=causal), short)
    with torch.no_grad():
        found = varlen_attention(*inputs, segments, causal=causal)
    assert torch.equal(found, fused if tiles else short)
