"""What a step may take of a GPU's memory, and what is tried where that is too much."""

from __future__ import annotations

import torch

from finesight.encode.pack import PackedBatch
from finesight.train.budget import Budget, packs_alone


def test_a_budget_goes_down_until_nothing_is_left() -> None:
    budget = Budget(pack_tokens=8192, recompute=False)
    pack = PackedBatch(("a", "b"), (900, 101), (), *[torch.empty(0)] * 7)
    one = PackedBatch(("a",), (900,), (), *[torch.empty(0)] * 7)
    half = budget.below(pack, learning=True)
    assert half == Budget(pack_tokens=500, recompute=False)
    assert half.below(one, learning=False) is None
    twice = half.below(one, learning=True)
    assert twice == Budget(pack_tokens=500, recompute=True)
    assert twice.below(one, learning=True) is None
    split = twice.below(one, learning=True, processes=2)
    assert split == Budget(pack_tokens=224, recompute=True)
    assert packs_alone(2) * split.pack_tokens < 900, "that sample is split from then on"
    assert split.below(one, learning=True, processes=2) is None
    assert twice.below(one, learning=True, processes=64) == Budget(pack_tokens=14, recompute=True)
