"""A sample in a pack gives the numbers that it gives alone."""

from __future__ import annotations

import pytest
import torch
from oracle import config, conversation, distance, gradients, native, packed, reference

SAMPLES = [
    conversation(1, 3, ("image", (1, 10, 12)), 4),
    conversation(2, 17),
    conversation(3, 1, ("video", (3, 4, 6)), 2, ("image", (1, 2, 4)), 5),
    conversation(4, 17),
    conversation(5, 2, ("image", (1, 4, 4)), ("image", (1, 4, 4)), 1),
]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_logits_and_gradients_of_a_pack_are_those_of_its_samples_alone(family: str) -> None:
    theirs = reference(config(family))
    together, alone = native(config(family), theirs), native(config(family), theirs)
    batch = packed(theirs, SAMPLES)
    found = together.logits(together(batch))
    single = [packed(theirs, [sample]) for sample in SAMPLES]
    expected = torch.cat([alone.logits(alone(one)) for one in single])
    assert distance(found, expected) <= 1e-6
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    packed_gradients, alone_gradients = gradients(together), gradients(alone)
    off = {name: distance(packed_gradients[name], g) for name, g in alone_gradients.items()}
    # Sums over tokens in another order: fp32 keeps about six figures of each tensor's largest.
    assert max(off.values()) <= 1e-5, sorted(off.items(), key=lambda item: -item[1])[:5]
