"""Native models against transformers: logits and gradients of tiny random models in fp32."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from case_files import load_cases
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

MODELS = load_cases("parity_models")
FAMILIES = sorted({family for family, _ in MODELS.values()})

TEXT = make_conversation(1, 11)
ONE_IMAGE = make_conversation(2, 5, ("image", (1, 4, 6)), 7)
TWO_IMAGES = make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)
FILM = make_conversation(4, 3, ("video", (3, 6, 4)), 6)
BOTH = make_conversation(5, 1, ("video", (2, 12, 8)), 2, ("image", (1, 18, 2)), 1)
SAMPLES = [
    [TEXT],
    [TEXT, make_conversation(6, 4), make_conversation(7, 23)],
    [ONE_IMAGE],
    [FILM, TEXT],
    [TWO_IMAGES, TEXT, ONE_IMAGE, BOTH, FILM],
]


def make_pairs(family: str) -> Iterator[tuple[str, Any, Any]]:
    for name, (own_family, changes) in MODELS.items():
        if own_family == family:
            settings = make_config(family, **deepcopy(changes))
            theirs = make_reference_model(settings)
            yield name, make_native_model(settings, theirs), theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_match_reference(family):
    for name, ours, theirs in make_pairs(family):
        # In fp32, the reference itself has an error of 1.1e-5 on some CPUs. Experts have no fp64.
        has_experts = hasattr(theirs.config.get_text_config(), "num_experts")
        precise = theirs if has_experts else deepcopy(theirs).double()
        compute_reference = cache(partial(reference_logits, precise))
        for samples in SAMPLES:
            batch = pack_conversations(theirs, samples)
            with torch.no_grad():
                expected = torch.cat([*map(compute_reference, samples)])
                found = ours.compute_logits(ours(batch))
                assert max_relative_error(found.double(), expected) <= 1e-5, name
        with torch.no_grad():
            other = ours(replace(batch, patches_ND=255 - batch.patches_ND))
            assert max_relative_error(ours.compute_logits(other), found) > 1e-2, "ignores images"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_match_reference(family):
    """Relative to the largest gradient of each tensor, which is the stricter criterion."""
    samples = [TWO_IMAGES, TEXT, BOTH]
    for name, ours, theirs in make_pairs(family):
        expected = torch.cat([reference_logits(theirs, sample) for sample in samples])
        found = ours.compute_logits(ours(pack_conversations(theirs, samples)))
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        mine = collect_gradients(ours)
        named = {n: p.grad for n, p in theirs.named_parameters()}
        for key, gradient in to_published_layout(ours, named).items():
            # The gradient of a router with one expert is zero.
            off = max_relative_error(mine[key], gradient) if gradient.any() else mine[key].norm()
            assert off <= 1e-4, (name, key)
