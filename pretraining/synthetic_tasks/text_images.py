"""Synthetic images of letters, words, lines, signs and Chinese text, with a box per word."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from PIL import ImageDraw, ImageFont

from synthetic_tasks import vocabulary
from synthetic_tasks.backgrounds import TOKEN_SIZE, make_canvas, round_up_size, sample_color
from synthetic_tasks.camera_noise import apply_camera_noise, sample_ink
from synthetic_tasks.canvas import Canvas, Color, RenderedWord
from synthetic_tasks.fonts import FontFace, FontSplit, can_draw, load_font, sample_face
from synthetic_tasks.question_templates import fill_template
from synthetic_tasks.synthetic_sample import (
    ContentPart,
    QuestionAnswer,
    SyntheticSample,
    make_box_part,
)

WordRows = list[list[RenderedWord]]
"""Words of an image in reading order, one list per line."""

MAX_IMAGE_SIZE = 336
"""Maximum length of the longer image side in pixels."""

PUNCTUATION = ",.;:!?"
"""Punctuation marks that may follow a word in a line of text."""

_MAX_TRIES = 20
_MAX_WORDS = 6


def generate_word(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image that one word, number or code mostly fills.

    The question is to read or to locate it.
    """
    text = vocabulary.sample_word(rng)
    face = _sample_face_for(text, rng, fonts)
    for _ in range(_MAX_TRIES):
        font = load_font(face, rng.randint(14, 46))
        x1, y1, x2, y2 = font.getbbox(text, anchor="ls")
        width = max(56, round(x2 - x1) + rng.randint(8, 56))
        height = max(TOKEN_SIZE, round(y2 - y1) + rng.randint(8, 48))
        if width > MAX_IMAGE_SIZE:
            continue
        canvas = make_canvas(round_up_size(width, height, rng), rng)
        canvas.angle = _sample_angle(rng, 5)
        left = rng.uniform(2, max(2, canvas.image.width - (x2 - x1) - 2)) - x1
        baseline = rng.uniform(2, max(2, canvas.image.height - (y2 - y1) - 2)) - y1
        rendered = canvas.draw_text(text, font, left, baseline, sample_ink(canvas.background, rng))
        if rendered:
            return _build_sample(canvas, [[rendered]], rng, task_kind="word")
    return generate_word(rng, fonts)


