"""Captions: what is stated is read again, from either side and in either language."""

from __future__ import annotations

import random

import pytest

from finesight.synth import captions, scenes
from finesight.synth.captions import Facts, caption, caption_facts, caption_scores
from finesight.synth.shapes import COLOURS, FILLS, SHAPES, Kind

STAR = Kind("solid", "orange", "star")
RING = Kind("solid", "blue", "ring")
BOX = Kind("hollow", "red", "square")


def test_a_caption_in_english():
    text = caption([STAR, RING, BOX], [(STAR, "left", RING), (RING, "above", BOX)])
    assert text == (
        "An orange star is left of a blue ring. The blue ring is above a hollow red square."
    )
    assert caption([STAR], []) == "An orange star."


def test_a_caption_in_chinese():
    stated = [(STAR, "inside", RING), (RING, "larger", BOX)]
    text = caption([STAR, RING, BOX], stated, chinese=True)
    assert text == "橙色五角星在蓝色圆环里面。蓝色圆环比空心红色正方形大。"
    assert caption([STAR], [], chinese=True) == "一个橙色五角星。"


@pytest.mark.parametrize("chinese", [False, True])
def test_captions_of_scenes_are_read_again(chinese):
    for number in range(300):
        made = scenes.compose(random.Random(number), crowded=False)
        things, stated = [shape.kind for shape in made.placed], scenes.stated(made)
        facts = caption_facts(caption(things, stated, chinese=chinese))
        assert facts.things == frozenset(things)
        assert len(facts.relations) == len(stated)
        assert facts.unread == ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A blue ring is left of an orange star.", "The orange star is right of the blue ring."),
        ("A blue ring is above an orange star.", "an orange star is below a blue ring"),
        ("A blue ring is larger than an orange star.", "橙色五角星比蓝色圆环小。"),
        ("A blue ring is left of an orange star.", "蓝色圆环在橙色五角星的左边"),
        ("A black cross. A blue ring.", "A blue ring. A black cross."),
    ],
)
def test_the_same_facts_told_otherwise_are_equal(one, other):
    assert caption_facts(one) == caption_facts(other)
    assert caption_facts(one).unread == ()


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
        scores = caption_scores(wrong, true)
        assert scores["exact"] == 0.0, wrong
        assert scores[which] == 0.0, wrong
    assert set(caption_scores(true, true).values()) == {1.0}


@pytest.mark.parametrize("text", ["A plaid star.", "A blue ring is near a red star.", "blah"])
def test_what_is_not_of_the_grammar_is_not_read(text):
    facts = caption_facts(text)
    assert facts == Facts(frozenset(), frozenset(), (text.rstrip("."),))
    assert caption_scores(f"A blue ring. {text}", "A blue ring.")["exact"] == 0.0


def test_the_empty_answer_states_nothing():
    assert caption_facts("") == Facts(frozenset(), frozenset())
    assert caption_scores("", "A blue ring.")["exact"] == 0.0


def test_different_things_have_different_words():
    kinds = [Kind(fill, colour, shape) for fill in FILLS for colour in COLOURS for shape in SHAPES]
    words = {words for kind in kinds for words in (kind.words, captions.chinese_words(kind))}
    assert len(words) == 2 * len(kinds)
