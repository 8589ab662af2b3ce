"""Scenes of coloured shapes: described, counted, located and compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from PIL import Image

from finesight.synth import captions
from finesight.synth.captions import Relation, Stated, spoken
from finesight.synth.drawn import Corners, Drawn, Said, Turn, boxed
from finesight.synth.fonts import Choice
from finesight.synth.questions import ask, in_chinese
from finesight.synth.shapes import (
    COLOURS,
    FILLS,
    HOLDING,
    HOLLOW,
    SHAPES,
    STRIPED,
    Kind,
    apart,
    draw,
)
from finesight.synth.sheet import Sheet, paper, photographed, sides

MOST_DESCRIBED = 4
"""Shapes, besides one inside of another, of a scene that is described."""

MOST_LISTED = 5

LARGE, SMALL = (0.82, 0.92), (0.42, 0.5)
"""Sides of shapes as shares of their cell: nothing in between, so that larger is plain to see."""

_NUMBERS = (1, 3, 3, 2)
"""How often a scene that is described has one to MOST_DESCRIBED shapes."""

_CONTRAST = 110.0

_LEAST = 20
"""Pixels of the smallest shape's side: below, a hexagon looks like a circle."""

_CELLS = (48, 88)
_LARGEST = 288


@dataclass(frozen=True)
class Placed:
    """A shape in its cell (column, row); `within` is the shape that it is inside of."""

    kind: Kind
    cell: tuple[int, int]
    large: bool
    corners: Corners
    within: Kind | None = None


@dataclass(frozen=True)
class Scene:
    picture: Image.Image
    placed: tuple[Placed, ...]

    @property
    def standing(self) -> list[Placed]:
        """The shapes that are inside of no other, row by row from the left."""
        return [shape for shape in self.placed if shape.within is None]


def scene(rng: random.Random, fonts: Choice) -> Drawn:
    """A few shapes, all different, asked about one by one, two by two or all together."""
    made = compose(rng, crowded=False)
    kinds = {"describe": 5.0, "all_shapes": 1.5, "find_shapes": 1.5, "shape_at": 1.5}
    if len(made.standing) > 1:
        kinds |= {"is_it": 1.5, "how_related": 1.5}
        kinds["larger"] = 1.2 if len({shape.large for shape in made.standing}) > 1 else 0.0
    return _about(made, kinds, rng)


def crowd(rng: random.Random, fonts: Choice) -> Drawn:
    """Many shapes of few kinds, to be counted and found."""
    made = compose(rng, crowded=True)
    least = min(Counter(shape.kind for shape in made.placed).values())
    kinds = {"count": 4.0, "shape_at": 1.0, "find_shapes": 2.0 if least <= MOST_LISTED else 0.0}
    kinds["all_shapes"] = 1.0 if len(made.placed) <= MOST_LISTED else 0.0
    return _about(made, kinds, rng)


def stated(made: Scene) -> list[Stated]:
    """What a caption of the scene says: how each shape stands to the next, row by row, what is
    inside of what, and which of two neighbours is larger."""
    standing = made.standing
    pairs = list(pairwise(standing))
    inside: list[Stated] = [
        (shape.kind, "inside", shape.within) for shape in made.placed if shape.within is not None
    ]
    sizes: list[Stated] = []
    for first, second in pairs:
        if first.large != second.large:
            bigger, other = (first, second) if first.large else (second, first)
            sizes.append((bigger.kind, "larger", other.kind))
    return [(a.kind, relation(a, b), b.kind) for a, b in pairs] + inside + sizes


def relation(first: Placed, second: Placed) -> Relation:
    """Where the first stands: beside the other where they are further apart that way, or else
    above or below it."""
    across, down = (first.cell[axis] - second.cell[axis] for axis in (0, 1))
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _about(made: Scene, kinds: dict[str, float], rng: random.Random) -> Drawn:
    return Drawn.about(photographed(made.picture, rng), partial(_asking, made, kinds), rng)


