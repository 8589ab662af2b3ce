"""Train tickets: a kind of document that pre-training never shows, with a table of what they say.

Pillow alone draws them, in its built-in face. Three layouts, labels and colours of several rail
companies, and places that are made up anew, so that a held-out ticket cannot be known by heart.
"""

from __future__ import annotations

import csv
import datetime
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from finesight.storage import write_folder
from finesight.synth import vocabulary
from finesight.synth.fonts import faces, load
from finesight.synth.sheet import Colour, Sheet

TABLE = "tickets.csv"
"""The label file: a row for each picture."""

FIELDS = ("from", "to", "date", "seat", "price")
"""What a ticket says, column by column of the table, after the path of its `picture`."""

WIDTH = 224
"""Pixels across; the height goes by the layout."""

Fields = dict[str, str]
"""What stands on a ticket, by FIELDS."""

_COMPANIES = (
    *("Northline", "Coast Rail", "Valley Express", "Blue Arrow", "Green Line", "City Link"),
    *("Great Western", "Sunrise Trains", "Lake Railway", "Metro Rail", "Eastern", "Swift Rail"),
)
_LABELS: tuple[tuple[str, ...], ...] = (
    ("FROM", "TO", "DATE", "SEAT", "PRICE"),
    ("From", "To", "Date", "Seat", "Fare"),
    ("Departs", "Arrives", "Day", "Place", "Paid"),
)
"""How companies name the FIELDS, in their order."""

_BANDS: tuple[Colour, ...] = ((20, 70, 150), (170, 30, 40), (15, 105, 75), (60, 50, 90))
_PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 240, 215), (225, 240, 250), (252, 228, 200))
_INK: Colour = (20, 20, 25)
_PALE: Colour = (95, 95, 105)
_WHITE: Colour = (255, 255, 255)

_STEMS = (
    *("Ash", "Elm", "Oak", "Red", "Stone", "River", "Wood", "Hill", "Clear", "Long", "North"),
    *("West", "High", "Mill", "Bridge", "Fair", "Green", "Marsh", "Lang", "Brook", "King"),
)
_ENDINGS = ("ton", "ford", "ham", "port", "dale", "mouth", "wick", "field", "by", "burgh", "well")
_LONGEST = 10
"""Letters of a place."""

_WIDEST = WIDTH // 2 - 12
"""Pixels of a place at the larger of _SIZES: two stand side by side."""

_BAND = 26
_MARGIN = 8
_SMALL, _SIZES = 14, (16, 17)
"""Pixels an em of labels, and of what they name."""

_FIRST_DAY = datetime.date(2024, 1, 1)
_DAYS = 1500


@dataclass(frozen=True)
class _Look:
    """A company: its name, labels and colours, and the size of what labels name."""

    company: str
    labels: dict[str, str]
    band: Colour
    paper: Colour
    size: int


def draw_tickets(target: Path, count: int, seed: int) -> Path:
    """Write `count` pictures and their table into the new folder `target`; gives the table's path.

    A row has `picture` (a path relative to the table) and FIELDS. The same seed draws the same,
    and more tickets begin with the same ones. Raises UserError when `target` exists.
    """
    with write_folder(target) as folder:
        (folder / "pictures").mkdir()
        text = io.StringIO()
        table = csv.DictWriter(text, ("picture", *FIELDS), lineterminator="\n")
        table.writeheader()
        for number in range(count):
            # A text as seed is hashed whole: neighbouring numbers have nothing in common.
            rng = random.Random(f"ticket {seed} {number}")
            said, name = invented(rng), f"pictures/{number:04}.png"
            printed(said, rng).save(folder / name)
            table.writerow({"picture": name, **said})
        (folder / TABLE).write_text(text.getvalue(), encoding="utf-8")
    return target / TABLE


def invented(rng: random.Random) -> Fields:
    """A journey between two places, a day, a seat and what it cost."""
    start = _place(rng)
    end = start
    while end == start:
        end = _place(rng)
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_DAYS))
    seat = f"{rng.randint(1, 89)}{rng.choice('ABCD')}"
    price = f"${rng.randint(150, 9999) / 100:.2f}"
    values = (start, end, f"{day.day} {day:%b} {day.year}", seat, price)
    return dict(zip(FIELDS, values, strict=True))


