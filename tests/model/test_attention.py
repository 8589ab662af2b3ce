"""Attention backends of packed sequences: length buckets, explicit matmuls on a CPU, reference."""

from __future__ import annotations

import pytest
import torch
from each_value import each
from hf_reference import CPU, max_relative_error
from torch import Tensor

from finesight.model import attention
from finesight.model.attention import (
    LENGTH_MULTIPLE,
    MAX_CPU_SEQLEN,
    MAX_LENGTH_RATIO,
    LengthBuckets,
    PackedAttention,
    Segments,
    SharedPrefixAttention,
    bucket_by_length,
    bucket_shared_prefix,
    bucket_with_padding,
    bucketed_attention,
    cpu_attention,
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


@each("causal", [True, False])
@each("kv_heads", [4, 2, 1])
@each(
    "lengths",
    [[7], [4, 4, 4], [1, 5, 2], [3, 1, 3, 1, 1, 3], [5, 5, 2, 5, 2, 2, 1]],
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


LENGTHS = [[5], [5, 5], [5, 9, 40, 33, 5, 64, 1, 70], [32, 33, 31, 65], [70, 3, 70]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_buckets_contain_each_token_once(lengths: list[int]) -> None:
    runs = bucket_with_padding(lengths, CPU)
    locations = sum(length * count for length, count in runs.shapes)
    assert sum(count for _, count in runs.shapes) == len(lengths)
    tokens = torch.arange(sum(lengths))
    order_P = tokens if runs.order_T is None else runs.order_T
    back_T = tokens if runs.inverse_T is None else runs.inverse_T
    assert len(order_P) == locations
    assert torch.equal(order_P[back_T], tokens)
    if runs.padding_P is None:
        assert locations == len(tokens)
    else:
        assert int(runs.padding_P.sum()) == locations - len(tokens) > 0
        assert not runs.padding_P[back_T].any()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_segments_keep_their_order_in_padded_rows(lengths: list[int]) -> None:
    runs = bucket_with_padding(lengths, CPU)
    tokens = torch.arange(sum(lengths))
    order_P = tokens if runs.order_T is None else runs.order_T
    rows = [
        row.tolist()
        for (length, count), part in zip(
            runs.shapes, order_P.split([n * count for n, count in runs.shapes]), strict=True
        )
        for row in part.view(count, length)
    ]
    segments = sorted((part.tolist() for part in tokens.split(lengths)), key=len)
    for row, segment in zip(rows, segments, strict=True):
        assert row[: len(segment)] == segment
        assert len(row) % LENGTH_MULTIPLE == 0 or len(row) == len(segment)
        assert len(row) < max(
            MAX_LENGTH_RATIO * len(segment) + LENGTH_MULTIPLE, 2 * LENGTH_MULTIPLE
        )


def test_equal_lengths_need_no_padding() -> None:
    lengths = [192, 64, 192]
    assert bucket_with_padding(lengths, CPU).padding_P is None
    assert (
        bucket_with_padding(lengths, CPU).shapes
        == bucket_by_length(lengths, CPU).shapes
        == ((64, 1), (192, 2))
    )


def test_bucket_sizes_repeat() -> None:
    """Packs of twenty texts have few distinct sizes in hundreds of batches."""
    generator = torch.Generator().manual_seed(0)
    packs = [torch.randint(60, 250, (20,), generator=generator).tolist() for _ in range(50)]
    sizes = {length for lengths in packs for length, _ in bucket_with_padding(lengths, CPU).shapes}
    assert sizes <= {64, 128, 192, 256}
    assert all(len(bucket_with_padding(lengths, CPU).shapes) <= 3 for lengths in packs)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_head_rows_roundtrip(lengths: list[int], heads: int) -> None:
    runs = bucket_with_padding(lengths, CPU)
    rows, tokens = runs.head_rows(heads), sum(lengths)
    assert torch.equal(rows.order_X[rows.inverse_Y], torch.arange(tokens * heads))
    padding = torch.arange(0) if rows.padding_Y is None else rows.padding_Y
    locations = torch.cat([rows.inverse_Y, padding]).sort().values
    assert torch.equal(locations, torch.arange(runs.num_positions * heads))
    # The same head of a segment's tokens is contiguous.
    length, count = runs.shapes[-1]
    of_last = rows.order_X[-length * count * heads :].view(count, heads, length)
    shortest = min(lengths)
    expected = torch.arange(heads).view(1, heads, 1).expand(count, heads, shortest)
    assert torch.equal(of_last[..., :shortest] % heads, expected)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "lengths", [(4, 2), (4, 2, 9, 1), (15, 60, 31, 33, 200, 1), (16, 16, 16)], ids=str
)
def test_shared_prefix_is_repeated_per_segment(lengths: tuple[int, ...], heads: int) -> None:
    runs = bucket_shared_prefix(lengths)
    prefix_length, tokens, others = lengths[0], sum(lengths), len(lengths) - 1
    rows = runs.head_rows(heads)
    assert torch.equal(rows.order_X[rows.inverse_Y], torch.arange(tokens * heads))
    idle = torch.arange(0) if rows.padding_Y is None else rows.padding_Y
    locations = torch.cat([rows.inverse_Y, idle]).sort().values
    assert torch.equal(locations, torch.arange(runs.num_positions * heads))
    if others == 1:
        assert rows.copies_RC is None
        return
    assert rows.copies_RC is not None
    assert rows.copies_RC.shape == (prefix_length * heads, others - 1)
    expected = torch.arange(prefix_length * heads)[:, None].expand(-1, others - 1)
    assert torch.equal(rows.order_X[rows.copies_RC], expected)
    assert len(rows.copies_RC.unique()) == rows.copies_RC.numel()
    assert not torch.isin(rows.copies_RC, rows.inverse_Y).any()


CPU_LENGTHS = [[7], [4, 4], [5, 9, 40, 33, 5, 64, 1, 70]]


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


@each("kv_heads", [4, 2, 1])
@each("lengths", CPU_LENGTHS)
@each(("causal", "padding"), [(True, True), (True, False), (False, False)])
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
    segments = Segments.from_lengths(CPU_LENGTHS[-1], CPU)
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