def compose(rng: random.Random, *, crowded: bool) -> Scene:
    """Shapes in cells of a grid, row by row: up to MOST_DESCRIBED, all different and perhaps one
    inside of another, or a crowd of few kinds."""
    sheet, cell, (columns, rows) = _ground(rng, 3 if crowded else 2)
    cells = [(x, y) for y in range(rows) for x in range(columns)]
    number = rng.randint(1, len(cells)) if crowded else rng.choices((1, 2, 3, 4), _NUMBERS)[0]
    chosen = rng.sample(cells, min(number, len(cells)))
    chosen.sort(key=lambda at: (at[1], at[0]))
    kinds = _kinds(sheet, len(chosen), rng, crowded=crowded)
    placed = []
    for kind, at in zip(kinds, chosen, strict=True):
        large = rng.random() < 0.5
        side = round(cell * rng.uniform(*(LARGE if large else SMALL)))
        spare = (cell - side) / 2
        centre = tuple((axis + 0.5) * cell + rng.uniform(-spare, spare) / 2 for axis in at)
        corners = draw(sheet.picture, kind, (centre[0], centre[1]), side, rng)
        placed.append(Placed(kind, at, large, corners))
    if not crowded and rng.random() < 0.3:
        placed += _inner(sheet, placed, rng)
    return Scene(sheet.picture, tuple(placed))