def _place(rng: random.Random) -> str:
    while True:
        stem = rng.choice(_STEMS) if rng.random() < 0.25 else vocabulary.made_up(rng)
        name = f"{stem}{rng.choice(_ENDINGS)}".capitalize()
        rude = any(fragment in name.lower() for fragment in vocabulary.AVOIDED)
        if len(name) <= _LONGEST and not rude and _length(name, max(_SIZES)) <= _WIDEST:
            return name


def printed(said: Fields, rng: random.Random) -> Image.Image:
    """The ticket as an RGB picture, WIDTH pixels wide, in one of three layouts."""
    labels = dict(zip(FIELDS, rng.choice(_LABELS), strict=True))
    company, size = rng.choice(_COMPANIES), rng.choice(_SIZES)
    look = _Look(company, labels, rng.choice(_BANDS), rng.choice(_PAPERS), size)
    layout, height = rng.choice(_LAYOUTS)
    sheet = _blank(height, look, rng)
    layout(sheet, said, look, rng)
    return sheet.picture


def _blank(height: int, look: _Look, rng: random.Random) -> Sheet:
    """Paper with the company's band on top, a number in it, and holes or a stripe at the foot."""
    picture = Image.new("RGB", (WIDTH, height), look.paper)
    draw, sheet = ImageDraw.Draw(picture), Sheet(picture, look.paper)
    draw.rectangle((0, 0, WIDTH, _BAND - 1), look.band)
    _write(sheet, look.company, _SMALL, _MARGIN, 18, _WHITE)
    number = f"No {rng.randrange(1000, 10_000)}"
    _write(sheet, number, _SMALL, WIDTH - _MARGIN - _length(number, _SMALL), 18, _WHITE)
    if rng.random() < 0.5:
        draw.rectangle((0, height - 4, WIDTH, height), look.band)
    else:
        for x in range(4, WIDTH, 12):
            draw.ellipse((x, height - 5, x + 5, height), look.band)
    return sheet


def _two_rows(sheet: Sheet, said: Fields, look: _Look, rng: random.Random) -> None:
    """Places side by side, the rest below them, each under its label."""
    first = rng.random() < 0.5
    rest = (("seat", 114), ("price", 160)) if first else (("price", 114), ("seat", 176))
    _under_labels(sheet, said, look, (("from", _MARGIN), ("to", WIDTH // 2 + 4)), _BAND)
    _under_labels(sheet, said, look, (("date", _MARGIN), *rest), _BAND + 42)


def _list(sheet: Sheet, said: Fields, look: _Look, rng: random.Random) -> None:
    """A line for each field, labels on the left, the order of the last three in doubt."""
    last = rng.sample(FIELDS[2:], 3)
    for line, name in enumerate((*FIELDS[:2], *last)):
        base = _BAND + 18 + 20 * line
        _write(sheet, look.labels[name], _SMALL, _MARGIN, base, _PALE)
        _write(sheet, said[name], look.size, 84, base, _INK)


def _route(sheet: Sheet, said: Fields, look: _Look, rng: random.Random) -> None:
    """The places large, one below the other beside a line with two stops; no label names them."""
    draw = ImageDraw.Draw(sheet.picture)
    draw.line((15, _BAND + 14, 15, _BAND + 38), look.band, 2)
    for y, name in ((_BAND + 14, "from"), (_BAND + 38, "to")):
        draw.ellipse((11, y - 4, 19, y + 4), look.band)
        _write(sheet, said[name], look.size + 2, 30, y + 6, _INK)
    _write(sheet, said["price"], look.size, 158, _BAND + 20, _INK)
    _under_labels(sheet, said, look, (("date", _MARGIN), ("seat", 138)), _BAND + 42)


_LAYOUTS: tuple[tuple[Callable[[Sheet, Fields, _Look, random.Random], None], int], ...] = (
    (_two_rows, 112),
    (_list, 140),
    (_route, 112),
)
"""Each layout and the height that it needs."""


def _under_labels(
    sheet: Sheet, said: Fields, look: _Look, places: Sequence[tuple[str, int]], top: int
) -> None:
    """Fields at their places across, each under its label."""
    for name, x in places:
        _write(sheet, look.labels[name], _SMALL, x, top + 16, _PALE)
        _write(sheet, said[name], look.size, x, top + 35, _INK)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return load(faces("built-in")[0], size)


def _length(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _write(sheet: Sheet, text: str, size: int, x: float, base: float, ink: Colour) -> None:
    written = sheet.write(text, _font(size), x, base, ink)
    assert written, f"{text!r} does not fit at {x}, {base}"
