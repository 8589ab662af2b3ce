"""Scenes of colored shapes, with questions that describe, count, locate and compare them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from PIL import Image

from finesight.synth import captions
from finesight.synth.canvas import Canvas, apply_camera_noise, make_canvas, round_up_size
from finesight.synth.captions import Relation, RelationTriple, describe_kind
from finesight.synth.fonts import FontSplit
from finesight.synth.question_templates import fill_template, sample_is_chinese
from finesight.synth.shapes import (
    COLORS,
    CONTAINER_SHAPES,
    FILLS,
    HOLLOW_SHAPES,
    SHAPES,
    STRIPED_SHAPES,
    ShapeKind,
    are_distinct,
    draw_shape,
)
from finesight.synth.synthetic_sample import (
    ContentPart,
    PixelBox,
    QuestionAnswer,
    SyntheticSample,
    make_box_part,
)

MAX_DESCRIBED_SHAPES = 4
"""Maximum number of shapes in a described scene, not counting a nested shape."""

MAX_LISTED_SHAPES = 5

LARGE_SIZE_RANGE, SMALL_SIZE_RANGE = (0.82, 0.92), (0.42, 0.5)
"""Side lengths of large and small shapes, as fractions of their grid cell.

The ranges are separated, so that comparisons of size are unambiguous.
"""

_COUNT_WEIGHTS = (1, 3, 3, 2)
"""Sampling weights of one to MAX_DESCRIBED_SHAPES shapes in a described scene."""

_MIN_COLOR_DISTANCE = 110.0

_MIN_SHAPE_SIZE = 20
"""Minimum side length of a shape in pixels.

Smaller hexagons would resemble circles.
"""

_CELL_SIZE_RANGE = (48, 88)
_MAX_IMAGE_SIZE = 288


@dataclass(frozen=True)
class PlacedShape:
    """A shape at a position in the grid of a scene.

    `cell` is (column, row). `container` is the shape that surrounds this one, or None.
    """

    kind: ShapeKind
    cell: tuple[int, int]
    is_large: bool
    box: PixelBox
    container: ShapeKind | None = None


@dataclass(frozen=True)
class ShapeScene:
    image: Image.Image
    shapes: tuple[PlacedShape, ...]

    @property
    def outer_shapes(self) -> list[PlacedShape]:
        """Shapes that are not inside another shape, in row-major order."""
        return [shape for shape in self.shapes if shape.container is None]


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


def compose_scene(rng: random.Random, *, crowded: bool) -> ShapeScene:
    """Compose shapes in the cells of a grid, in row-major order.

    A scene has up to MAX_DESCRIBED_SHAPES distinct shapes and possibly a nested one. With `crowded`
    it has many shapes of few kinds.
    """
    canvas, cell, (columns, rows) = _make_grid(rng, 3 if crowded else 2)
    cells = [(x, y) for y in range(rows) for x in range(columns)]
    num_shapes = (
        rng.randint(1, len(cells)) if crowded else rng.choices((1, 2, 3, 4), _COUNT_WEIGHTS)[0]
    )
    chosen_cells = rng.sample(cells, min(num_shapes, len(cells)))
    chosen_cells.sort(key=lambda cell_xy: (cell_xy[1], cell_xy[0]))
    kinds = _sample_kinds(canvas, len(chosen_cells), rng, crowded=crowded)
    placed = []
    for kind, cell_xy in zip(kinds, chosen_cells, strict=True):
        is_large = rng.random() < 0.5
        side = round(cell * rng.uniform(*(LARGE_SIZE_RANGE if is_large else SMALL_SIZE_RANGE)))
        margin = (cell - side) / 2
        center = tuple((axis + 0.5) * cell + rng.uniform(-margin, margin) / 2 for axis in cell_xy)
        box = draw_shape(canvas.image, kind, (center[0], center[1]), side, rng)
        placed.append(PlacedShape(kind, cell_xy, is_large, box))
    if not crowded and rng.random() < 0.3:
        placed += _add_inner_shape(canvas, placed, rng)
    return ShapeScene(canvas.image, tuple(placed))


def _make_grid(rng: random.Random, min_columns: int) -> tuple[Canvas, int, tuple[int, int]]:
    """Create the canvas and grid of a scene.

    Returns the canvas, the cell size in pixels, and the numbers of columns and rows.
    """
    cell = rng.randint(*_CELL_SIZE_RANGE)
    max_columns = min(4, _MAX_IMAGE_SIZE // cell)
    columns = rng.randint(min(min_columns, max_columns), max_columns)
    rows = rng.randint(1 if min_columns == 2 else 2, min(3, _MAX_IMAGE_SIZE // cell))
    size = round_up_size(cell * columns, cell * rows, rng)
    return make_canvas(size, rng, pale_fraction=0.75), cell, (columns, rows)


def _sample_kinds(
    canvas: Canvas, num_shapes: int, rng: random.Random, *, crowded: bool
) -> list[ShapeKind]:
    """Sample kinds of shapes that are visible on the background.

    No two kinds have the same color and shape. With `crowded`, a few kinds are repeated; otherwise
    each kind occurs once.
    """
    colors = [
        name
        for name, rgb in COLORS.items()
        if are_distinct(rgb, canvas.background, _MIN_COLOR_DISTANCE)
    ]
    num_kinds = rng.randint(1, min(4, num_shapes)) if crowded else num_shapes
    chosen: dict[tuple[str, str], ShapeKind] = {}
    while len(chosen) < num_kinds:
        kind = _sample_kind(rng, rng.choice(colors))
        chosen.setdefault((kind.color, kind.shape), kind)
    kinds = list(chosen.values())
    return [rng.choice(kinds) for _ in range(num_shapes)] if crowded else kinds


def _sample_kind(rng: random.Random, color: str) -> ShapeKind:
    shape = rng.choice(SHAPES)
    weights = (8.0, 1.5 * (shape in STRIPED_SHAPES), 1.5 * (shape in HOLLOW_SHAPES))
    fill = rng.choices(FILLS, weights)[0]
    return ShapeKind(fill, color, shape)


def _add_inner_shape(
    canvas: Canvas, placed: Sequence[PlacedShape], rng: random.Random
) -> list[PlacedShape]:
    """Add a small shape inside a large solid one, if the scene has one."""
    containers = [
        shape
        for shape in placed
        if shape.is_large
        and shape.kind.shape in CONTAINER_SHAPES
        and shape.kind.fill == "solid"
        and _max_inner_size(shape) >= _MIN_SHAPE_SIZE
    ]
    if not containers:
        return []
    container = rng.choice(containers)
    background = COLORS[container.kind.color]
    taken = {(shape.kind.color, shape.kind.shape) for shape in placed}
    candidates = [
        ShapeKind("solid", name, shape)
        for name, rgb in COLORS.items()
        for shape in SHAPES
        if are_distinct(rgb, background, _MIN_COLOR_DISTANCE + 40) and (name, shape) not in taken
    ]
    kind = rng.choice(candidates)
    side = round(
        rng.uniform(
            max(_MIN_SHAPE_SIZE, 0.87 * _max_inner_size(container)), _max_inner_size(container)
        )
    )
    x1, y1, x2, y2 = container.box
    box = draw_shape(canvas.image, kind, ((x1 + x2) / 2, (y1 + y2) / 2), side, rng)
    return [PlacedShape(kind, container.cell, False, box, container=container.kind)]


def _max_inner_size(container: PlacedShape) -> float:
    """Return the maximum side length of a shape nested in a container.

    It leaves a visible margin.
    """
    x1, y1, x2, y2 = container.box
    return 0.46 * min(x2 - x1, y2 - y1)


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
