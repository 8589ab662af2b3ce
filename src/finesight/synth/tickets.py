"""Synthetic train tickets with a table of labels.

Pretraining contains no tickets. They are drawn with the built-in font of Pillow, in three layouts
with the labels and colors of several rail companies. City names are generated, so that a model
cannot memorize those of validation tickets.
"""

from __future__ import annotations

import csv
import datetime
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from finesight.files.storage import write_folder
from finesight.vision.drawing import load_builtin_font


def split_words(text: str) -> tuple[str, ...]:
    """Split a text at white space."""
    return tuple(text.split())


TABLE_FILE = "tickets.csv"
"""Name of the label table, which has one row per image."""

TICKET_FIELDS = ("from", "to", "date", "seat", "price")
"""Fields of a ticket, which are the columns of the label table after `image`."""

IMAGE_WIDTH = 224
"""Width of a ticket in pixels; the height depends on the layout."""

Color = tuple[int, int, int]

TicketFields = dict[str, str]
"""Values of a ticket by the names in TICKET_FIELDS."""

_COMPANIES = (
    "Northline",
    "Coast Rail",
    "Valley Express",
    "Blue Arrow",
    "Green Line",
    "City Link",
    "Great Western",
    "Sunrise Trains",
    "Lake Railway",
    "Metro Rail",
    "Eastern",
    "Swift Rail",
)
_LABEL_SETS: tuple[tuple[str, ...], ...] = (
    ("FROM", "TO", "DATE", "SEAT", "PRICE"),
    ("From", "To", "Date", "Seat", "Fare"),
    ("Departs", "Arrives", "Day", "Place", "Paid"),
)
"""Printed labels of the fields for each company, in the order of TICKET_FIELDS."""

BAND_COLORS: tuple[Color, ...] = ((20, 70, 150), (170, 30, 40), (15, 105, 75), (60, 50, 90))
PAPER_COLORS: tuple[Color, ...] = (
    (255, 255, 255),
    (250, 240, 215),
    (225, 240, 250),
    (252, 228, 200),
)
INK_COLOR: Color = (20, 20, 25)
LABEL_COLOR: Color = (95, 95, 105)
WHITE_COLOR: Color = (255, 255, 255)

_CITY_STEMS = split_words(
    "Ash Elm Oak Red Stone River Wood Hill Clear Long North West High Mill Bridge Fair Green Marsh "
    "Lang Brook King"
)
_CITY_SUFFIXES = split_words("ton ford ham port dale mouth wick field by burgh well")
_MAX_CITY_LETTERS = 10
"""Maximum number of letters of a city name."""

_MAX_CITY_WIDTH = IMAGE_WIDTH // 2 - 12
"""Maximum width of a city name in pixels at the larger font size.

Two city names fit next to each other.
"""

_ONSETS = split_words(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sm sn "
    "sp st str sw th tr tw wh"
)
_NUCLEI = split_words("a e i o u a e i o u ai au ea ee ei ie oa oo ou y")
_CODAS = split_words(
    "b d g k l m n p r s t x ck ct ft ld lk ll lp lt mp nd ng nk nt rd rk rm rn rt ss st"
)

BLOCKED_FRAGMENTS = split_words(
    "ass coc cok cum cun dic dik fag fuc fuk hor kok nig pis rap sex shi slu tit"
)
"""Offensive letter sequences that pseudowords must not contain."""

_BAND_HEIGHT = 26
_MARGIN = 8
_LABEL_SIZE = 14
"""Font size of printed labels, in pixels per em."""

FONT_SIZES = (16, 17)
"""Font sizes of the field values, in pixels per em."""

_FIRST_DAY = datetime.date(2024, 1, 1)
_NUM_DAYS = 1500


@dataclass(frozen=True)
class _TicketStyle:
    """Style of the tickets of one company: name, labels, colors and font size of the values."""

    company: str
    labels: dict[str, str]
    band_color: Color
    background: Color
    font_size: int


