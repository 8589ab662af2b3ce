"""Cards by name, however they are spelled."""

from __future__ import annotations

import pytest

from finesight.errors import UserError
from finesight.plan.cards import CARDS, card


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("A100 80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("l40s", "L40S"),
    ],
)
def test_any_spelling(spelled: str, name: str) -> None:
    assert card(spelled).name == name


def test_an_unknown_card_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UserError) as caught:
        card("RTX 4095")
    assert caught.value.where == "--gpu"
    assert "'RTX 4095'" in caught.value.what
    assert "RTX 4090" in caught.value.expected
    with pytest.raises(UserError, match=r"T4.*B200"):
        card("abacus")


def test_every_card_is_one_of_a_kind_and_possible() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for one in CARDS:
        assert card(one.name) is one
        assert 8 <= one.memory_gb <= 300
        assert 20 <= one.tflops <= 3000
        # Nothing that is sold does less than 50 or more than 500 operations for a byte.
        assert 50 <= one.tflops * 1000 / one.gb_per_s <= 500
    assert not card("T4").has_bf16
    assert card("A10").has_bf16
