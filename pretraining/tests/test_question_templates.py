"""Questions: every kind in both languages, with words and boxes inserted."""

from __future__ import annotations

import random
from string import Formatter

import pytest
from synthetic_tasks import question_templates
from synthetic_tasks.synthetic_sample import make_box_part


def _names(template):
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def test_both_languages_have_the_same_placeholders():
    assert set(question_templates.ENGLISH_TEMPLATES) == set(question_templates.CHINESE_TEMPLATES)
    for kind in question_templates.ENGLISH_TEMPLATES:
        pieces = {
            frozenset(_names(template))
            for templates in (
                question_templates.ENGLISH_TEMPLATES[kind],
                question_templates.CHINESE_TEMPLATES[kind],
            )
            for template in templates
        }
        assert len(pieces) == 1, f"the phrasings of {kind} take different pieces"


def test_box_is_inserted_at_its_placeholder():
    box = make_box_part(None, (1, 2, 3, 4))
    found = {
        question_templates.fill_template("read_at", random.Random(n), is_chinese=False, box=box)
        for n in range(40)
    }
    assert ("What is written at ", box, "?") in found
    assert all(box in said for said in found)
    assert len(found) == len(question_templates.ENGLISH_TEMPLATES["read_at"])


def test_leading_box_has_no_empty_text():
    box = make_box_part(None, (1, 2, 3, 4))
    found = [
        question_templates.fill_template("read_at", random.Random(n), is_chinese=True, box=box)
        for n in range(20)
    ]
    assert (box, "处写的是什么?") in found
    assert all(piece for said in found for piece in said)


def test_words_become_part_of_the_text():
    output = question_templates.fill_template(
        "find", random.Random(0), is_chinese=True, text="x {y}"
    )
    assert len(output) == 1
    assert "x {y}" in output[0]


def test_language_is_sampled_or_fixed():
    rng = random.Random(0)
    drawn = [question_templates.fill_template("read", rng)[0] for _ in range(600)]
    share = sum(text in question_templates.CHINESE_TEMPLATES["read"] for text in drawn) / len(drawn)
    assert share == pytest.approx(question_templates.CHINESE_FRACTION, abs=0.05)
    assert all(
        question_templates.fill_template("read", rng, is_chinese=True)[0]
        in question_templates.CHINESE_TEMPLATES["read"]
        for _ in "abc"
    )