def write_tickets(target: Path, num_tickets: int, seed: int) -> Path:
    """Write images of tickets and their label table to a new folder.

    A row of the table consists of `image`, a path relative to the table, and TICKET_FIELDS. The
    output is determined by the seed. A larger number of tickets extends a smaller one.

    Returns:
        Path of the label table.

    Raises:
        UserError: `target` exists.
    """
    with write_folder(target) as folder:
        (folder / "images").mkdir()
        text = io.StringIO()
        writer = csv.DictWriter(text, ("image", *TICKET_FIELDS), lineterminator="\n")
        writer.writeheader()
        for index in range(num_tickets):
            # A text seed is hashed: adjacent indices give independent samples.
            rng = random.Random(f"ticket {seed} {index}")
            name = f"images/{index:04}.png"
            fields = sample_ticket(rng)
            draw_ticket(fields, rng).save(folder / name)
            writer.writerow({"image": name, **fields})
        (folder / TABLE_FILE).write_text(text.getvalue(), encoding="utf-8")
    return target / TABLE_FILE


def sample_ticket(rng: random.Random) -> TicketFields:
    """Sample the fields of a ticket: two cities, a date, a seat and a price."""
    start = _sample_city(rng)
    end = start
    while end == start:
        end = _sample_city(rng)
    day = _FIRST_DAY + datetime.timedelta(days=rng.randrange(_NUM_DAYS))
    seat = f"{rng.randint(1, 89)}{rng.choice('ABCD')}"
    price = f"${rng.randint(150, 9999) / 100:.2f}"
    values = (start, end, f"{day.day} {day:%b} {day.year}", seat, price)
    return dict(zip(TICKET_FIELDS, values, strict=True))


def _sample_city(rng: random.Random) -> str:
    while True:
        stem = rng.choice(_CITY_STEMS) if rng.random() < 0.25 else sample_pseudoword(rng)
        name = f"{stem}{rng.choice(_CITY_SUFFIXES)}".capitalize()
        is_blocked = any(fragment in name.lower() for fragment in BLOCKED_FRAGMENTS)
        if (
            len(name) <= _MAX_CITY_LETTERS
            and not is_blocked
            and load_builtin_font(max(FONT_SIZES)).getlength(name) <= _MAX_CITY_WIDTH
        ):
            return name


def sample_pseudoword(rng: random.Random) -> str:
    """Sample a pseudoword of one to three syllables in lower case.

    Offensive letter sequences are excluded.
    """
    while True:
        syllables = rng.choice((1, 2, 2, 2, 3, 3))
        text = "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) for _ in range(syllables))
        if rng.random() < 0.6:
            text += rng.choice(_CODAS)
        if not any(fragment in text for fragment in BLOCKED_FRAGMENTS):
            return text


def draw_ticket(fields: TicketFields, rng: random.Random) -> Image.Image:
    """Draw a ticket as an RGB image in one of three layouts.

    The image is IMAGE_WIDTH pixels wide.
    """
    labels = dict(zip(TICKET_FIELDS, rng.choice(_LABEL_SETS), strict=True))
    company = rng.choice(_COMPANIES)
    font_size = rng.choice(FONT_SIZES)
    style = _TicketStyle(
        company, labels, rng.choice(BAND_COLORS), rng.choice(PAPER_COLORS), font_size
    )
    layout, height = rng.choice(LAYOUTS)
    image = Image.new("RGB", (IMAGE_WIDTH, height), style.background)
    draw = ImageDraw.Draw(image)
    _draw_background(draw, height, style, rng)
    layout(draw, fields, style, rng)
    return image


