"""Words to draw: plain signs only, and none that could be read in two ways."""

from __future__ import annotations

import random
import string

import pytest
from synthetic_tasks import vocabulary

from finesight.synth import tickets


def test_words_are_printable_ascii_without_spaces():
    rng = random.Random(0)
    words = [vocabulary.sample_word(rng) for _ in range(5000)]
    assert all(set(word) <= set(string.printable.strip()) for word in words)
    assert max(map(len, words)) <= 20
    assert len(set(words)) > 3000


@pytest.mark.parametrize(("word", "readable"), [("so", False), ("WOW", False), ("cow", False)])
def test_case_ambiguous_words_are_detected(word, readable):
    assert vocabulary.has_readable_case(word) is readable


@pytest.mark.parametrize("word", ["sow7", "cat", "$0.50", "SOON"])
def test_other_words_are_readable(word):
    assert vocabulary.has_readable_case(word)


def test_sampled_words_are_not_case_ambiguous():
    rng = random.Random(1)
    words = {vocabulary.sample_word(rng) for _ in range(5000)}
    assert all(map(vocabulary.has_readable_case, words))


def test_codes_avoid_ambiguous_characters():
    rng = random.Random(2)
    signs = set("".join(vocabulary.sample_code(rng) for _ in range(2000)))
    assert not signs & set("IlO01oS5"), f"these look like others: {signs & set('IlO01oS5')}"


def test_pseudowords_avoid_blocked_fragments():
    rng = random.Random(4)
    words = [tickets.sample_pseudoword(rng) for _ in range(20_000)]
    assert not [word for word in words if any(part in word for part in tickets.BLOCKED_FRAGMENTS)]
    assert len(set(words)) > 15_000


def test_word_lists_have_no_duplicates():
    for words in (vocabulary.COMMON_WORDS, vocabulary.SIGN_TEXTS, vocabulary.CHINESE_PHRASES):
        assert len(words) == len(set(words))
    assert len(vocabulary.CHINESE_CHARACTERS) == len(set(vocabulary.CHINESE_CHARACTERS)) > 300


def test_dates_are_valid():
    rng = random.Random(3)
    for _ in range(500):
        date = vocabulary.sample_date(rng)
        years = [
            part for part in date.replace("/", "-").replace(".", "-").split("-") if len(part) == 4
        ]
        assert 1990 <= int(years[0]) <= 2039, f"{date} is out of range"
