"""Synthetic receipts with a shop, a date, items and a total.

Each word has a bounding box.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from PIL import Image, ImageDraw, ImageFont

from synthetic_tasks import vocabulary
from synthetic_tasks.backgrounds import make_canvas, round_up_size
from synthetic_tasks.camera_noise import apply_camera_noise
from synthetic_tasks.canvas import Canvas, Color, RenderedWord
from synthetic_tasks.fonts import FontSplit, load_font, sample_face
from synthetic_tasks.question_templates import fill_template
from synthetic_tasks.synthetic_sample import (
    ContentPart,
    QuestionAnswer,
    SyntheticSample,
    make_box_part,
)

ITEMS = (
    *("Milk", "Bread", "Butter", "Cheese", "Eggs", "Coffee", "Tea", "Sugar", "Rice", "Pasta"),
    *("Apples", "Bananas", "Lemons", "Onions", "Carrots", "Tomatoes", "Potatoes", "Salad"),
    *("Chicken", "Fish", "Soup", "Yogurt", "Honey", "Jam", "Juice", "Water", "Cake", "Cookies"),
    *("Chocolate", "Soap", "Paper", "Candles", "Pepper", "Salt", "Flour", "Cereal", "Olives"),
    *("Sandwich", "Muffin", "Bagel", "Pizza", "Burger", "Fries", "Wrap", "Pencil", "Notebook"),
)
SHOP_TYPES = (
    "Market",
    "Cafe",
    "Bakery",
    "Store",
    "Foods",
    "Deli",
    "Shop",
    "Mart",
    "Kitchen",
    "Books",
)
TOTAL_LABELS = ("TOTAL", "Total", "Total:", "TOTAL:", "Amount due", "To pay", "Sum")
CLOSING_LINES = ("Thank you!", "Please come again", "THANK YOU", "Have a nice day", "Goodbye")

_FONT_SIZES = (12, 12, 13, 14, 15, 16)
_WIDTH_RANGE = (140, 224)
_MAX_HEIGHT = 308
_INK_COLORS: tuple[Color, ...] = ((0, 0, 0), (25, 25, 35), (50, 40, 60), (40, 40, 110))


@dataclass
class Receipt:
    """Content of a receipt, and the bounding boxes of its words once it is drawn."""

    shop: str
    date: str
    prices: dict[str, str]
    total: str
    words: list[RenderedWord] = field(default_factory=list)
    total_word: RenderedWord | None = None


class _ReceiptWriter:
    """Writer of the lines of a receipt, from top to bottom.

    Texts are on the left and amounts at the right edge.
    """

    def __init__(
        self, canvas: Canvas, font: ImageFont.FreeTypeFont, ink: Color, line_height: float
    ):
        self.canvas, self.font, self.ink, self.line_height = canvas, font, ink, line_height
        self.margin = 6.0
        self.baseline = self.margin + font.getmetrics()[0]
        self.words: list[RenderedWord] = []
        self.is_complete = True

    def write_line(
        self, text: str, amount: str = "", *, centered: bool = False
    ) -> RenderedWord | None:
        """Write a line of text with an optional amount.

        A line that does not fit marks the receipt as incomplete. Returns the word of the amount, or
        None.
        """
        width = self.canvas.image.width
        x = (width - self.font.getlength(text)) / 2 if centered else self.margin
        amount_x = width - self.margin - self.font.getlength(amount)
        for word in text.split():
            self._write_word(word, x)
            x += self.font.getlength(f"{word} ")
        amount_word = self._write_word(amount, amount_x) if amount else None
        if amount and x > amount_x:
            self.is_complete = False
        self.baseline += self.line_height
        return amount_word

    def write_rule(self) -> None:
        """Draw a row of dashes, which does not count as text."""
        dash = self.font.getlength("-")
        count = int((self.canvas.image.width - 2 * self.margin) / dash)
        self.canvas.draw_text("-" * count, self.font, self.margin, self.baseline, self.ink)
        self.baseline += self.line_height

    def _write_word(self, text: str, x: float) -> RenderedWord | None:
        word = self.canvas.draw_text(text, self.font, x, self.baseline, self.ink)
        if word:
            self.words.append(word)
        else:
            self.is_complete = False
        return word


def generate_receipt(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of a receipt with a question about its content."""
    receipt_data = sample_receipt(rng)
    image = draw_receipt(receipt_data, rng, fonts)
    if image is None:
        return generate_receipt(rng, fonts)
    return SyntheticSample.from_sampler(
        apply_camera_noise(image, rng, strength=0.6), partial(_sample_question, receipt_data), rng
    )


