from __future__ import annotations

import pytest
import torch

from finesight.infer.cache import KeyValueCache, PrefillAttention, StepAttention
from finesight.model.attention import PackedAttention, Segments

LAYERS, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8


def _cache(rows: int, room: int) -> KeyValueCache:
    return KeyValueCache(
        layers=LAYERS,
        rows=rows,
        room=room,
        heads=KEY_HEADS,
        width=WIDTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _filled(lengths: tuple[int, ...], room: int) -> KeyValueCache:
    cache = _cache(len(lengths), room)
    segments = Segments.of(lengths, torch.device("cpu"))
    attention = PrefillAttention(cache, range(len(lengths)), segments)
    tokens = sum(lengths)
    for layer in range(LAYERS):
        k_TKD = _random(tokens, KEY_HEADS, WIDTH) + layer
        attention(layer, _random(tokens, HEADS, WIDTH), k_TKD, 2 * k_TKD)
    return cache


def test_prefill_writes_each_prompt_into_its_row():
    cache = _filled((3, 5), room=7)
    k_TKD = _random(8, KEY_HEADS, WIDTH) + 1
    assert torch.equal(cache.keys_LRMKD[1, 0, :3], k_TKD[:3])
    assert torch.equal(cache.keys_LRMKD[1, 1, :5], k_TKD[3:])
    assert torch.equal(cache.values_LRMKD[1, 1, :5], 2 * k_TKD[3:])
    assert not cache.keys_LRMKD[:, 0, 3:].any()
    assert cache.lengths == cache.lengths_R.tolist() == [3, 5]


def test_a_step_attends_to_its_own_row_only():
    cache = _filled((3, 5), room=9)
    q, k, v = _random(2, HEADS, WIDTH), _random(2, KEY_HEADS, WIDTH), -_random(2, KEY_HEADS, WIDTH)
    seen = cache.grown(4)
    assert seen == 8
    found = StepAttention(cache, seen)(0, q, k, v)
    assert cache.lengths == cache.lengths_R.tolist() == [4, 6]
    for row, length in enumerate((4, 6)):
        for head in range(HEADS):
            keys = cache.keys_LRMKD[0, row, :length, head // 2]
            weights = (keys @ q[row, head] / WIDTH**0.5).softmax(0)
            wanted = weights @ cache.values_LRMKD[0, row, :length, head // 2]
            torch.testing.assert_close(found[row, head], wanted)
    assert torch.equal(cache.keys_LRMKD[0, 0, 3], k[0])


@pytest.mark.parametrize("kept", [[1, 3], [0, 1], [3], [0, 2, 3], [0, 1, 2, 3]])
def test_keep_moves_whole_rows(kept):
    cache = _filled((2, 4, 6, 3), room=8)
    before, lengths = cache.keys_LRMKD.clone(), list(cache.lengths)
    order = cache.keep(kept)
    assert sorted(order) == kept
    assert cache.rows == len(kept)
    for row, old in enumerate(order):
        used = lengths[old]
        assert cache.lengths[row] == int(cache.lengths_R[row]) == used
        assert torch.equal(cache.keys_LRMKD[:, row, :used], before[:, old, :used])


def test_what_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="prompt of 5 tokens for a room of 4"):
        _filled((5,), room=4)
    full = _filled((4,), room=4)
    with pytest.raises(AssertionError, match="5 tokens for a room of 4"):
        full.grown(8)
    with pytest.raises(AssertionError, match="row 0 holds 4 tokens"):
        PrefillAttention(full, [0], Segments.of((2,), torch.device("cpu")))


def test_contexts_are_the_prompts_whatever_rows_are_kept():
    cache = _filled((3, 5, 4), room=9)
    assert StepAttention(cache, cache.grown(8)).contexts_T.tolist() == [3, 5, 4]
    assert cache.keep([0, 2]) == [0, 2]
    assert StepAttention(cache, cache.grown(8)).contexts_T.tolist() == [3, 4]
    packed = PackedAttention(Segments.of((2, 3), torch.device("cpu")))
    assert packed.contexts_T.tolist() == [2, 2, 3, 3, 3]