def _ground(rng: random.Random, least: int) -> tuple[Sheet, int, tuple[int, int]]:
    """Paper, the pixels of a cell, and how many cells there are across and down."""
    cell = rng.randint(*_CELLS)
    most = min(4, _LARGEST // cell)
    columns = rng.randint(min(least, most), most)
    rows = rng.randint(1 if least == 2 else 2, min(3, _LARGEST // cell))
    size = sides(cell * columns, cell * rows, rng)
    return paper(size, rng, pale=0.75), cell, (columns, rows)


def _kinds(sheet: Sheet, number: int, rng: random.Random, *, crowded: bool) -> list[Kind]:
    """Kinds that can be seen on the paper, no two of one colour and shape: a few, repeated, for a
    crowd, else each once."""
    colours = [name for name, colour in COLOURS.items() if apart(colour, sheet.paper, _CONTRAST)]
    number_of_kinds = rng.randint(1, min(4, number)) if crowded else number
    chosen: dict[tuple[str, str], Kind] = {}
    while len(chosen) < number_of_kinds:
        kind = _kind(rng, rng.choice(colours))
        chosen.setdefault((kind.colour, kind.shape), kind)
    few = list(chosen.values())
    return [rng.choice(few) for _ in range(number)] if crowded else few


def _kind(rng: random.Random, colour: str) -> Kind:
    shape = rng.choice(SHAPES)
    weights = (8.0, 1.5 * (shape in STRIPED), 1.5 * (shape in HOLLOW))
    fill = rng.choices(FILLS, weights)[0]
    return Kind(fill, colour, shape)


def _inner(sheet: Sheet, placed: Sequence[Placed], rng: random.Random) -> list[Placed]:
    """A small shape inside of a large solid one, if there is any to hold it."""
    holders = [
        shape
        for shape in placed
        if shape.large
        and shape.kind.shape in HOLDING
        and shape.kind.fill == "solid"
        and _room(shape) >= _LEAST
    ]
    if not holders:
        return []
    holder = rng.choice(holders)
    ground = COLOURS[holder.kind.colour]
    taken = {(shape.kind.colour, shape.kind.shape) for shape in placed}
    able = [
        Kind("solid", name, shape)
        for name, colour in COLOURS.items()
        for shape in SHAPES
        if apart(colour, ground, _CONTRAST + 40) and (name, shape) not in taken
    ]
    kind = rng.choice(able)
    side = round(rng.uniform(max(_LEAST, 0.87 * _room(holder)), _room(holder)))
    x1, y1, x2, y2 = holder.corners
    corners = draw(sheet.picture, kind, ((x1 + x2) / 2, (y1 + y2) / 2), side, rng)
    return [Placed(kind, holder.cell, False, corners, within=holder.kind)]


def _room(holder: Placed) -> float:
    """Side of the largest shape that leaves enough of its holder to be seen, all around."""
    x1, y1, x2, y2 = holder.corners
    return 0.46 * min(x2 - x1, y2 - y1)


Asked = tuple[tuple[Said, ...], tuple[Said, ...]]


def _describe(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    things = [shape.kind for shape in made.placed]
    text = captions.caption(things, stated(made), chinese=chinese)
    return ask("describe", rng, chinese=chinese), (text,)


def _count(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    things, number = counted(made, chinese, rng)
    return ask("count", rng, chinese=chinese, things=things), (str(number),)


def counted(made: Scene, chinese: bool, rng: random.Random) -> tuple[str, int]:
    """A class of shapes in the plural and how many there are, sometimes none."""
    some = rng.choice(made.placed).kind
    share = rng.random()
    if share < 0.15:
        return ("图形" if chinese else "shapes"), len(made.placed)
    if share < 0.4:
        shape = some.shape if rng.random() < 0.85 else rng.choice(SHAPES)
        number = sum(each.kind.shape == shape for each in made.placed)
        return _plural(captions.shape_word(shape, chinese), chinese), number
    colour = some.colour if rng.random() < 0.85 else rng.choice(tuple(COLOURS))
    word = captions.colour_word(colour, chinese)
    if share < 0.65:
        number = sum(each.kind.colour == colour for each in made.placed)
        return (f"{word}图形" if chinese else f"{word} shapes"), number
    shape = captions.shape_word(some.shape, chinese)
    both = (colour, some.shape)
    number = sum((each.kind.colour, each.kind.shape) == both for each in made.placed)
    return _plural(f"{word}{shape}" if chinese else f"{word} {shape}", chinese), number


def _plural(words: str, chinese: bool) -> str:
    if chinese:
        return words
    return f"{words}es" if words.endswith(("s", "x")) else f"{words}s"


def _find_shapes(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    counts = Counter(shape.kind for shape in made.placed)
    kind = rng.choice([kind for kind, count in counts.items() if count <= MOST_LISTED])
    thing = spoken(kind, chinese)
    found = (boxed(thing, shape.corners) for shape in made.placed if shape.kind == kind)
    return ask("find_shapes", rng, chinese=chinese, thing=thing), tuple(found)


def _all_shapes(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    found = (boxed(spoken(shape.kind, chinese), shape.corners) for shape in made.placed)
    return ask("all_shapes", rng, chinese=chinese), tuple(found)


def _shape_at(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    held = {shape.within for shape in made.placed}
    shape = rng.choice([shape for shape in made.placed if shape.kind not in held] or made.placed)
    box = boxed(None, shape.corners)
    return ask("shape_at", rng, chinese=chinese, box=box), (spoken(shape.kind, chinese),)


def _is_it(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    first, second = _pair(made, rng)
    true = relation(first, second)
    opposite: dict[Relation, Relation] = {
        "left": "right",
        "right": "left",
        "above": "below",
        "below": "above",
    }
    yes = rng.random() < 0.5
    words = (captions.CHINESE if chinese else captions.ENGLISH)[true if yes else opposite[true]]
    pair = {"first": spoken(first.kind, chinese), "second": spoken(second.kind, chinese)}
    said = ("是" if yes else "否") if chinese else ("yes" if yes else "no")
    return ask("is_it", rng, chinese=chinese, relation=words, **pair), (said,)


def _how_related(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    first, second = _pair(made, rng)
    words = (captions.CHINESE if chinese else captions.ENGLISH)[relation(first, second)]
    pair = {"first": spoken(first.kind, chinese), "second": spoken(second.kind, chinese)}
    return ask("how_related", rng, chinese=chinese, **pair), (words,)


def _larger(made: Scene, chinese: bool, rng: random.Random) -> Asked:
    bigger = rng.choice([shape for shape in made.standing if shape.large])
    other = rng.choice([shape for shape in made.standing if not shape.large])
    first, second = rng.sample((bigger, other), 2)
    pair = {"first": spoken(first.kind, chinese), "second": spoken(second.kind, chinese)}
    return ask("larger", rng, chinese=chinese, **pair), (spoken(bigger.kind, chinese),)


def _pair(made: Scene, rng: random.Random) -> tuple[Placed, Placed]:
    first, second = rng.sample(made.standing, 2)
    return first, second


def _asking(made: Scene, kinds: Mapping[str, float], rng: random.Random) -> Turn:
    """One of the kinds of questions, by their shares, in one of the two languages."""
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return Turn(*_ANSWERS[kind](made, in_chinese(rng), rng), kind)


_ANSWERS: dict[str, Callable[[Scene, bool, random.Random], Asked]] = {
    "describe": _describe,
    "count": _count,
    "find_shapes": _find_shapes,
    "all_shapes": _all_shapes,
    "shape_at": _shape_at,
    "is_it": _is_it,
    "how_related": _how_related,
    "larger": _larger,
}
