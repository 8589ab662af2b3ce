"""Attention in plain products: in fp64 the same as with the fused kernel, in bf16 close to it."""

from __future__ import annotations

import pytest
import torch
from oracle import CPU, distance
from torch import Tensor

from finesight.model import attention
from finesight.model.attention import Segments, attend, attend_by_segment
from finesight.model.runs import Runs, alike, padded
from finesight.model.short_attention import LONGEST, attend_short

LENGTHS = [[7], [4, 4], [5, 9, 40, 33, 5, 64, 1, 70]]


def drawn(
    total: int, heads: int, kv_heads: int, dtype: torch.dtype, width: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(total, count, width) for count in (heads, kv_heads, kv_heads)]
    numbers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in numbers]


def with_gradients(found: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    # Numbers that bf16 has, so that every type is given the same ones.
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [found, *torch.autograd.grad((found * weights.to(found.dtype)).sum(), inputs)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("causal", "padding"), [(True, True), (True, False), (False, False)])
def test_same_as_the_fused_kernel(
    lengths: list[int], kv_heads: int, causal: bool, padding: bool
) -> None:
    inputs = drawn(sum(lengths), 4, kv_heads, torch.float64)
    runs = (padded if padding else alike)(lengths, CPU)
    found = with_gradients(attend_short(*inputs, runs, causal=causal), inputs)
    fused = attend_by_segment(*inputs, alike(lengths, CPU), causal)
    assert max(map(distance, found, with_gradients(fused, inputs))) < 1e-12


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("spread", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_in_bf16_no_further_from_fp64_than_half_again_the_fused_kernel(
    causal: bool, spread: int, width: int
) -> None:
    """Values and gradients, also where wide scores make sharp weights, and by root mean square, so
    that no single rounding decides."""
    segments = Segments.of(LENGTHS[-1], CPU)
    drawings = drawn(sum(segments.lengths), 4, 2, torch.float64, width)
    factors = (spread, spread, 1)
    narrow, fused, wide = (
        [
            (x * by).detach().bfloat16().to(dtype).requires_grad_()
            for x, by in zip(drawings, factors, strict=True)
        ]
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float64)
    )
    found = with_gradients(attend(*narrow, segments, causal=causal), narrow)
    others = with_gradients(attend_by_segment(*fused, segments.runs, causal), fused)
    exact = with_gradients(attend(*wide, segments, causal=causal), wide)
    for one, other, truth in zip(found, others, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, truth) < 1.5 * error(other, truth)


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the differences."""
    return float((found.detach().double() - exact.detach()).square().mean().sqrt())


def test_long_sequences_go_through_the_fused_kernel() -> None:
    segments = Segments.of([LONGEST + 1], CPU)
    inputs = drawn(LONGEST + 1, 2, 1, torch.bfloat16)
    fused = attend_by_segment(*inputs, segments.runs, True)
    assert torch.equal(attend(*inputs, segments, causal=True), fused)


def test_padding_is_refused_where_queries_would_look_at_it() -> None:
    with pytest.raises(AssertionError, match="padding"):
        attend_short(
            *drawn(3, 2, 2, torch.float64),
            Runs(((2, 2),), None, None, torch.zeros(4)),
            causal=False,
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tiles", [True, False])
def test_forwards_alone_the_fused_kernel_where_there_are_tiles(
    tiles: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_tiles", lambda: tiles)
    segments = Segments.of([40, 70, 40], CPU)
    inputs = drawn(150, 4, 2, torch.bfloat16)
    fused = attend_by_segment(*inputs, segments.runs, causal)
    runs = segments.padded if causal else segments.runs
    short = attend_short(*inputs, runs, causal=causal)
    assert not torch.equal(fused, short)
    assert torch.equal(attend(*inputs, segments, causal=causal), short)
    with torch.no_grad():
        found = attend(*inputs, segments, causal=causal)
    assert torch.equal(found, fused if tiles else short)
