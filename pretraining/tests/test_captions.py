"""Captions: what is stated is read again, from either side and in either language."""

from __future__ import annotations

import random

import pytest
from case_files import load_cases
from synthetic_tasks import captions, scene_questions, scenes
from synthetic_tasks.captions import CaptionFacts, parse_caption, score_caption, write_caption
from synthetic_tasks.scenes import COLORS, FILLS, SHAPES, ShapeKind

CASES = load_cases("captions")

STAR = ShapeKind("solid", "orange", "star")
RING = ShapeKind("solid", "blue", "ring")
BOX = ShapeKind("hollow", "red", "square")


def test_english_caption():
    text = write_caption([STAR, RING, BOX], [(STAR, "left", RING), (RING, "above", BOX)])
    assert text == (
        "An orange star is left of a blue ring. The blue ring is above a hollow red square."
    )
    assert write_caption([STAR], []) == "An orange star."


def test_chinese_caption():
    stated = [(STAR, "inside", RING), (RING, "larger", BOX)]
    text = write_caption([STAR, RING, BOX], stated, is_chinese=True)
    assert text == "橙色五角星在蓝色圆环里面。蓝色圆环比空心红色正方形大。"
    assert write_caption([STAR], [], is_chinese=True) == "一个橙色五角星。"


@pytest.mark.parametrize("chinese", [False, True])
def test_scene_captions_roundtrip(chinese):
    for number in range(300):
        made = scenes.compose_scene(random.Random(number), crowded=False)
        things, stated = [shape.kind for shape in made.shapes], scene_questions.list_relations(made)
        facts = parse_caption(write_caption(things, stated, is_chinese=chinese))
        assert facts.objects == frozenset(things)
        assert len(facts.relations) == len(stated)
        assert facts.unparsed == ()


@pytest.mark.parametrize(("one", "other"), CASES["test_equivalent_captions_have_equal_facts"])
def test_equivalent_captions_have_equal_facts(one, other):
    assert parse_caption(one) == parse_caption(other)
    assert parse_caption(one).unparsed == ()


def test_different_facts_differ():
    true = "An orange star is left of a blue ring. The blue ring is larger than the orange star."
    for wrong, which in (
        (
            "A red star is left of a blue ring. The blue ring is larger than the red star.",
            "colours",
        ),
        (true.replace("star", "cross"), "shapes"),
        (true.replace("left of", "right of"), "relations"),
        (true.replace("orange star", "striped orange star"), "things"),
    ):
        scores = score_caption(wrong, true)
        assert scores["exact"] == 0.0, wrong
        assert scores[which] == 0.0, wrong
    assert set(score_caption(true, true).values()) == {1.0}


@pytest.mark.parametrize("text", ["A plaid star.", "A blue ring is near a red star.", "blah"])
def test_text_outside_the_grammar_is_unparsed(text):
    facts = parse_caption(text)
    assert facts == CaptionFacts(frozenset(), frozenset(), (text.rstrip("."),))
    assert score_caption(f"A blue ring. {text}", "A blue ring.")["exact"] == 0.0


def test_empty_answer_has_no_facts():
    assert parse_caption("") == CaptionFacts(frozenset(), frozenset())
    assert score_caption("", "A blue ring.")["exact"] == 0.0


def test_different_shapes_have_different_phrases():
    kinds = [
        ShapeKind(fill, colour, shape) for fill in FILLS for colour in COLORS for shape in SHAPES
    ]
    words = {words for kind in kinds for words in (kind.phrase, captions.describe_in_chinese(kind))}
    assert len(words) == 2 * len(kinds)
