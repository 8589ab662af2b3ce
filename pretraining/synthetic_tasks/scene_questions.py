"""Scenes of colored shapes, with questions that describe, count, locate and compare them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

from synthetic_tasks import captions
from synthetic_tasks.camera_noise import apply_camera_noise
from synthetic_tasks.captions import Relation, RelationTriple, describe_kind
from synthetic_tasks.fonts import FontSplit
from synthetic_tasks.question_templates import fill_template, sample_is_chinese
from synthetic_tasks.scenes import COLORS, SHAPES, PlacedShape, ShapeScene, compose_scene
from synthetic_tasks.synthetic_sample import (
    ContentPart,
    QuestionAnswer,
    SyntheticSample,
    make_box_part,
)

MAX_LISTED_SHAPES = 5


def generate_scene(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of a few distinct shapes with a question about some of them."""
    shape_scene = compose_scene(rng, crowded=False)
    kind_weights = {"describe": 5.0, "all_shapes": 1.5, "find_shapes": 1.5, "shape_at": 1.5}
    if len(shape_scene.outer_shapes) > 1:
        kind_weights |= {"is_it": 1.5, "how_related": 1.5}
        kind_weights["larger"] = (
            1.2 if len({shape.is_large for shape in shape_scene.outer_shapes}) > 1 else 0.0
        )
    return _build_sample(shape_scene, kind_weights, rng)


