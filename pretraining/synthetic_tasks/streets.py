"""Large synthetic street images with a few text plates among distractors."""

from __future__ import annotations

import random
from functools import partial

from PIL import Image, ImageDraw, ImageFilter

from synthetic_tasks import vocabulary
from synthetic_tasks.backgrounds import TOKEN_SIZE, make_canvas, sample_color
from synthetic_tasks.camera_noise import apply_camera_noise, sample_ink
from synthetic_tasks.canvas import Canvas, Color, RenderedWord
from synthetic_tasks.fonts import FontSplit, can_draw, load_font, sample_face
from synthetic_tasks.synthetic_sample import PixelBox, QuestionAnswer, SyntheticSample
from synthetic_tasks.text_images import find_unique_words, make_question

COLUMN_RANGE, ROW_RANGE = (9, 20), (7, 13)
"""Ranges of image width and height, in tokens of TOKEN_SIZE pixels."""

MAX_PLATES = 5

_FONT_SIZES = (11, 12, 13, 14, 16, 18, 20, 24, 30)
_CLUTTER_SCALE = 2
"""Factor by which distractors are enlarged after drawing, which softens their edges."""


def generate_street(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate a street image with text plates among distractors.

    The question is to locate or read a word on a plate.
    """
    size = TOKEN_SIZE * rng.randint(*COLUMN_RANGE), TOKEN_SIZE * rng.randint(*ROW_RANGE)
    image = draw_clutter(size, rng)
    occupied: list[PixelBox] = []
    words: list[RenderedWord] = []
    for _ in range(rng.randint(1, MAX_PLATES)):
        plate, plate_words = _draw_plate(rng, fonts)
        width, height = plate.size
        if not plate_words or width >= size[0] or height >= size[1]:
            continue
        x, y = rng.randrange(size[0] - width), rng.randrange(size[1] - height)
        if any(_overlaps((x, y, x + width, y + height), other) for other in occupied):
            continue
        image.paste(plate, (x, y))
        occupied.append((x, y, x + width, y + height))
        words += [_translate_word(word, x, y) for word in plate_words]
    if not find_unique_words([words]):
        return generate_street(rng, fonts)
    return SyntheticSample.from_sampler(
        apply_camera_noise(image, rng), partial(_sample_question, words), rng
    )


def _sample_question(words: list[RenderedWord], rng: random.Random) -> QuestionAnswer:
    kind = rng.choices(("find", "read_at"), (3, 2))[0]
    return QuestionAnswer(*make_question(kind, [words], rng), kind)


def draw_clutter(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draw out-of-focus walls, windows, poles and round objects."""
    width, height = size[0] // _CLUTTER_SCALE, size[1] // _CLUTTER_SCALE
    colors = [_sample_muted_color(rng) for _ in range(rng.randint(2, 4))]
    image = Image.new("RGB", (1, len(colors)))
    image.putdata(colors)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 40)):
        x, y = rng.randrange(-20, width), rng.randrange(-20, height)
        box = (x, y, x + rng.randint(2, width // 3), y + rng.randint(2, height // 2))
        share, color = rng.random(), _sample_muted_color(rng)
        if share < 0.5:
            draw.rectangle(box, color)
        elif share < 0.7:
            draw.ellipse(box, color)
        elif share < 0.85:
            draw.line(box, color, rng.randint(1, 5))
        else:
            draw.rectangle(box, outline=color, width=rng.randint(1, 3))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _draw_plate(rng: random.Random, fonts: FontSplit) -> tuple[Image.Image, list[RenderedWord]]:
    """Draw a plate with one to three lines of one word each.

    The list of words is empty if a word did not fit.
    """
    texts = rng.choice(vocabulary.SIGN_TEXTS).split("|") if rng.random() < 0.3 else None
    texts = texts or [vocabulary.sample_word(rng) for _ in range(rng.randint(1, 3))]
    face = sample_face(rng, fonts)
    font = load_font(face, rng.choice(_FONT_SIZES))
    line_height = font.size * rng.uniform(1.05, 1.4)
    padding = rng.randint(4, 14)
    size = (
        round(max(map(font.getlength, texts))) + 2 * padding,
        round(line_height * len(texts)) + 2 * padding,
    )
    canvas = make_canvas(size, rng, pale_fraction=0.5)
    if rng.random() < 0.5:
        canvas = Canvas(Image.new("RGB", size, canvas.background), canvas.background)
    canvas.angle = rng.uniform(-6, 6) if rng.random() < 0.5 else 0.0
    ink, words = sample_ink(canvas.background, rng), []
    for line, text in enumerate(texts):
        left = (size[0] - font.getlength(text)) / 2
        baseline = padding + line_height * (line + 0.75)
        written = (
            canvas.draw_text(text, font, left, baseline, ink) if can_draw(face, text) else None
        )
        if not written:
            return canvas.image, []
        words.append(written)
    return canvas.image, words


def _sample_muted_color(rng: random.Random) -> Color:
    """Sample a color typical of outdoor objects, mostly close to gray."""
    if rng.random() < 0.15:
        return sample_color(rng)
    gray = rng.randrange(15, 240)
    red, green, blue = (min(255, max(0, gray + rng.randint(-35, 35))) for _ in range(3))
    return red, green, blue


def _overlaps(first: PixelBox, second: PixelBox) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _translate_word(word: RenderedWord, x: int, y: int) -> RenderedWord:
    x1, y1, x2, y2 = word.box
    return RenderedWord(word.text, (x1 + x, y1 + y, x2 + x, y2 + y))
