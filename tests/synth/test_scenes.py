"""Scenes: relations, counts and boxes are those of the picture."""

from __future__ import annotations

import random

import pytest

from finesight.synth import scenes
from finesight.synth.shapes import COLOURS, HOLDING, apart

SIMPLE = [scenes.compose(random.Random(number), crowded=False) for number in range(300)]
CROWDS = [scenes.compose(random.Random(number), crowded=True) for number in range(150)]


def _asked(draw, kind, number=400):
    drawn = [draw(random.Random(seed), "built-in") for seed in range(number)]
    return [each for each in drawn if each.kind == kind]


def _text(pieces):
    return "".join(piece if isinstance(piece, str) else "" for piece in pieces)


def _centre(corners):
    return (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2


def test_boxes_lie_in_the_picture_and_apart():
    for made in SIMPLE + CROWDS:
        width, height = made.picture.size
        for number, shape in enumerate(made.placed):
            x1, y1, x2, y2 = shape.corners
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            for other in made.placed[:number]:
                u1, v1, u2, v2 = other.corners
                meet = x1 < u2 and u1 < x2 and y1 < v2 and v1 < y2
                assert meet == (shape.within == other.kind), f"{shape} and {other}"


def test_pictures_stay_small():
    sides = [side for made in SIMPLE + CROWDS for side in made.picture.size]
    assert max(sides) <= 308
    assert min(sides) >= 48


def test_relations_hold_in_pixels():
    seen = set()
    for made in SIMPLE:
        where = {shape.kind: shape for shape in made.placed}
        for first, relation, second in scenes.stated(made):
            a, b = where[first], where[second]
            (ax, ay), (bx, by) = _centre(a.corners), _centre(b.corners)
            holds = {
                "left": ax < bx,
                "right": ax > bx,
                "above": ay < by,
                "below": ay > by,
                "larger": _width(a) > 1.5 * _width(b),
                "inside": _holds(b.corners, a.corners),
            }
            assert holds[relation], f"{first.words} {relation} {second.words}"
            seen.add(relation)
    assert seen >= {"left", "above", "larger", "inside"}


def _width(shape):
    # Ovals and rectangles are flat, diamonds and crescents narrow: the longer side tells.
    x1, y1, x2, y2 = shape.corners
    return max(x2 - x1, y2 - y1)


def _holds(outer, inner):
    return all(o <= i for o, i in zip(outer[:2], inner[:2], strict=True)) and all(
        o >= i for o, i in zip(outer[2:], inner[2:], strict=True)
    )


def test_what_holds_another_is_large_solid_and_of_another_colour():
    inner = [(made, shape) for made in SIMPLE for shape in made.placed if shape.within]
    assert len(inner) > 20
    for made, shape in inner:
        holder = next(each for each in made.placed if each.kind == shape.within)
        assert holder.large
        assert holder.kind.shape in HOLDING
        assert holder.kind.fill == "solid"
        assert apart(COLOURS[shape.kind.colour], COLOURS[holder.kind.colour], 100)


def test_things_of_a_described_scene_are_told_apart_by_colour_and_shape():
    for made in SIMPLE:
        told = {(shape.kind.colour, shape.kind.shape) for shape in made.placed}
        assert len(told) == len(made.placed)


@pytest.mark.parametrize("made", SIMPLE[:100])
def test_colours_stand_out_in_the_picture(made):
    for shape in made.placed:
        if shape.kind.fill == "solid" and shape.kind.shape in ("square", "circle", "hexagon"):
            holds = any(other.within == shape.kind for other in made.placed)
            x, y = _centre(shape.corners)
            pixel = made.picture.getpixel((int(x), int(y)))
            assert holds or not apart(pixel, COLOURS[shape.kind.colour], 25)


def test_counts_count():
    for drawn in _asked(scenes.crowd, "count"):
        assert drawn.answer[0].isdigit()
    numbers = {drawn.answer[0] for drawn in _asked(scenes.crowd, "count")}
    assert {"0", "1", "2", "3"} <= numbers


def test_counts_are_of_what_is_asked():
    asked = [
        (made, *scenes.counted(made, False, random.Random(seed)))
        for made in CROWDS[:60]
        for seed in range(5)
    ]
    for made, words, number in asked:
        named = [f"{shape.kind.colour} {shape.kind.shape}" for shape in made.placed]
        first = words.split()[0]
        if words == "shapes":
            assert number == len(named)
        elif words.endswith(" shapes"):
            assert number == sum(name.startswith(f"{first} ") for name in named), words
        else:
            one = words.removesuffix("es") if words[:-2].endswith(("s", "x")) else words[:-1]
            assert number == sum(one in (name, name.split()[1]) for name in named), words
    assert len({words for _, words, _ in asked}) > 60


def test_found_shapes_are_all_of_that_kind():
    for drawn in _asked(scenes.crowd, "find_shapes"):
        assert 1 <= len(drawn.answer) <= scenes.MOST_LISTED
        assert {box.label for box in drawn.answer} == {drawn.answer[0].label}
        assert drawn.answer[0].label in _text(drawn.question)


def test_yes_and_no_are_both_right():
    words = {_text(drawn.answer) for drawn in _asked(scenes.scene, "is_it")}
    assert {"yes", "no"} <= words
