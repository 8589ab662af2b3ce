"""Over-long samples and samples without an answer: dropped and counted, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.encode.encoded import Outline
from finesight.encode.lengths import usable
from finesight.errors import UserError


def outline(name: str, tokens: int, learned: int = 1) -> Outline:
    marks = np.arange(tokens) >= tokens - learned
    zeros = np.zeros(tokens, dtype=np.int32)
    return Outline(name, zeros, marks, np.zeros((3, tokens), dtype=np.int32), ())


MIXED = [outline("a", 10), outline("b", 11), outline("c", 5, 0), outline("d", 1), outline("e", 9)]


def test_drops_with_a_count() -> None:
    found = usable(iter(MIXED), 10, "drop")
    assert found.kept == (0, 4)
    assert found.tokens == (10, 9)
    assert found.too_long == ("b",)
    # The only token of "d" has none before it that could predict it.
    assert found.without_answer == ("c", "d")
    assert found.dropped == 3
    assert len(found.kept) + found.dropped == len(MIXED)


def test_refuses_the_first() -> None:
    with pytest.raises(UserError, match="11 tokens") as raised:
        usable(MIXED, 10, "refuse")
    assert raised.value.where == "sample b"
    assert "10 tokens" in raised.value.expected
    with pytest.raises(UserError, match="nothing to learn") as raised:
        usable(MIXED, 11, "refuse")
    assert raised.value.where == "sample c"
    assert usable(MIXED[:2], 11, "refuse").kept == (0, 1)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match=r"none of 5 samples .* 4 over 4 tokens .* 11\), 1 without"):
        usable(MIXED, 4, "drop")
