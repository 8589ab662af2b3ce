from __future__ import annotations

import pytest

from finesight.infer import engine
from finesight.infer.engine import generate_together, plan_batches


def test_prompts_of_similar_length_run_together_the_longest_first():
    assert plan_batches([5, 90, 7, 88, 6], 2, 10) == [[1, 3], [2, 4], [0]]


def test_no_prompts_no_batches():
    assert plan_batches([], 4, 10) == []


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_hold_each_prompt_once_within_their_limits(batch):
    lengths = [100 + 97 * i % 3000 for i in range(500)]
    batches = plan_batches(lengths, batch, 512)
    assert sorted(i for members in batches for i in members) == list(range(500))
    for members in batches:
        assert len(members) <= batch
        room = max(lengths[i] for i in members) + 512
        assert len(members) * room <= engine.CACHE_TOKENS or len(members) == 1


def test_a_prompt_beyond_the_caches_limit_runs_alone():
    assert plan_batches([10, engine.CACHE_TOKENS, 10], 8, 1) == [[1], [0, 2]]


def test_less_than_one_new_token_is_refused():
    with pytest.raises(AssertionError, match="max_new_tokens is 0"):
        generate_together(None, [], 0, ())