def generate_letters(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate a small image that one to four characters nearly fill.

    It is the first reading task of pretraining.
    """
    text = vocabulary.sample_fragment(rng)
    face = _sample_face_for(text, rng, fonts)
    font = load_font(face, rng.randint(16, 36))
    x1, y1, x2, y2 = font.getbbox(text, anchor="ls")
    size = round_up_size(
        max(TOKEN_SIZE, round(x2 - x1) + 6), max(TOKEN_SIZE, round(y2 - y1) + 6), rng
    )
    canvas = make_canvas(size, rng, pale_fraction=0.8)
    left = rng.uniform(2, max(2, size[0] - (x2 - x1) - 2)) - x1
    baseline = rng.uniform(2, max(2, size[1] - (y2 - y1) - 2)) - y1
    rendered = canvas.draw_text(text, font, left, baseline, sample_ink(canvas.background, rng))
    if not rendered:
        return generate_letters(rng, fonts)
    question, answer = make_question("read", [[rendered]], rng)
    return SyntheticSample(canvas.image, question, answer, "letters")


def generate_words(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of up to six words in rows.

    The words share a font face, size and color, or each has its own.
    """
    size = round_up_size(rng.randint(112, 308), rng.randint(56, 224), rng)
    canvas = make_canvas(size, rng)
    canvas.angle = _sample_angle(rng, 4)
    styles = _sample_styles(canvas.background, rng, fonts)
    rows = _draw_rows(canvas, rng.randint(2, _MAX_WORDS), styles, vocabulary.sample_word, rng)
    return _build_sample(canvas, rows, rng) if rows else generate_words(rng, fonts)


def generate_fragments(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of two to five word fragments in rows.

    The question is about one fragment. The task trains reading early in pretraining.
    """
    canvas = make_canvas(
        round_up_size(rng.randint(84, 196), rng.randint(56, 140), rng), rng, pale_fraction=0.8
    )
    styles = [(sample_face(rng, fonts), rng.randint(16, 32), sample_ink(canvas.background, rng))]
    rows = _draw_rows(canvas, rng.randint(2, 5), styles, vocabulary.sample_fragment, rng)
    if sum(map(len, rows)) < 2 or not find_unique_words(rows):
        return generate_fragments(rng, fonts)
    question_sampler = partial(
        _sample_question, rows, {"find": 5.0, "read_at": 3.0, "read": 1.0, "spot": 1.0}
    )
    return SyntheticSample.from_sampler(canvas.image, question_sampler, rng)


def generate_lines(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of one to four lines of text in one font face."""
    size = round_up_size(rng.randint(168, MAX_IMAGE_SIZE), rng.randint(40, 140), rng)
    canvas = make_canvas(size, rng, pale_fraction=0.8)
    canvas.angle = _sample_angle(rng, 2)
    face, ink = sample_face(rng, fonts), sample_ink(canvas.background, rng)
    font = load_font(face, rng.randint(12, 22))
    ascent, descent = font.getmetrics()
    line_height = (ascent + descent) * rng.uniform(1.0, 1.3)
    left, baseline, rows = rng.uniform(4, 24), rng.uniform(2, size[1] * 0.4) + ascent, WordRows()
    for _ in range(rng.randint(1, 4)):
        row = _draw_line(canvas, font, left, baseline, ink, rng)
        rows += [row] if row else []
        baseline += line_height
    return _build_sample(canvas, rows, rng) if rows else generate_lines(rng, fonts)


def generate_sign(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of a sign with large capitals in front of a wall."""
    texts = rng.choice(vocabulary.SIGN_TEXTS).split("|")
    if rng.random() < 0.35:
        texts = [vocabulary.sample_word(rng).upper() for _ in range(rng.randint(1, 3))]
    face = _sample_face_for("".join(texts), rng, fonts)
    font = load_font(face, rng.randint(18, 40))
    line_height = font.size * rng.uniform(1.05, 1.4)
    max_width = max(font.getlength(text) for text in texts)
    size = round_up_size(
        round(max_width) + rng.randint(36, 90),
        round(line_height * len(texts)) + rng.randint(36, 80),
        rng,
    )
    if max(size) > MAX_IMAGE_SIZE:
        return generate_sign(rng, fonts)
    canvas = _draw_board(make_canvas(size, rng, pale_fraction=0.3), rng)
    canvas.angle = _sample_angle(rng, 5)
    ink, rows = sample_ink(canvas.background, rng), WordRows()
    baseline = size[1] / 2 - line_height * len(texts) / 2 + line_height * 0.78
    for text in texts:
        rendered = canvas.draw_text(text, font, (size[0] - font.getlength(text)) / 2, baseline, ink)
        rows += [[rendered]] if rendered else []
        baseline += line_height
    return (
        _build_sample(canvas, rows, rng) if len(rows) == len(texts) else generate_sign(rng, fonts)
    )


def generate_chinese(rng: random.Random, fonts: FontSplit) -> SyntheticSample:
    """Generate an image of one to three short Chinese phrases in rows."""
    size = round_up_size(rng.randint(84, 252), rng.randint(40, 168), rng)
    canvas = make_canvas(size, rng, pale_fraction=0.7)
    canvas.angle = _sample_angle(rng, 3)
    face, ink = sample_face(rng, fonts, "chinese"), sample_ink(canvas.background, rng)
    rows, y = WordRows(), rng.uniform(2, size[1] * 0.4)
    for _ in range(rng.randint(1, 3)):
        font = load_font(face, rng.randint(16, 36))
        text = vocabulary.sample_chinese(rng)
        free_width = size[0] - font.getlength(text) - 4
        if free_width < 4 or not can_draw(face, text):
            continue
        baseline = y + font.getmetrics()[0]
        rendered = canvas.draw_text(text, font, rng.uniform(4, max(4.0, free_width)), baseline, ink)
        rows += [[rendered]] if rendered else []
        y = baseline + font.getmetrics()[1] * rng.uniform(0.6, 1.5)
    # Chinese has no spaces between words: word counts are undefined.
    return (
        _build_sample(canvas, rows, rng, countable=False) if rows else generate_chinese(rng, fonts)
    )


def _build_sample(
    canvas: Canvas,
    rows: WordRows,
    rng: random.Random,
    task_kind: str = "read",
    *,
    countable: bool = True,
) -> SyntheticSample:
    """Build the sample of an image with a question about its text."""
    all_words = [word for row in rows for word in row]
    kind_weights = {task_kind: 5.0, "find": 3.0 if find_unique_words(rows) else 0.0}
    if len(all_words) > 1:
        kind_weights |= {"read_at": 3.0, "count_words": 0.4 * countable}
        kind_weights["spot"] = 1.5 if len(all_words) <= _MAX_WORDS else 0.0
    question_sampler = partial(_sample_question, rows, kind_weights)
    return SyntheticSample.from_sampler(
        apply_camera_noise(canvas.image, rng), question_sampler, rng
    )


def _sample_question(
    rows: WordRows, kind_weights: Mapping[str, float], rng: random.Random
) -> QuestionAnswer:
    """Sample a question about the text of an image by the weights of question types."""
    task_kind = rng.choices(list(kind_weights), list(kind_weights.values()))[0]
    return QuestionAnswer(*make_question(task_kind, rows, rng), task_kind)


QuestionAndAnswer = tuple[tuple[ContentPart, ...], tuple[ContentPart, ...]]


def make_question(task_kind: str, rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    """Make a question of the given type about the text of an image.

    Returns the question and its answer.
    """
    return _QUESTION_MAKERS[task_kind](rows, rng)


def find_unique_words(rows: WordRows) -> list[RenderedWord]:
    """Return the words that occur once and do not end in punctuation.

    Only these can be named in a question without ambiguity.
    """
    all_words = [word for row in rows for word in row]
    counts = Counter(word.text for word in all_words)
    return [
        word for word in all_words if counts[word.text] == 1 and word.text[-1] not in PUNCTUATION
    ]


def _ask_text(rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    text = "\n".join(" ".join(word.text for word in row) for row in rows)
    return fill_template("read", rng), (text,)


def _ask_word_box(rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    target = rng.choice(find_unique_words(rows))
    return fill_template("find", rng, text=target.text), (make_box_part(target.text, target.box),)


def _ask_text_at_box(rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    target = rng.choice([word for row in rows for word in row])
    return fill_template("read_at", rng, box=make_box_part(None, target.box)), (target.text,)


def _ask_all_boxes(rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    boxes = tuple(make_box_part(word.text, word.box) for row in rows for word in row)
    return fill_template("spot", rng), boxes


def _ask_num_words(rows: WordRows, rng: random.Random) -> QuestionAndAnswer:
    return fill_template("count_words", rng), (str(sum(map(len, rows))),)


_QUESTION_MAKERS: dict[str, Callable[[WordRows, random.Random], QuestionAndAnswer]] = {
    "word": _ask_text,
    "read": _ask_text,
    "find": _ask_word_box,
    "read_at": _ask_text_at_box,
    "spot": _ask_all_boxes,
    "count_words": _ask_num_words,
}


def _sample_angle(rng: random.Random, max_degrees: float) -> float:
    """Sample the rotation of a text in degrees; half of the images are not rotated."""
    return rng.uniform(-max_degrees, max_degrees) if rng.random() < 0.5 else 0.0


def _sample_face_for(text: str, rng: random.Random, fonts: FontSplit) -> FontFace:
    """Sample a font face that has glyphs for all characters of a text."""
    for _ in range(_MAX_TRIES):
        face = sample_face(rng, fonts)
        if can_draw(face, text):
            return face
    raise AssertionError(f"no face can draw {text!r}")


TextStyle = tuple[FontFace, int, Color]


def _sample_styles(background: Color, rng: random.Random, fonts: FontSplit) -> list[TextStyle]:
    """Sample either one text style for all words of an image, or several."""
    return [
        (sample_face(rng, fonts), rng.randint(12, 34), sample_ink(background, rng))
        for _ in range(rng.choice((1, 1, 3)))
    ]


TextSampler = Callable[[random.Random], str]


def _draw_rows(
    canvas: Canvas,
    max_words: int,
    styles: Sequence[TextStyle],
    sample_text: TextSampler,
    rng: random.Random,
) -> WordRows:
    """Draw up to `max_words` words in rows from top to bottom."""
    rows, height = WordRows(), canvas.image.height
    y = rng.uniform(2, height * 0.45)
    while sum(map(len, rows)) < max_words and y < height - 14:
        row, y = _draw_row(canvas, y, max_words - sum(map(len, rows)), styles, sample_text, rng)
        rows += [row] if row else []
    return rows


def _draw_row(
    canvas: Canvas,
    y: float,
    max_words: int,
    styles: Sequence[TextStyle],
    sample_text: TextSampler,
    rng: random.Random,
) -> tuple[list[RenderedWord], float]:
    """Draw a row of words on one baseline below the position `y`.

    Returns the words and the vertical position of the next row.
    """
    chosen = [rng.choice(styles) for _ in range(rng.randint(1, min(3, max_words)))]
    ascent = max(load_font(face, size).getmetrics()[0] for face, size, _ in chosen)
    descent = max(load_font(face, size).getmetrics()[1] for face, size, _ in chosen)
    x, row = rng.uniform(3, canvas.image.width / 3), list[RenderedWord]()
    for face, size, ink in chosen:
        text, font = sample_text(rng), load_font(face, size)
        rendered = (
            canvas.draw_text(text, font, x, y + ascent, ink) if can_draw(face, text) else None
        )
        if not rendered:
            break
        row.append(rendered)
        x += font.getlength(text) + size * rng.uniform(0.4, 1.6)
    return row, y + ascent + descent + rng.uniform(0, 18)


def _draw_line(
    canvas: Canvas,
    font: ImageFont.FreeTypeFont,
    left: float,
    baseline: float,
    ink: Color,
    rng: random.Random,
) -> list[RenderedWord]:
    """Draw a line of words from `left` to the right edge.

    The line may end earlier, and some words are followed by punctuation.
    """
    row, x, max_words = list[RenderedWord](), left, rng.randint(2, 9)
    while len(row) < max_words:
        text = (
            rng.choice(vocabulary.COMMON_WORDS)
            if rng.random() < 0.7
            else vocabulary.sample_word(rng)
        )
        text = text.capitalize() if not row and rng.random() < 0.5 else text
        text += rng.choice(PUNCTUATION) if rng.random() < 0.12 and text[-1].isalpha() else ""
        rendered = canvas.draw_text(text, font, x, baseline, ink)
        if not rendered:
            break
        row.append(rendered)
        x += font.getlength(f"{text} ")
    return row


def _draw_board(canvas: Canvas, rng: random.Random) -> Canvas:
    """Draw a sign on a canvas.

    Returns the area of the sign as a new canvas.
    """
    color = sample_color(rng)
    if 100 < sum(color) / 3 < 160:
        color = rng.choice(((20, 60, 150), (190, 20, 30), (10, 100, 60), (250, 220, 40)))
    width, height = canvas.image.size
    edge = rng.randint(3, 10)
    box = (edge, edge, width - edge - 1, height - edge - 1)
    frame = sample_ink(color, rng) if rng.random() < 0.6 else None
    draw = ImageDraw.Draw(canvas.image)
    draw.rounded_rectangle(box, rng.choice((0, 4, 12)), color, frame, rng.randint(1, 3))
    return Canvas(canvas.image, color)
