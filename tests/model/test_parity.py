"""Native models against transformers: logits and gradients of tiny random models in fp32."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from each_value import each
from hf_reference import (
    collect_gradients,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
    reference_logits,
    to_published_layout,
)

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": make_config("qwen2_vl"),
    "qwen2 untied, one key head, odd depth": make_config(
        "qwen2_vl", num_key_value_heads=1, num_hidden_layers=3, tie_word_embeddings=False
    ),
    "qwen2 ungrouped, wider heads": make_config(
        "qwen2_vl",
        hidden_size=64,
        num_key_value_heads=4,
        rope_theta=10000.0,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision={"embed_dim": 48, "num_heads": 3, "hidden_size": 64, "mlp_ratio": 4, "depth": 3},
    ),
    "qwen2.5": make_config("qwen2_5_vl"),
    "qwen2.5 small windows, no full frames, untied": make_config(
        "qwen2_5_vl",
        tie_word_embeddings=False,
        num_key_value_heads=4,
        vision={"window_size": 56, "fullatt_block_indexes": []},
    ),
    "qwen2.5 six heads on three, odd depths, full frames first and last": make_config(
        "qwen2_5_vl",
        hidden_size=72,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=1,
        vision={
            "depth": 3,
            "fullatt_block_indexes": [0, 2],
            "window_size": 100,
            "hidden_size": 64,
            "num_heads": 4,
            "out_hidden_size": 72,
        },
    ),
    "qwen3": make_config("qwen3_vl"),
    "qwen3 heads wider than their share, untied, one key head": make_config(
        "qwen3_vl",
        tie_word_embeddings=False,
        head_dim=24,
        num_key_value_heads=1,
        num_hidden_layers=5,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [6, 3, 3]},
        vision={"deepstack_visual_indexes": [0, 2, 3], "depth": 4, "num_position_embeddings": 4},
    ),
    "qwen3 with experts": make_config("qwen3_vl_moe"),
    "qwen3 with one expert, untied": make_config(
        "qwen3_vl_moe", num_experts=1, num_experts_per_tok=1, tie_word_embeddings=False
    ),
    "qwen3 with all experts": make_config("qwen3_vl_moe", num_experts=4, num_experts_per_tok=4),
    "qwen3 narrow heads, one tapped block, a table of one position": make_config(
        "qwen3_vl",
        head_dim=8,
        num_key_value_heads=4,
        num_hidden_layers=2,
        rope_scaling={"mrope_interleaved": True, "mrope_section": [2, 1, 1]},
        vision={"deepstack_visual_indexes": [1], "num_position_embeddings": 1, "num_heads": 4},
    ),
}

MODELS |= {
    "qwen3.5": make_config("qwen3_5"),
    "qwen3.5 untied, equal numbers of heads, one full layer": make_config(
        "qwen3_5",
        tie_word_embeddings=False,
        linear_num_value_heads=2,
        num_hidden_layers=2,
        full_attention_interval=2,
        num_key_value_heads=1,
    ),
    "qwen3.5 linear last, wide kernel, wider values": make_config(
        "qwen3_5",
        num_hidden_layers=3,
        linear_conv_kernel_dim=5,
        linear_value_head_dim=20,
        layer_types=["full_attention", "linear_attention", "linear_attention"],
    ),
    "qwen3.5 only full attention": make_config(
        "qwen3_5", layer_types=["full_attention"] * 2, num_hidden_layers=2
    ),
    "qwen3.5 narrow kernel, half of a head rotated": make_config(
        "qwen3_5",
        linear_conv_kernel_dim=2,
        head_dim=16,
        linear_num_key_heads=1,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.5,
        },
    ),
    "qwen3.5 deep": make_config("qwen3_5", num_hidden_layers=8, vision={"depth": 1}),
    "qwen3.5 with experts": make_config("qwen3_5_moe"),
    "qwen3.5 with one expert, untied": make_config(
        "qwen3_5_moe", num_experts=1, num_experts_per_tok=1, tie_word_embeddings=False
    ),
    "qwen3.5 with all experts": make_config("qwen3_5_moe", num_experts=4, num_experts_per_tok=4),
    "qwen3.5 with a wide shared expert": make_config(
        "qwen3_5_moe",
        shared_expert_intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        full_attention_interval=2,
    ),
}

TEXT = make_conversation(1, 11)
ONE_IMAGE = make_conversation(2, 5, ("image", (1, 4, 6)), 7)
TWO_IMAGES = make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)
FILM = make_conversation(4, 3, ("video", (3, 6, 4)), 6)
BOTH = make_conversation(5, 1, ("video", (2, 12, 8)), 2, ("image", (1, 18, 2)), 1)


@pytest.fixture(params=list(MODELS), scope="module")
def pair(request: pytest.FixtureRequest) -> Any:
    theirs = make_reference_model(MODELS[request.param])
    return make_native_model(MODELS[request.param], theirs), theirs


@each(
    "samples",
    [
        [TEXT],
        [TEXT, make_conversation(6, 4), make_conversation(7, 23)],
        [ONE_IMAGE],
        [FILM, TEXT],
        [TWO_IMAGES, TEXT, ONE_IMAGE, BOTH, FILM],
    ],
)
def test_packed_logits_match_reference(pair: Any, samples: list[Any]) -> None:
    ours, theirs = pair
    batch = pack_conversations(theirs, samples)
    # In fp32, the reference itself has an error of 1.1e-5 on some CPUs. Experts have no fp64.
    has_experts = hasattr(theirs.config.get_text_config(), "num_experts")
    precise = theirs if has_experts else deepcopy(theirs).double()
    with torch.no_grad():
        expected = torch.cat([reference_logits(precise, sample) for sample in samples])
        assert max_relative_error(ours.compute_logits(ours(batch)).double(), expected) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_match_reference(name: str) -> None:
    # Relative to the largest gradient of each tensor, which is the stricter criterion.
    theirs = make_reference_model(MODELS[name])
    ours = make_native_model(MODELS[name], theirs)
    samples = [TWO_IMAGES, TEXT, BOTH]
    expected = torch.cat([reference_logits(theirs, sample) for sample in samples])
    found = ours.compute_logits(ours(pack_conversations(theirs, samples)))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    mine = collect_gradients(ours)
    reference_gradients = to_published_layout(
        ours, {n: p.grad for n, p in theirs.named_parameters()}
    )
    off = {
        n: max_relative_error(mine[n], g) for n, g in reference_gradients.items() if g is not None
    }
    assert len(off) == len(reference_gradients)
    assert max(off.values()) <= 1e-4, sorted(off.items(), key=lambda item: -item[1])[:5]


def test_images_affect_the_compared_logits(pair: Any) -> None:
    ours, theirs = pair
    batch = pack_conversations(theirs, [ONE_IMAGE])
    other = replace(batch, patches_ND=255 - batch.patches_ND)
    with torch.no_grad():
        assert (
            max_relative_error(ours.compute_logits(ours(other)), ours.compute_logits(ours(batch)))
            > 1e-2
        )
