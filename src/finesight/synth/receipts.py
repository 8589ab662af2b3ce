"""Receipts: a shop, a date, items with prices and their total, each word with its box."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image, ImageDraw, ImageFont

from finesight.synth import vocabulary
from finesight.synth.drawn import Drawn, Said, Turn, boxed
from finesight.synth.fonts import Choice, any_face, load
from finesight.synth.questions import ask
from finesight.synth.sheet import Colour, Sheet, Word, paper, photographed, sides

ITEMS = (
    *("Milk", "Bread", "Butter", "Cheese", "Eggs", "Coffee", "Tea", "Sugar", "Rice", "Pasta"),
    *("Apples", "Bananas", "Lemons", "Onions", "Carrots", "Tomatoes", "Potatoes", "Salad"),
    *("Chicken", "Fish", "Soup", "Yogurt", "Honey", "Jam", "Juice", "Water", "Cake", "Cookies"),
    *("Chocolate", "Soap", "Paper", "Candles", "Pepper", "Salt", "Flour", "Cereal", "Olives"),
    *("Sandwich", "Muffin", "Bagel", "Pizza", "Burger", "Fries", "Wrap", "Pencil", "Notebook"),
)
SHOPS = ("Market", "Cafe", "Bakery", "Store", "Foods", "Deli", "Shop", "Mart", "Kitchen", "Books")
TOTALS = ("TOTAL", "Total", "Total:", "TOTAL:", "Amount due", "To pay", "Sum")
ENDINGS = ("Thank you!", "Please come again", "THANK YOU", "Have a nice day", "Goodbye")

_SIZES = (12, 12, 13, 14, 15, 16)
_WIDTHS = (140, 224)
_TALLEST = 308
_INKS: tuple[Colour, ...] = ((0, 0, 0), (25, 25, 35), (50, 40, 60), (40, 40, 110))


@dataclass
class Receipt:
    """What a receipt says, and where."""

    shop: str
    date: str
    prices: dict[str, str]
    total: str
    words: list[Word] = field(default_factory=list)
    sum_at: Word | None = None


class _Roll:
    """Paper that is written from the top: words on the left, an amount at the right edge."""

    def __init__(self, sheet: Sheet, font: ImageFont.FreeTypeFont, ink: Colour, pitch: float):
        self.sheet, self.font, self.ink, self.pitch = sheet, font, ink, pitch
        self.margin = 6.0
        self.base = self.margin + font.getmetrics()[0]
        self.words: list[Word] = []
        self.complete = True

    def line(self, text: str, amount: str = "", *, middle: bool = False) -> Word | None:
        """Write a line; gives the word of the amount. What does not fit makes the roll
        incomplete."""
        width = self.sheet.picture.width
        x = (width - self.font.getlength(text)) / 2 if middle else self.margin
        last = width - self.margin - self.font.getlength(amount)
        for word in text.split():
            self._put(word, x)
            x += self.font.getlength(f"{word} ")
        written = self._put(amount, last) if amount else None
        if amount and x > last:
            self.complete = False
        self.base += self.pitch
        return written

    def rule(self) -> None:
        """A row of dashes, which is not text."""
        dash = self.font.getlength("-")
        count = int((self.sheet.picture.width - 2 * self.margin) / dash)
        self.sheet.write("-" * count, self.font, self.margin, self.base, self.ink)
        self.base += self.pitch

    def _put(self, text: str, x: float) -> Word | None:
        word = self.sheet.write(text, self.font, x, self.base, self.ink)
        if word:
            self.words.append(word)
        else:
            self.complete = False
        return word


def receipt(rng: random.Random, fonts: Choice) -> Drawn:
    """A receipt, asked about as a whole or about one of its words."""
    content = invented(rng)
    picture = printed(content, rng, fonts)
    if picture is None:
        return receipt(rng, fonts)
    return Drawn.about(photographed(picture, rng, wear=0.6), partial(_asking, content), rng)


def invented(rng: random.Random) -> Receipt:
    """A shop, a date and one to five items with what they cost, in cents all added up."""
    shop = f"{vocabulary.made_up(rng).capitalize()} {rng.choice(SHOPS)}"
    names = rng.sample(ITEMS, rng.randint(1, 5))
    cents = [vocabulary.amount(rng) for _ in names]
    sign = rng.choice(("", "", "$"))
    prices = {name: _amount(cost, sign) for name, cost in zip(names, cents, strict=True)}
    return Receipt(shop, vocabulary.date(rng), prices, _amount(sum(cents), sign))


def _amount(cents: int, sign: str) -> str:
    return f"{sign}{cents / 100:.2f}"


def printed(content: Receipt, rng: random.Random, fonts: Choice) -> Image.Image | None:
    """The picture, its words noted in `content`; None when the paper was too narrow."""
    font = load(any_face(rng, fonts), rng.choice(_SIZES))
    pitch = font.size * rng.uniform(1.15, 1.5)
    lines = len(content.prices) + rng.randint(5, 7)
    size = sides(rng.randint(*_WIDTHS), round(lines * pitch + 16), rng)
    if size[1] > _TALLEST:
        return None
    sheet = _slip(size, rng)
    roll = _Roll(sheet, font, rng.choice(_INKS), pitch)
    middle = rng.random() < 0.6
    roll.line(content.shop.upper() if rng.random() < 0.3 else content.shop, middle=middle)
    content.shop = " ".join(word.text for word in roll.words)
    roll.line(content.date, middle=middle)
    if rng.random() < 0.6:
        roll.rule()
    for name, cost in content.prices.items():
        roll.line(name, cost)
    if rng.random() < 0.6:
        roll.rule()
    content.sum_at = roll.line(rng.choice(TOTALS), content.total)
    if rng.random() < 0.4:
        roll.line(rng.choice(ENDINGS), middle=True)
    content.words = roll.words
    return sheet.picture if roll.complete else None


def _slip(size: tuple[int, int], rng: random.Random) -> Sheet:
    """A slip of pale paper, often on a table of another colour."""
    sheet = paper(size, rng, pale=0.3)
    if rng.random() < 0.5:
        shade = rng.randint(235, 255)
        edge = rng.randint(0, 4)
        box = (edge, edge, size[0] - edge - 1, size[1] - edge - 1)
        ImageDraw.Draw(sheet.picture).rectangle(box, (shade, shade, shade - rng.randint(0, 20)))
    else:
        sheet = paper(size, rng, pale=1.0)
    sheet.angle = rng.uniform(-2, 2) if rng.random() < 0.4 else 0.0
    return sheet


Asked = tuple[tuple[Said, ...], tuple[Said, ...]]


def _total(content: Receipt, rng: random.Random) -> Asked:
    return ask("total", rng), (content.total,)


def _date(content: Receipt, rng: random.Random) -> Asked:
    return ask("date", rng), (content.date,)


def _price_of(content: Receipt, rng: random.Random) -> Asked:
    name = rng.choice(list(content.prices))
    return ask("price_of", rng, text=name), (content.prices[name],)


def _find_total(content: Receipt, rng: random.Random) -> Asked:
    assert content.sum_at, "a receipt without its total is never printed"
    return ask("find_total", rng), (boxed(content.total, content.sum_at.corners),)


def _items(content: Receipt, rng: random.Random) -> Asked:
    return ask("items", rng), (str(len(content.prices)),)


def _fields(content: Receipt, rng: random.Random) -> Asked:
    fields = {"shop": content.shop, "date": content.date, "total": content.total}
    return ask("receipt", rng), (json.dumps(fields),)


def _prices(content: Receipt, rng: random.Random) -> Asked:
    return ask("prices", rng), (json.dumps(content.prices),)


def _read_at(content: Receipt, rng: random.Random) -> Asked:
    word = rng.choice(content.words)
    return ask("read_at", rng, box=boxed(None, word.corners)), (word.text,)


def _asking(content: Receipt, rng: random.Random) -> Turn:
    asked = rng.choices(list(_ANSWERS), [weight for _, weight in _ANSWERS.values()])[0]
    return Turn(*_ANSWERS[asked][0](content, rng), asked)


_ANSWERS: dict[str, tuple[Callable[[Receipt, random.Random], Asked], float]] = {
    "total": (_total, 2),
    "date": (_date, 1),
    "price_of": (_price_of, 2),
    "find_total": (_find_total, 1.5),
    "items": (_items, 0.7),
    "receipt": (_fields, 2),
    "prices": (_prices, 2),
    "read_at": (_read_at, 2),
}