def generate_crowd(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of many shapes of few kinds.

    The question is to count or locate shapes.
    """
    shape_scene = compose_scene(rng, crowded=True)
    min_count = min(Counter(shape.kind for shape in shape_scene.shapes).values())
    kind_weights = {
        "count": 4.0,
        "shape_at": 1.0,
        "find_shapes": 2.0 if min_count <= MAX_LISTED_SHAPES else 0.0,
    }
    kind_weights["all_shapes"] = 1.0 if len(shape_scene.shapes) <= MAX_LISTED_SHAPES else 0.0
    return _build_sample(shape_scene, kind_weights, rng)


def list_relations(shape_scene: ShapeScene) -> list[RelationTriple]:
    """List the relations that a caption of the scene states.

    These are the relative positions of neighbors in row-major order, nested shapes, and the larger
    of two neighbors.
    """
    shapes = shape_scene.outer_shapes
    pairs = list(pairwise(shapes))
    inside: list[RelationTriple] = [
        (shape.kind, "inside", shape.container)
        for shape in shape_scene.shapes
        if shape.container is not None
    ]
    sizes: list[RelationTriple] = []
    for first, second in pairs:
        if first.is_large != second.is_large:
            larger_shape, other = (first, second) if first.is_large else (second, first)
            sizes.append((larger_shape.kind, "larger", other.kind))
    return [(a.kind, get_relation(a, b), b.kind) for a, b in pairs] + inside + sizes


def get_relation(first: PlacedShape, second: PlacedShape) -> Relation:
    """Return the relative position of two shapes.

    It is `left` or `right` if they are further apart horizontally, else `above` or `below`.
    """
    dx, dy = (first.cell[axis] - second.cell[axis] for axis in (0, 1))
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _build_sample(
    shape_scene: ShapeScene, kind_weights: dict[str, float], rng: random.Random
) -> SyntheticSample:
    return SyntheticSample.from_sampler(
        apply_camera_noise(shape_scene.image, rng),
        partial(_sample_question, shape_scene, kind_weights),
        rng,
    )


QuestionAndAnswer = tuple[tuple[ContentPart, ...], tuple[ContentPart, ...]]


def _ask_description(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    kinds = [shape.kind for shape in shape_scene.shapes]
    text = captions.write_caption(kinds, list_relations(shape_scene), is_chinese=is_chinese)
    return fill_template("describe", rng, is_chinese=is_chinese), (text,)


def _ask_count(shape_scene: ShapeScene, is_chinese: bool, rng: random.Random) -> QuestionAndAnswer:
    class_name, count = sample_counted_class(shape_scene, is_chinese, rng)
    return fill_template("count", rng, is_chinese=is_chinese, things=class_name), (str(count),)


def sample_counted_class(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> tuple[str, int]:
    """Sample a class of shapes, such as red circles, to be counted.

    Returns the plural of its name and the count, which may be 0.
    """
    kind = rng.choice(shape_scene.shapes).kind
    share = rng.random()
    if share < 0.15:
        return ("图形" if is_chinese else "shapes"), len(shape_scene.shapes)
    if share < 0.4:
        shape = kind.shape if rng.random() < 0.85 else rng.choice(SHAPES)
        count = sum(placed_shape.kind.shape == shape for placed_shape in shape_scene.shapes)
        return _pluralize(captions.get_shape_name(shape, is_chinese), is_chinese), count
    color = kind.color if rng.random() < 0.85 else rng.choice(tuple(COLORS))
    word = captions.get_color_name(color, is_chinese)
    if share < 0.65:
        count = sum(placed_shape.kind.color == color for placed_shape in shape_scene.shapes)
        return (f"{word}图形" if is_chinese else f"{word} shapes"), count
    shape = captions.get_shape_name(kind.shape, is_chinese)
    target = (color, kind.shape)
    count = sum(
        (placed_shape.kind.color, placed_shape.kind.shape) == target
        for placed_shape in shape_scene.shapes
    )
    return _pluralize(f"{word}{shape}" if is_chinese else f"{word} {shape}", is_chinese), count


def _pluralize(words: str, is_chinese: bool) -> str:
    if is_chinese:
        return words
    return f"{words}es" if words.endswith(("s", "x")) else f"{words}s"


def _ask_shape_boxes(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    counts = Counter(shape.kind for shape in shape_scene.shapes)
    kind = rng.choice([kind for kind, count in counts.items() if count <= MAX_LISTED_SHAPES])
    phrase = describe_kind(kind, is_chinese)
    boxes = (make_box_part(phrase, shape.box) for shape in shape_scene.shapes if shape.kind == kind)
    return fill_template("find_shapes", rng, is_chinese=is_chinese, thing=phrase), tuple(boxes)


def _ask_all_boxes(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    boxes = (
        make_box_part(describe_kind(shape.kind, is_chinese), shape.box)
        for shape in shape_scene.shapes
    )
    return fill_template("all_shapes", rng, is_chinese=is_chinese), tuple(boxes)


def _ask_shape_at_box(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    containers = {shape.container for shape in shape_scene.shapes}
    shape = rng.choice(
        [shape for shape in shape_scene.shapes if shape.kind not in containers]
        or shape_scene.shapes
    )
    box = make_box_part(None, shape.box)
    return fill_template("shape_at", rng, is_chinese=is_chinese, box=box), (
        describe_kind(shape.kind, is_chinese),
    )


def _ask_is_related(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    first, second = _sample_pair(shape_scene, rng)
    actual = get_relation(first, second)
    opposite: dict[Relation, Relation] = {
        "left": "right",
        "right": "left",
        "above": "below",
        "below": "above",
    }
    is_true = rng.random() < 0.5
    relation_words = (captions.CHINESE_RELATIONS if is_chinese else captions.ENGLISH_RELATIONS)[
        actual if is_true else opposite[actual]
    ]
    pair = {
        "first": describe_kind(first.kind, is_chinese),
        "second": describe_kind(second.kind, is_chinese),
    }
    answer = ("是" if is_true else "否") if is_chinese else ("yes" if is_true else "no")
    return fill_template("is_it", rng, is_chinese=is_chinese, relation=relation_words, **pair), (
        answer,
    )


def _ask_relation(
    shape_scene: ShapeScene, is_chinese: bool, rng: random.Random
) -> QuestionAndAnswer:
    first, second = _sample_pair(shape_scene, rng)
    relation_words = (captions.CHINESE_RELATIONS if is_chinese else captions.ENGLISH_RELATIONS)[
        get_relation(first, second)
    ]
    pair = {
        "first": describe_kind(first.kind, is_chinese),
        "second": describe_kind(second.kind, is_chinese),
    }
    return fill_template("how_related", rng, is_chinese=is_chinese, **pair), (relation_words,)


def _ask_larger(shape_scene: ShapeScene, is_chinese: bool, rng: random.Random) -> QuestionAndAnswer:
    larger_shape = rng.choice([shape for shape in shape_scene.outer_shapes if shape.is_large])
    smaller_shape = rng.choice([shape for shape in shape_scene.outer_shapes if not shape.is_large])
    first, second = rng.sample((larger_shape, smaller_shape), 2)
    pair = {
        "first": describe_kind(first.kind, is_chinese),
        "second": describe_kind(second.kind, is_chinese),
    }
    return fill_template("larger", rng, is_chinese=is_chinese, **pair), (
        describe_kind(larger_shape.kind, is_chinese),
    )


def _sample_pair(shape_scene: ShapeScene, rng: random.Random) -> tuple[PlacedShape, PlacedShape]:
    first, second = rng.sample(shape_scene.outer_shapes, 2)
    return first, second


def _sample_question(
    shape_scene: ShapeScene, kind_weights: Mapping[str, float], rng: random.Random
) -> QuestionAnswer:
    """Sample a question about a scene by the weights of question types and by language."""
    kind = rng.choices(list(kind_weights), list(kind_weights.values()))[0]
    return QuestionAnswer(*_QUESTION_MAKERS[kind](shape_scene, sample_is_chinese(rng), rng), kind)


_QUESTION_MAKERS: dict[str, Callable[[ShapeScene, bool, random.Random], QuestionAndAnswer]] = {
    "describe": _ask_description,
    "count": _ask_count,
    "find_shapes": _ask_shape_boxes,
    "all_shapes": _ask_all_boxes,
    "shape_at": _ask_shape_at_box,
    "is_it": _ask_is_related,
    "how_related": _ask_relation,
    "larger": _ask_larger,
}
