"""Words to draw: plain signs only, and none that could be read in two ways."""

from __future__ import annotations

import random
import string

import pytest

from finesight.synth import vocabulary


def test_words_hold_printable_ascii_without_blanks():
    rng = random.Random(0)
    words = [vocabulary.word(rng) for _ in range(5000)]
    assert all(set(word) <= set(string.printable.strip()) for word in words)
    assert max(map(len, words)) <= 20
    assert len(set(words)) > 3000


@pytest.mark.parametrize(("word", "readable"), [("so", False), ("WOW", False), ("cow", False)])
def test_words_that_look_alike_in_capitals_are_known(word, readable):
    assert vocabulary.readable(word) is readable


@pytest.mark.parametrize("word", ["sow7", "cat", "$0.50", "SOON"])
def test_other_words_are_readable(word):
    assert vocabulary.readable(word)


def test_no_word_looks_like_another_in_capitals():
    rng = random.Random(1)
    words = {vocabulary.word(rng) for _ in range(5000)}
    assert all(map(vocabulary.readable, words))


def test_codes_avoid_signs_that_look_alike():
    rng = random.Random(2)
    signs = set("".join(vocabulary.code(rng) for _ in range(2000)))
    assert not signs & set("IlO01oS5"), f"these look like others: {signs & set('IlO01oS5')}"


def test_made_up_words_avoid_fragments():
    rng = random.Random(4)
    words = [vocabulary.made_up(rng) for _ in range(20_000)]
    assert not [word for word in words if any(part in word for part in vocabulary.AVOIDED)]
    assert len(set(words)) > 15_000


def test_lists_repeat_nothing():
    for words in (vocabulary.COMMON, vocabulary.SIGNS, vocabulary.CHINESE_PHRASES):
        assert len(words) == len(set(words))
    assert len(vocabulary.CHINESE) == len(set(vocabulary.CHINESE)) > 300


def test_dates_are_days_of_the_calendar():
    rng = random.Random(3)
    for _ in range(500):
        date = vocabulary.date(rng)
        years = [
            part for part in date.replace("/", "-").replace(".", "-").split("-") if len(part) == 4
        ]
        assert 1990 <= int(years[0]) <= 2039, f"{date} is out of range"
