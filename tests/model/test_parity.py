"""Native models against transformers: logits and gradients of tiny random models in fp32."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from case_files import load_cases
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
    name: make_config(family, **changes)
    for name, (family, changes) in load_cases("parity_models").items()
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
