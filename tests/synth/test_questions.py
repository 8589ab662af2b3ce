"""Questions: every kind in both languages, with words and boxes in their places."""

from __future__ import annotations

import random
from string import Formatter

import pytest

from finesight.synth import questions
from finesight.synth.drawn import boxed


def _names(template):
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_both_languages_ask_the_same_with_the_same_pieces():
    assert set(questions.ENGLISH) == set(questions.CHINESE)
    for kind in questions.ENGLISH:
        pieces = {
            frozenset(_names(template))
            for templates in (questions.ENGLISH[kind], questions.CHINESE[kind])
            for template in templates
        }
        assert len(pieces) == 1, f"the phrasings of {kind} take different pieces"


def test_a_box_stands_where_the_template_has_it():
    box = boxed(None, (1, 2, 3, 4))
    found = {questions.ask("read_at", random.Random(n), chinese=False, box=box) for n in range(40)}
    assert ("What is written at ", box, "?") in found
    assert all(box in said for said in found)
    assert len(found) == len(questions.ENGLISH["read_at"])


def test_a_box_at_the_start_has_no_empty_text_before_it():
    box = boxed(None, (1, 2, 3, 4))
    found = [questions.ask("read_at", random.Random(n), chinese=True, box=box) for n in range(20)]
    assert (box, "处写的是什么?") in found
    assert all(piece for said in found for piece in said)


def test_words_become_part_of_the_text():
    said = questions.ask("find", random.Random(0), chinese=True, text="x {y}")
    assert len(said) == 1
    assert "x {y}" in said[0]


def test_the_language_is_drawn_or_settled():
    rng = random.Random(0)
    drawn = [questions.ask("read", rng)[0] for _ in range(600)]
    share = sum(text in questions.CHINESE["read"] for text in drawn) / len(drawn)
    assert share == pytest.approx(questions.CHINESE_SHARE, abs=0.05)
    assert all(
        questions.ask("read", rng, chinese=True)[0] in questions.CHINESE["read"] for _ in "abc"
    )
