"""Larger pictures full of things that mean nothing, with a few plates that bear words."""

from __future__ import annotations

import random
from functools import partial

from PIL import Image, ImageDraw, ImageFilter

from finesight.synth import vocabulary
from finesight.synth.drawn import Corners, Drawn, Turn
from finesight.synth.fonts import Choice, any_face, drawable, load
from finesight.synth.sheet import (
    SQUARE,
    Colour,
    Sheet,
    Word,
    any_colour,
    ink_on,
    paper,
    photographed,
)
from finesight.synth.texts import answered, occurring_once

ACROSS, DOWN = (9, 20), (7, 13)
"""Squares of a picture's sides."""

MOST_PLATES = 5

_SIZES = (11, 12, 13, 14, 16, 18, 20, 24, 30)
_COARSER = 2
"""Clutter is drawn so many times smaller and then enlarged, for soft edges."""


def street(rng: random.Random, fonts: Choice) -> Drawn:
    """Words on plates among clutter, one of them to be found or read."""
    size = SQUARE * rng.randint(*ACROSS), SQUARE * rng.randint(*DOWN)
    picture = cluttered(size, rng)
    taken: list[Corners] = []
    words: list[Word] = []
    for _ in range(rng.randint(1, MOST_PLATES)):
        plate, written = _plate(rng, fonts)
        wide, high = plate.size
        if not written or wide >= size[0] or high >= size[1]:
            continue
        x, y = rng.randrange(size[0] - wide), rng.randrange(size[1] - high)
        if any(_meet((x, y, x + wide, y + high), other) for other in taken):
            continue
        picture.paste(plate, (x, y))
        taken.append((x, y, x + wide, y + high))
        words += [_moved(word, x, y) for word in written]
    if not occurring_once([words]):
        return street(rng, fonts)
    return Drawn.about(photographed(picture, rng), partial(_asking, words), rng)


def _asking(words: list[Word], rng: random.Random) -> Turn:
    kind = rng.choices(("find", "read_at"), (3, 2))[0]
    return Turn(*answered(kind, [words], rng), kind)


def cluttered(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Walls, windows, poles and round things in any colours, somewhat out of focus."""
    wide, high = size[0] // _COARSER, size[1] // _COARSER
    colours = [_muted(rng) for _ in range(rng.randint(2, 4))]
    picture = Image.new("RGB", (1, len(colours)))
    picture.putdata(colours)
    picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(6, 40)):
        x, y = rng.randrange(-20, wide), rng.randrange(-20, high)
        box = (x, y, x + rng.randint(2, wide // 3), y + rng.randint(2, high // 2))
        share, colour = rng.random(), _muted(rng)
        if share < 0.5:
            draw.rectangle(box, colour)
        elif share < 0.7:
            draw.ellipse(box, colour)
        elif share < 0.85:
            draw.line(box, colour, rng.randint(1, 5))
        else:
            draw.rectangle(box, outline=colour, width=rng.randint(1, 3))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    return picture.resize(size, Image.Resampling.BILINEAR)


def _plate(rng: random.Random, fonts: Choice) -> tuple[Image.Image, list[Word]]:
    """One to three lines of a word each on a plain ground; no words where one did not fit."""
    texts = rng.choice(vocabulary.SIGNS).split("|") if rng.random() < 0.3 else None
    texts = texts or [vocabulary.word(rng) for _ in range(rng.randint(1, 3))]
    face = any_face(rng, fonts)
    font = load(face, rng.choice(_SIZES))
    pitch = font.size * rng.uniform(1.05, 1.4)
    edge = rng.randint(4, 14)
    size = (
        round(max(map(font.getlength, texts))) + 2 * edge,
        round(pitch * len(texts)) + 2 * edge,
    )
    sheet = paper(size, rng, pale=0.5)
    if rng.random() < 0.5:
        sheet = Sheet(Image.new("RGB", size, sheet.paper), sheet.paper)
    sheet.angle = rng.uniform(-6, 6) if rng.random() < 0.5 else 0.0
    ink, words = ink_on(sheet.paper, rng), []
    for line, text in enumerate(texts):
        left = (size[0] - font.getlength(text)) / 2
        base = edge + pitch * (line + 0.75)
        written = sheet.write(text, font, left, base, ink) if drawable(face, text) else None
        if not written:
            return sheet.picture, []
        words.append(written)
    return sheet.picture, words


def _muted(rng: random.Random) -> Colour:
    """A colour as things outdoors have it: mostly near to gray."""
    if rng.random() < 0.15:
        return any_colour(rng)
    gray = rng.randrange(15, 240)
    red, green, blue = (min(255, max(0, gray + rng.randint(-35, 35))) for _ in range(3))
    return red, green, blue


def _meet(first: Corners, second: Corners) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _moved(word: Word, x: int, y: int) -> Word:
    x1, y1, x2, y2 = word.corners
    return Word(word.text, (x1 + x, y1 + y, x2 + x, y2 + y))
