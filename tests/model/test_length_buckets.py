"""Length buckets: tokens are reordered and restored, and padding is marked."""

from __future__ import annotations

import pytest
import torch
from hf_reference import CPU

from finesight.model.length_buckets import (
    LENGTH_MULTIPLE,
    MAX_LENGTH_RATIO,
    bucket_by_length,
    bucket_shared_prefix,
    bucket_with_padding,
)

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
