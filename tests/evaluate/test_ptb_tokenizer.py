from __future__ import annotations

import pytest
from case_files import load_cases
from each_value import each

from finesight.evaluate.caption_metrics import tokenize_caption

# What the COCO evaluation's tokeniser (pycocoevalcap 1.2) makes of these texts.
REFERENCE = load_cases("ptb_tokens")


@each(("caption", "expected"), REFERENCE)
def test_tokens_match_ptb_reference(caption, expected):
    assert tokenize_caption(caption) == expected.split()


def test_abbreviation_state_does_not_leak():
    assert tokenize_caption("No. 5") == ["no.", "5"]
    assert tokenize_caption("No. Five") == ["no", "five"]
    assert tokenize_caption("No. 5") == ["no.", "5"]


@pytest.mark.parametrize("text", ["", " ", "\n", "\x00", "\ud800", "<", "<<<<>>>>", "'" * 300])
def test_any_text_is_tokenized(text):
    assert all(word and word == word.lower() for word in tokenize_caption(text))


def test_long_unusual_text_is_tokenized():
    for text in (
        "a." * 5000,
        "a-" * 5000,
        "<a " * 5000,
        "a@" * 5000,
        "a/" * 5000,
        "a," * 3000,
        "'" * 10_000,
    ):
        assert tokenize_caption(f"{text} end")[-1] == "end"


@pytest.mark.parametrize("piece", ["a,", "@", "\\", "a/", "=D"])
def test_long_text_without_spaces_is_tokenized(piece):
    """Runs of them are cut: some rules would take minutes."""
    text = "".join(
        f"{piece}{i % 7}" if i % 50 == 0 else piece for i in range(100_000 // len(piece))
    )
    assert tokenize_caption(text)