def _draw_background(
    draw: ImageDraw.ImageDraw, height: int, style: _TicketStyle, rng: random.Random
) -> None:
    """Draw a band with the company and a ticket number, and holes or a stripe at the bottom."""
    draw.rectangle((0, 0, IMAGE_WIDTH, _BAND_HEIGHT - 1), style.band_color)
    _draw_text(draw, style.company, _LABEL_SIZE, _MARGIN, 18, WHITE_COLOR)
    number = f"No {rng.randrange(1000, 10_000)}"
    left = IMAGE_WIDTH - _MARGIN - load_builtin_font(_LABEL_SIZE).getlength(number)
    _draw_text(draw, number, _LABEL_SIZE, left, 18, WHITE_COLOR)
    if rng.random() < 0.5:
        draw.rectangle((0, height - 4, IMAGE_WIDTH, height), style.band_color)
    else:
        for x in range(4, IMAGE_WIDTH, 12):
            draw.ellipse((x, height - 5, x + 5, height), style.band_color)


def _draw_two_rows(
    draw: ImageDraw.ImageDraw, fields: TicketFields, style: _TicketStyle, rng: random.Random
) -> None:
    """Draw a ticket with both cities side by side and other fields below.

    Each field has a label.
    """
    rest = (("price", 114), ("seat", 176))
    if rng.random() < 0.5:
        rest = (("seat", 114), ("price", 160))
    _draw_labeled_fields(
        draw, fields, style, (("from", _MARGIN), ("to", IMAGE_WIDTH // 2 + 4)), _BAND_HEIGHT
    )
    _draw_labeled_fields(draw, fields, style, (("date", _MARGIN), *rest), _BAND_HEIGHT + 42)


def _draw_list(
    draw: ImageDraw.ImageDraw, fields: TicketFields, style: _TicketStyle, rng: random.Random
) -> None:
    """Draw a ticket with one line per field and its label on the left.

    The last three fields are in random order.
    """
    shuffled = rng.sample(TICKET_FIELDS[2:], 3)
    for line, name in enumerate((*TICKET_FIELDS[:2], *shuffled)):
        base = _BAND_HEIGHT + 18 + 20 * line
        _draw_text(draw, style.labels[name], _LABEL_SIZE, _MARGIN, base, LABEL_COLOR)
        _draw_text(draw, fields[name], style.font_size, 84, base, INK_COLOR)


def _draw_route(
    draw: ImageDraw.ImageDraw, fields: TicketFields, style: _TicketStyle, rng: random.Random
) -> None:
    """Draw a ticket with large city names next to a line with two stops.

    The fields have no labels.
    """
    draw.line((15, _BAND_HEIGHT + 14, 15, _BAND_HEIGHT + 38), style.band_color, 2)
    for y, name in ((_BAND_HEIGHT + 14, "from"), (_BAND_HEIGHT + 38, "to")):
        draw.ellipse((11, y - 4, 19, y + 4), style.band_color)
        _draw_text(draw, fields[name], style.font_size + 2, 30, y + 6, INK_COLOR)
    _draw_text(draw, fields["price"], style.font_size, 158, _BAND_HEIGHT + 20, INK_COLOR)
    _draw_labeled_fields(draw, fields, style, (("date", _MARGIN), ("seat", 138)), _BAND_HEIGHT + 42)


LAYOUTS: tuple[
    tuple[Callable[[ImageDraw.ImageDraw, TicketFields, _TicketStyle, random.Random], None], int],
    ...,
] = ((_draw_two_rows, 112), (_draw_list, 140), (_draw_route, 112))
"""Functions that draw a layout, with the image height of the layout in pixels."""


def _draw_labeled_fields(
    draw: ImageDraw.ImageDraw,
    fields: TicketFields,
    style: _TicketStyle,
    columns: Sequence[tuple[str, int]],
    top: int,
) -> None:
    """Draw fields of a ticket side by side, each under its label."""
    for name, x in columns:
        _draw_text(draw, style.labels[name], _LABEL_SIZE, x, top + 16, LABEL_COLOR)
        _draw_text(draw, fields[name], style.font_size, x, top + 35, INK_COLOR)


def _draw_text(
    draw: ImageDraw.ImageDraw, text: str, size: int, left: float, baseline: int, color: Color
) -> None:
    draw.text((round(left), baseline), text, color, load_builtin_font(size), anchor="ls")
