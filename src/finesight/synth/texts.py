"""Words, lines, signs and Chinese on paper of many kinds, with a box for each word."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from PIL import ImageDraw, ImageFont

from finesight.synth import vocabulary
from finesight.synth.drawn import Drawn, Said, Turn, boxed
from finesight.synth.fonts import Choice, Face, any_face, drawable, load
from finesight.synth.questions import ask
from finesight.synth.sheet import (
    SQUARE,
    Colour,
    Sheet,
    Word,
    any_colour,
    ink_on,
    paper,
    photographed,
    sides,
)

Rows = list[list[Word]]
"""The words of a picture in reading order, line by line."""

LARGEST = 336
"""Pixels of the longest side."""

MARKS = ",.;:!?"
"""What may stand behind a word of a line."""

_TRIES = 20
_MOST_WORDS = 6


def word(rng: random.Random, fonts: Choice) -> Drawn:
    """One word, number or code that fills most of its picture; read or located."""
    text = vocabulary.word(rng)
    face = _face(text, rng, fonts)
    for _ in range(_TRIES):
        font = load(face, rng.randint(14, 46))
        x1, y1, x2, y2 = font.getbbox(text, anchor="ls")
        wide = max(56, round(x2 - x1) + rng.randint(8, 56))
        high = max(SQUARE, round(y2 - y1) + rng.randint(8, 48))
        if wide > LARGEST:
            continue
        sheet = paper(sides(wide, high, rng), rng)
        sheet.angle = _turn(rng, 5)
        left = rng.uniform(2, max(2, sheet.picture.width - (x2 - x1) - 2)) - x1
        base = rng.uniform(2, max(2, sheet.picture.height - (y2 - y1) - 2)) - y1
        written = sheet.write(text, font, left, base, ink_on(sheet.paper, rng))
        if written:
            return _about(sheet, [[written]], rng, kind="word")
    return word(rng, fonts)


def letters(rng: random.Random, fonts: Choice) -> Drawn:
    """One to four signs that nearly fill a small picture: the first thing to learn reading from."""
    text = vocabulary.few(rng)
    face = _face(text, rng, fonts)
    font = load(face, rng.randint(16, 36))
    x1, y1, x2, y2 = font.getbbox(text, anchor="ls")
    size = sides(max(SQUARE, round(x2 - x1) + 6), max(SQUARE, round(y2 - y1) + 6), rng)
    sheet = paper(size, rng, pale=0.8)
    left = rng.uniform(2, max(2, size[0] - (x2 - x1) - 2)) - x1
    base = rng.uniform(2, max(2, size[1] - (y2 - y1) - 2)) - y1
    written = sheet.write(text, font, left, base, ink_on(sheet.paper, rng))
    if not written:
        return letters(rng, fonts)
    question, answer = answered("read", [[written]], rng)
    return Drawn(sheet.picture, question, answer, "letters")


def words(rng: random.Random, fonts: Choice) -> Drawn:
    """Up to six words in rows, each in a face, size and colour of its own or all in one."""
    size = sides(rng.randint(112, 308), rng.randint(56, 224), rng)
    sheet = paper(size, rng)
    sheet.angle = _turn(rng, 4)
    styles = _styles(sheet.paper, rng, fonts)
    rows = _rows(sheet, rng.randint(2, _MOST_WORDS), styles, vocabulary.word, rng)
    return _about(sheet, rows, rng) if rows else words(rng, fonts)


def pieces(rng: random.Random, fonts: Choice) -> Drawn:
    """Two to five pieces of words in rows. A question means one of them: a model that still learns
    its letters learns that here."""
    sheet = paper(sides(rng.randint(84, 196), rng.randint(56, 140), rng), rng, pale=0.8)
    styles = [(any_face(rng, fonts), rng.randint(16, 32), ink_on(sheet.paper, rng))]
    rows = _rows(sheet, rng.randint(2, 5), styles, vocabulary.few, rng)
    if sum(map(len, rows)) < 2 or not occurring_once(rows):
        return pieces(rng, fonts)
    asking = partial(_asking, rows, {"find": 5.0, "read_at": 3.0, "read": 1.0, "spot": 1.0})
    return Drawn.about(sheet.picture, asking, rng)


def lines(rng: random.Random, fonts: Choice) -> Drawn:
    """One to four lines of print in one face."""
    size = sides(rng.randint(168, LARGEST), rng.randint(40, 140), rng)
    sheet = paper(size, rng, pale=0.8)
    sheet.angle = _turn(rng, 2)
    face, ink = any_face(rng, fonts), ink_on(sheet.paper, rng)
    font = load(face, rng.randint(12, 22))
    ascent, descent = font.getmetrics()
    pitch = (ascent + descent) * rng.uniform(1.0, 1.3)
    left, base, rows = rng.uniform(4, 24), rng.uniform(2, size[1] * 0.4) + ascent, Rows()
    for _ in range(rng.randint(1, 4)):
        row = _line(sheet, font, left, base, ink, rng)
        rows += [row] if row else []
        base += pitch
    return _about(sheet, rows, rng) if rows else lines(rng, fonts)


def sign(rng: random.Random, fonts: Choice) -> Drawn:
    """A board with large capitals before a wall."""
    texts = rng.choice(vocabulary.SIGNS).split("|")
    if rng.random() < 0.35:
        texts = [vocabulary.word(rng).upper() for _ in range(rng.randint(1, 3))]
    face = _face("".join(texts), rng, fonts)
    font = load(face, rng.randint(18, 40))
    pitch = font.size * rng.uniform(1.05, 1.4)
    widest = max(font.getlength(text) for text in texts)
    size = sides(
        round(widest) + rng.randint(36, 90), round(pitch * len(texts)) + rng.randint(36, 80), rng
    )
    if max(size) > LARGEST:
        return sign(rng, fonts)
    sheet = _board(paper(size, rng, pale=0.3), rng)
    sheet.angle = _turn(rng, 5)
    ink, rows = ink_on(sheet.paper, rng), Rows()
    base = size[1] / 2 - pitch * len(texts) / 2 + pitch * 0.78
    for text in texts:
        written = sheet.write(text, font, (size[0] - font.getlength(text)) / 2, base, ink)
        rows += [[written]] if written else []
        base += pitch
    return _about(sheet, rows, rng) if len(rows) == len(texts) else sign(rng, fonts)


def chinese(rng: random.Random, fonts: Choice) -> Drawn:
    """One to three short phrases of Chinese below each other."""
    size = sides(rng.randint(84, 252), rng.randint(40, 168), rng)
    sheet = paper(size, rng, pale=0.7)
    sheet.angle = _turn(rng, 3)
    face, ink = any_face(rng, fonts, "chinese"), ink_on(sheet.paper, rng)
    rows, y = Rows(), rng.uniform(2, size[1] * 0.4)
    for _ in range(rng.randint(1, 3)):
        font = load(face, rng.randint(16, 36))
        text = vocabulary.chinese(rng)
        room = size[0] - font.getlength(text) - 4
        if room < 4 or not drawable(face, text):
            continue
        base = y + font.getmetrics()[0]
        written = sheet.write(text, font, rng.uniform(4, max(4.0, room)), base, ink)
        rows += [[written]] if written else []
        y = base + font.getmetrics()[1] * rng.uniform(0.6, 1.5)
    # Without blanks there is no telling where a word of Chinese ends: none are counted.
    return _about(sheet, rows, rng, countable=False) if rows else chinese(rng, fonts)


def _about(
    sheet: Sheet, rows: Rows, rng: random.Random, kind: str = "read", *, countable: bool = True
) -> Drawn:
    """The finished picture with one of the questions that fit what is written."""
    written = [word for row in rows for word in row]
    choices = {kind: 5.0, "find": 3.0 if occurring_once(rows) else 0.0}
    if len(written) > 1:
        choices |= {"read_at": 3.0, "count_words": 0.4 * countable}
        choices["spot"] = 1.5 if len(written) <= _MOST_WORDS else 0.0
    asking = partial(_asking, rows, choices)
    return Drawn.about(photographed(sheet.picture, rng), asking, rng)


def _asking(rows: Rows, choices: Mapping[str, float], rng: random.Random) -> Turn:
    """One of the kinds of questions, by their shares."""
    asked = rng.choices(list(choices), list(choices.values()))[0]
    return Turn(*answered(asked, rows, rng), asked)


Asked = tuple[tuple[Said, ...], tuple[Said, ...]]


def answered(kind: str, rows: Rows, rng: random.Random) -> Asked:
    """A question of that kind about what is written, and its answer."""
    return _ANSWERS[kind](rows, rng)


def occurring_once(rows: Rows) -> list[Word]:
    """The words that occur once and have no mark behind them that a question could swallow."""
    written = [word for row in rows for word in row]
    counts = Counter(word.text for word in written)
    return [word for word in written if counts[word.text] == 1 and word.text[-1] not in MARKS]


def _read(rows: Rows, rng: random.Random) -> Asked:
    text = "\n".join(" ".join(word.text for word in row) for row in rows)
    return ask("read", rng), (text,)


def _find(rows: Rows, rng: random.Random) -> Asked:
    sought = rng.choice(occurring_once(rows))
    return ask("find", rng, text=sought.text), (boxed(sought.text, sought.corners),)


def _read_at(rows: Rows, rng: random.Random) -> Asked:
    sought = rng.choice([word for row in rows for word in row])
    return ask("read_at", rng, box=boxed(None, sought.corners)), (sought.text,)


def _spot(rows: Rows, rng: random.Random) -> Asked:
    found = tuple(boxed(word.text, word.corners) for row in rows for word in row)
    return ask("spot", rng), found


def _count_words(rows: Rows, rng: random.Random) -> Asked:
    return ask("count_words", rng), (str(sum(map(len, rows))),)


_ANSWERS: dict[str, Callable[[Rows, random.Random], Asked]] = {
    "word": _read,
    "read": _read,
    "find": _find,
    "read_at": _read_at,
    "spot": _spot,
    "count_words": _count_words,
}


def _turn(rng: random.Random, most: float) -> float:
    """Degrees, none for half of the pictures."""
    return rng.uniform(-most, most) if rng.random() < 0.5 else 0.0


def _face(text: str, rng: random.Random, fonts: Choice) -> Face:
    """A face that has every character of the text."""
    for _ in range(_TRIES):
        face = any_face(rng, fonts)
        if drawable(face, text):
            return face
    raise AssertionError(f"no face can draw {text!r}")


Style = tuple[Face, int, Colour]


def _styles(on: Colour, rng: random.Random, fonts: Choice) -> list[Style]:
    """One look for all words, or several."""
    return [
        (any_face(rng, fonts), rng.randint(12, 34), ink_on(on, rng))
        for _ in range(rng.choice((1, 1, 3)))
    ]


Inventing = Callable[[random.Random], str]


def _rows(
    sheet: Sheet, most: int, styles: Sequence[Style], invent: Inventing, rng: random.Random
) -> Rows:
    """Up to so many words in rows down the sheet."""
    rows, height = Rows(), sheet.picture.height
    y = rng.uniform(2, height * 0.45)
    while sum(map(len, rows)) < most and y < height - 14:
        row, y = _row(sheet, y, most - sum(map(len, rows)), styles, invent, rng)
        rows += [row] if row else []
    return rows


def _row(
    sheet: Sheet,
    y: float,
    most: int,
    styles: Sequence[Style],
    invent: Inventing,
    rng: random.Random,
) -> tuple[list[Word], float]:
    """Words on one base line below `y`, and where the next row may start."""
    chosen = [rng.choice(styles) for _ in range(rng.randint(1, min(3, most)))]
    ascent = max(load(face, size).getmetrics()[0] for face, size, _ in chosen)
    descent = max(load(face, size).getmetrics()[1] for face, size, _ in chosen)
    x, row = rng.uniform(3, sheet.picture.width / 3), list[Word]()
    for face, size, ink in chosen:
        text, font = invent(rng), load(face, size)
        written = sheet.write(text, font, x, y + ascent, ink) if drawable(face, text) else None
        if not written:
            break
        row.append(written)
        x += font.getlength(text) + size * rng.uniform(0.4, 1.6)
    return row, y + ascent + descent + rng.uniform(0, 18)


def _line(
    sheet: Sheet,
    font: ImageFont.FreeTypeFont,
    left: float,
    base: float,
    ink: Colour,
    rng: random.Random,
) -> list[Word]:
    """Words from `left` until the sheet is full, or fewer, some with a mark behind them."""
    row, x, most = list[Word](), left, rng.randint(2, 9)
    while len(row) < most:
        text = rng.choice(vocabulary.COMMON) if rng.random() < 0.7 else vocabulary.word(rng)
        text = text.capitalize() if not row and rng.random() < 0.5 else text
        text += rng.choice(MARKS) if rng.random() < 0.12 and text[-1].isalpha() else ""
        written = sheet.write(text, font, x, base, ink)
        if not written:
            break
        row.append(written)
        x += font.getlength(f"{text} ")
    return row


def _board(sheet: Sheet, rng: random.Random) -> Sheet:
    """The sheet with a panel on it, which is then the paper to write on."""
    colour = any_colour(rng)
    if 100 < sum(colour) / 3 < 160:
        colour = rng.choice(((20, 60, 150), (190, 20, 30), (10, 100, 60), (250, 220, 40)))
    width, height = sheet.picture.size
    edge = rng.randint(3, 10)
    box = (edge, edge, width - edge - 1, height - edge - 1)
    frame = ink_on(colour, rng) if rng.random() < 0.6 else None
    draw = ImageDraw.Draw(sheet.picture)
    draw.rounded_rectangle(box, rng.choice((0, 4, 12)), colour, frame, rng.randint(1, 3))
    return Sheet(sheet.picture, colour)