def sample_receipt(rng: random.Random) -> Receipt:
    """Sample a shop, a date and one to five items with prices.

    The total is the sum of the prices in cents.
    """
    shop = f"{vocabulary.sample_pseudoword(rng).capitalize()} {rng.choice(SHOP_TYPES)}"
    names = rng.sample(ITEMS, rng.randint(1, 5))
    cents = [vocabulary.sample_cents(rng) for _ in names]
    sign = rng.choice(("", "", "$"))
    prices = {name: _format_amount(cost, sign) for name, cost in zip(names, cents, strict=True)}
    return Receipt(shop, vocabulary.sample_date(rng), prices, _format_amount(sum(cents), sign))


def _format_amount(cents: int, sign: str) -> str:
    return f"{sign}{cents / 100:.2f}"


def draw_receipt(receipt_data: Receipt, rng: random.Random, fonts: FontSplit) -> Image.Image | None:
    """Draw a receipt and record the bounding boxes of its words.

    Returns None if a line does not fit on the paper.
    """
    font = load_font(sample_face(rng, fonts), rng.choice(_FONT_SIZES))
    line_height = font.size * rng.uniform(1.15, 1.5)
    num_lines = len(receipt_data.prices) + rng.randint(5, 7)
    size = round_up_size(rng.randint(*_WIDTH_RANGE), round(num_lines * line_height + 16), rng)
    if size[1] > _MAX_HEIGHT:
        return None
    canvas = _make_paper(size, rng)
    writer = _ReceiptWriter(canvas, font, rng.choice(_INK_COLORS), line_height)
    centered = rng.random() < 0.6
    writer.write_line(
        receipt_data.shop.upper() if rng.random() < 0.3 else receipt_data.shop, centered=centered
    )
    receipt_data.shop = " ".join(word.text for word in writer.words)
    writer.write_line(receipt_data.date, centered=centered)
    if rng.random() < 0.6:
        writer.write_rule()
    for name, cost in receipt_data.prices.items():
        writer.write_line(name, cost)
    if rng.random() < 0.6:
        writer.write_rule()
    receipt_data.total_word = writer.write_line(rng.choice(TOTAL_LABELS), receipt_data.total)
    if rng.random() < 0.4:
        writer.write_line(rng.choice(CLOSING_LINES), centered=True)
    receipt_data.words = writer.words
    return canvas.image if writer.is_complete else None


def _make_paper(size: tuple[int, int], rng: random.Random) -> Canvas:
    """Create a sheet of pale paper, often in front of a background of another color."""
    canvas = make_canvas(size, rng, pale_fraction=0.3)
    if rng.random() < 0.5:
        shade = rng.randint(235, 255)
        edge = rng.randint(0, 4)
        box = (edge, edge, size[0] - edge - 1, size[1] - edge - 1)
        ImageDraw.Draw(canvas.image).rectangle(box, (shade, shade, shade - rng.randint(0, 20)))
    else:
        canvas = make_canvas(size, rng, pale_fraction=1.0)
    canvas.angle = rng.uniform(-2, 2) if rng.random() < 0.4 else 0.0
    return canvas


QuestionAndAnswer = tuple[tuple[ContentPart, ...], tuple[ContentPart, ...]]


def _ask_total(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    return fill_template("total", rng), (receipt_data.total,)


def _ask_date(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    return fill_template("date", rng), (receipt_data.date,)


def _ask_price(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    name = rng.choice(list(receipt_data.prices))
    return fill_template("price_of", rng, text=name), (receipt_data.prices[name],)


def _ask_total_box(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    assert receipt_data.total_word, "a receipt without its total is never printed"
    return fill_template("find_total", rng), (
        make_box_part(receipt_data.total, receipt_data.total_word.box),
    )


def _ask_num_items(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    return fill_template("items", rng), (str(len(receipt_data.prices)),)


def _ask_fields(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    fields = {"shop": receipt_data.shop, "date": receipt_data.date, "total": receipt_data.total}
    return fill_template("receipt", rng), (json.dumps(fields),)


def _ask_prices(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    return fill_template("prices", rng), (json.dumps(receipt_data.prices),)


def _ask_text_at_box(receipt_data: Receipt, rng: random.Random) -> QuestionAndAnswer:
    word = rng.choice(receipt_data.words)
    return fill_template("read_at", rng, box=make_box_part(None, word.box)), (word.text,)


def _sample_question(receipt_data: Receipt, rng: random.Random) -> QuestionAnswer:
    task_kind = rng.choices(
        list(_QUESTION_MAKERS), [weight for _, weight in _QUESTION_MAKERS.values()]
    )[0]
    return QuestionAnswer(*_QUESTION_MAKERS[task_kind][0](receipt_data, rng), task_kind)


_QUESTION_MAKERS: dict[str, tuple[Callable[[Receipt, random.Random], QuestionAndAnswer], float]] = {
    "total": (_ask_total, 2),
    "date": (_ask_date, 1),
    "price_of": (_ask_price, 2),
    "find_total": (_ask_total_box, 1.5),
    "items": (_ask_num_items, 0.7),
    "receipt": (_ask_fields, 2),
    "prices": (_ask_prices, 2),
    "read_at": (_ask_text_at_box, 2),
}
