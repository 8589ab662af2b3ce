"""Scenes: relations, counts and boxes match the image."""

from __future__ import annotations

import random

from synthetic_tasks import scene_questions
from synthetic_tasks.scenes import compose_scene

SIMPLE = [compose_scene(random.Random(number), crowded=False) for number in range(300)]
CROWDS = [compose_scene(random.Random(number), crowded=True) for number in range(150)]


def _generate(draw, kind, number=400):
    drawn = [draw(random.Random(seed), "built-in") for seed in range(number)]
    return [each for each in drawn if each.task_kind == kind]


def _text(pieces):
    return "".join(piece if isinstance(piece, str) else "" for piece in pieces)


def _center(corners):
    return (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2


def test_relations_hold_in_pixels():
    seen = set()
    for made in SIMPLE:
        where = {shape.kind: shape for shape in made.shapes}
        for first, relation, second in scene_questions.list_relations(made):
            a, b = where[first], where[second]
            (ax, ay), (bx, by) = _center(a.box), _center(b.box)
            holds = {
                "left": ax < bx,
                "right": ax > bx,
                "above": ay < by,
                "below": ay > by,
                "larger": _width(a) > 1.5 * _width(b),
                "inside": _holds(b.box, a.box),
            }
            assert holds[relation], f"{first.phrase} {relation} {second.phrase}"
            seen.add(relation)
    assert seen >= {"left", "above", "larger", "inside"}


def _width(shape):
    # Ovals and rectangles are flat, diamonds and crescents narrow: the longer side tells.
    x1, y1, x2, y2 = shape.box
    return max(x2 - x1, y2 - y1)


def _holds(outer, inner):
    return all(o <= i for o, i in zip(outer[:2], inner[:2], strict=True)) and all(
        o >= i for o, i in zip(outer[2:], inner[2:], strict=True)
    )


def test_counts_are_digits():
    for drawn in _generate(scene_questions.generate_crowd, "count"):
        assert drawn.answer[0].isdigit()
    values = {drawn.answer[0] for drawn in _generate(scene_questions.generate_crowd, "count")}
    assert {"0", "1", "2", "3"} <= values


def test_counts_match_the_question():
    requested = [
        (made, *scene_questions.sample_counted_class(made, False, random.Random(seed)))
        for made in CROWDS[:60]
        for seed in range(5)
    ]
    for made, words, number in requested:
        named = [f"{shape.kind.color} {shape.kind.shape}" for shape in made.shapes]
        first = words.split()[0]
        if words == "shapes":
            assert number == len(named)
        elif words.endswith(" shapes"):
            assert number == sum(name.startswith(f"{first} ") for name in named), words
        else:
            one = words.removesuffix("es") if words[:-2].endswith(("s", "x")) else words[:-1]
            assert number == sum(one in (name, name.split()[1]) for name in named), words
    assert len({words for _, words, _ in requested}) > 60


def test_found_shapes_have_the_requested_kind():
    for drawn in _generate(scene_questions.generate_crowd, "find_shapes"):
        assert 1 <= len(drawn.answer) <= scene_questions.MAX_LISTED_SHAPES
        assert {box.label for box in drawn.answer} == {drawn.answer[0].label}
        assert drawn.answer[0].label in _text(drawn.question)


def test_both_yes_and_no_answers_occur():
    words = {_text(drawn.answer) for drawn in _generate(scene_questions.generate_scene, "is_it")}
    assert {"yes", "no"} <= words
