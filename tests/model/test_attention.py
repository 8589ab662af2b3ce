from __future__ import annotations

import pytest
import torch
from oracle import CPU, distance
from torch import Tensor

from finesight.model.attention import (
    BranchedAttention,
    PackedAttention,
    Segments,
    attend,
    has_varlen,
)


def plain(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Attention written out: one segment and one head at a time, in fp64."""
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
def test_each_segment_looks_at_itself_alone(
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
    found = attend(q, k, v, Segments.of(lengths, CPU), causal=causal)
    expected = plain(q, k, v, lengths, causal)
    assert distance(found, expected) < 1e-12
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    assert max(map(distance, ours, theirs)) < 1e-12


def test_packed_attention_is_causal_in_every_layer() -> None:
    segments = Segments.of([3, 4], CPU)
    q, k, v = (torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    causal = attend(q, k, v, segments, causal=True)
    for layer in (0, 5):
        assert torch.equal(PackedAttention(segments)(layer, q, k, v), causal)


def test_bounds_are_the_running_sum() -> None:
    segments = Segments.of([3, 1, 4], CPU)
    assert segments.bounds_S1.tolist() == [0, 3, 4, 8]
    assert segments.bounds_S1.dtype == torch.int32
    assert segments.longest == 4


def test_segments_of_one_length_are_computed_together() -> None:
    inline = Segments.of([2, 2, 5], CPU).runs
    assert (inline.lengths, inline.order_T) == (((2, 2), (5, 1)), None)
    mixed = Segments.of([2, 5, 2], CPU).runs
    assert mixed.lengths == ((2, 2), (5, 1))
    assert mixed.order_T is not None
    assert mixed.back_T is not None
    assert mixed.order_T.tolist() == [0, 1, 7, 8, 2, 3, 4, 5, 6]
    assert mixed.order_T[mixed.back_T].tolist() == list(range(9))


def test_the_processor_has_no_variable_length_kernel() -> None:
    assert not has_varlen(torch.zeros(1, 1, 8, dtype=torch.bfloat16))


ON_CARD = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def branched(lengths: list[int], q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """Each sequence but the first with a copy of that before it, in fp64: attention written out."""
    trunk, rows, start = lengths[0], [], 0
    for number, length in enumerate(lengths):
        before = trunk if number else 0
        own = [torch.cat([x[:before], x[start : start + length]]) for x in (q_THD, k_TKD, v_TKD)]
        rows.append(plain(*own, [before + length], causal=True)[before:])
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
def test_sequences_that_branch_off_the_first_read_it(
    lengths: list[int], device: str, dtype: torch.dtype
) -> None:
    """Forwards and backwards; what comes back to the first one from all is summed up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(sum(lengths), heads, 32, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    segments = Segments.of(lengths, torch.device(device))
    attention = BranchedAttention(segments, rows=sum(lengths))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = attention(0, q, k, v)
    ours = torch.autograd.grad(found, inputs, weights)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = branched(lengths, *wide)
    theirs = torch.autograd.grad(expected, wide, weights.double())
    most = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1.5e-2)
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        away = one.detach().double() - other.detach()
        assert float(away.norm() / other.detach().norm()) < most


def test_where_sequences_lie_with_what_they_go_on_from() -> None:
    segments = Segments.of([4, 2, 3], CPU)
    attention = BranchedAttention(segments, rows=9)
    with pytest.raises(AssertionError, match="several sequences"):
        attention.contexts_T  # noqa: B018
    assert attention.whole.longest == 7
    assert attention.whole.lengths == (4, 6, 7)
    assert attention.whole.bounds_S1.tolist() == [0, 4, 10, 17]
    assert attention.places.at_M.tolist() == [*range(4), *range(6), *range(4), 6, 7, 8]
