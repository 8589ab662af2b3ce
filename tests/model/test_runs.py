"""Batches of segments: every token in its place and back again, padding known."""

from __future__ import annotations

import pytest
import torch
from oracle import CPU

from finesight.model.runs import EVEN, LIKE, alike, branched, padded

LENGTHS = [[5], [5, 5], [5, 9, 40, 33, 5, 64, 1, 70], [32, 33, 31, 65], [70, 3, 70]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_batches_hold_every_token_once(lengths: list[int]) -> None:
    runs = padded(lengths, CPU)
    places = sum(length * count for length, count in runs.lengths)
    assert sum(count for _, count in runs.lengths) == len(lengths)
    tokens = torch.arange(sum(lengths))
    order_P = tokens if runs.order_T is None else runs.order_T
    back_T = tokens if runs.back_T is None else runs.back_T
    assert len(order_P) == places
    assert torch.equal(order_P[back_T], tokens)
    if runs.padding_P is None:
        assert places == len(tokens)
    else:
        assert int(runs.padding_P.sum()) == places - len(tokens) > 0
        assert not runs.padding_P[back_T].any()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_segment_keeps_its_order_and_stands_at_the_start_of_its_row(lengths: list[int]) -> None:
    runs = padded(lengths, CPU)
    tokens = torch.arange(sum(lengths))
    order_P = tokens if runs.order_T is None else runs.order_T
    rows = [
        row.tolist()
        for (length, count), part in zip(
            runs.lengths, order_P.split([n * count for n, count in runs.lengths]), strict=True
        )
        for row in part.view(count, length)
    ]
    segments = sorted((part.tolist() for part in tokens.split(lengths)), key=len)
    for row, segment in zip(rows, segments, strict=True):
        assert row[: len(segment)] == segment
        assert len(row) % EVEN == 0 or len(row) == len(segment)
        assert len(row) < max(LIKE * len(segment) + EVEN, 2 * EVEN)


def test_nothing_is_padded_where_lengths_are_those_of_their_batches() -> None:
    lengths = [192, 64, 192]
    assert padded(lengths, CPU).padding_P is None
    assert padded(lengths, CPU).lengths == alike(lengths, CPU).lengths == ((64, 1), (192, 2))


def test_sizes_come_again() -> None:
    """Packs of twenty texts of 60 to 250 tokens: a handful of sizes for hundreds of lengths."""
    generator = torch.Generator().manual_seed(0)
    packs = [torch.randint(60, 250, (20,), generator=generator).tolist() for _ in range(50)]
    sizes = {length for lengths in packs for length, _ in padded(lengths, CPU).lengths}
    assert sizes <= {64, 128, 192, 256}
    assert all(len(padded(lengths, CPU).lengths) <= 3 for lengths in packs)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows_of_heads_stand_segment_by_segment_and_come_back(
    lengths: list[int], heads: int
) -> None:
    runs = padded(lengths, CPU)
    rows, tokens = runs.rows(heads), sum(lengths)
    assert torch.equal(rows.order_X[rows.back_Y], torch.arange(tokens * heads))
    padding = torch.arange(0) if rows.idle_Y is None else rows.idle_Y
    places = torch.cat([rows.back_Y, padding]).sort().values
    assert torch.equal(places, torch.arange(runs.places * heads))
    # The same head of a segment's tokens, one after the other.
    length, count = runs.lengths[-1]
    of_last = rows.order_X[-length * count * heads :].view(count, heads, length)
    shortest = min(lengths)
    expected = torch.arange(heads).view(1, heads, 1).expand(count, heads, shortest)
    assert torch.equal(of_last[..., :shortest] % heads, expected)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "lengths", [(4, 2), (4, 2, 9, 1), (15, 60, 31, 33, 200, 1), (16, 16, 16)], ids=str
)
def test_what_segments_go_on_from_stands_in_each(lengths: tuple[int, ...], heads: int) -> None:
    runs = branched(lengths)
    trunk, tokens, others = lengths[0], sum(lengths), len(lengths) - 1
    rows = runs.rows(heads)
    assert torch.equal(rows.order_X[rows.back_Y], torch.arange(tokens * heads))
    idle = torch.arange(0) if rows.idle_Y is None else rows.idle_Y
    places = torch.cat([rows.back_Y, idle]).sort().values
    assert torch.equal(places, torch.arange(runs.places * heads))
    if others == 1:
        assert rows.copies_RC is None
        return
    assert rows.copies_RC is not None
    assert rows.copies_RC.shape == (trunk * heads, others - 1)
    expected = torch.arange(trunk * heads)[:, None].expand(-1, others - 1)
    assert torch.equal(rows.order_X[rows.copies_RC], expected)
    assert len(rows.copies_RC.unique()) == rows.copies_RC.numel()
    assert not torch.isin(rows.copies_RC, rows.back_Y).any()
