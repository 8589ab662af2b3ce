"""A sample in a pack gives the numbers that it gives alone."""

import pytest
import torch
from hf_reference import (
    collect_gradients,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
)

SAMPLES = [
    make_conversation(1, 3, ("image", (1, 10, 12)), 4),
    make_conversation(2, 17),
    make_conversation(3, 1, ("video", (3, 4, 6)), 2, ("image", (1, 2, 4)), 5),
    make_conversation(4, 17),
    make_conversation(5, 2, ("image", (1, 4, 4)), ("image", (1, 4, 4)), 1),
]


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
)
def test_packed_logits_and_gradients_equal_single_samples(family):
    theirs = make_reference_model(make_config(family))
    packed_model, alone = (make_native_model(make_config(family), theirs) for _ in range(2))
    batch = pack_conversations(theirs, SAMPLES)
    found = packed_model.compute_logits(packed_model(batch))
    single = [pack_conversations(theirs, [sample]) for sample in SAMPLES]
    expected = torch.cat([alone.compute_logits(alone(one)) for one in single])
    assert max_relative_error(found, expected) <= 1e-6
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    packed_gradients, alone_gradients = map(collect_gradients, (packed_model, alone))
    off = {n: max_relative_error(packed_gradients[n], g) for n, g in alone_gradients.items()}
    # Sums over tokens in another order: fp32 keeps about six figures of each tensor's largest.
    assert max(off.values()) <= 1e-5, sorted(off.items(), key=lambda item: -item[1])[:5]
