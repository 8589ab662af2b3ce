"""What a step may take of a GPU's memory, and what is tried where that is too much."""

import torch

from finesight.encode.packing import PackedBatch
from finesight.train.oom import MemoryBudget, max_unsplit_packs


def test_memory_budget_is_reduced_to_the_minimum():
    budget = MemoryBudget(pack_tokens=8192, activation_checkpointing=False)
    pack = PackedBatch(("a", "b"), (900, 101), (), *[torch.empty(0)] * 7)
    one = PackedBatch(("a",), (900,), (), *[torch.empty(0)] * 7)
    half = budget.next_smaller(pack, is_training=True)
    assert half == MemoryBudget(pack_tokens=500, activation_checkpointing=False)
    assert half.next_smaller(one, is_training=False) is None
    duplicate = half.next_smaller(one, is_training=True)
    assert duplicate == MemoryBudget(pack_tokens=500, activation_checkpointing=True)
    assert duplicate.next_smaller(one, is_training=True) is None
    split = duplicate.next_smaller(one, is_training=True, world_size=2)
    assert split == MemoryBudget(pack_tokens=224, activation_checkpointing=True)
    assert max_unsplit_packs(2) * split.pack_tokens < 900, "that sample is split from then on"
    assert split.next_smaller(one, is_training=True, world_size=2) is None
    assert duplicate.next_smaller(one, is_training=True, world_size=64) == MemoryBudget(
        pack_tokens=14, activation_checkpointing=True
    )
