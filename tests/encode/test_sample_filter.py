"""Over-long samples and samples without an answer: dropped and counted, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from finesight.encode.tokenization import TokenizedSample, filter_samples
from finesight.errors import UserError


def make_tokenized(name: str, tokens: int, supervised: int = 1) -> TokenizedSample:
    marks = np.arange(tokens) >= tokens - supervised
    zeros = np.zeros(tokens, dtype=np.int32)
    return TokenizedSample(name, zeros, marks, np.zeros((3, tokens), dtype=np.int32), ())


MIXED = [
    make_tokenized("a", 10),
    make_tokenized("b", 11),
    make_tokenized("c", 5, 0),
    make_tokenized("d", 1),
    make_tokenized("e", 9),
]


def test_skipped_samples_are_counted() -> None:
    found = filter_samples(iter(MIXED), 10, "skip")
    assert found.sample_indices == (0, 4)
    assert found.token_counts == (10, 9)
    assert found.too_long_ids == ("b",)
    # The only token of "d" has none before it that could predict it.
    assert found.unsupervised_ids == ("c", "d")
    assert found.num_skipped == 3
    assert len(found.sample_indices) + found.num_skipped == len(MIXED)


def test_fail_mode_raises_at_first_sample() -> None:
    with pytest.raises(UserError, match="11 tokens") as raised:
        filter_samples(MIXED, 10, "fail")
    assert raised.value.where == "sample b"
    assert "10 tokens" in raised.value.expected
    with pytest.raises(UserError, match="no supervised tokens") as raised:
        filter_samples(MIXED, 11, "fail")
    assert raised.value.where == "sample c"
    assert filter_samples(MIXED[:2], 11, "fail").sample_indices == (0, 1)


def test_no_valid_samples_raises() -> None:
    with pytest.raises(
        UserError, match=r"none of 5 samples .* 4 exceed 4 tokens .* 11\), 1 have no"
    ):
        filter_samples(MIXED, 4, "skip")
