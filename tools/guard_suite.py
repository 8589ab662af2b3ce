"""Generate the built-in suite of `finesight guard`: reading, counting, boxes and chat.

`python tools/guard_suite.py` writes the files in git, src/finesight/assets/guard. The tests fail if
they differ from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    Message,
    Sample,
    TextPart,
    write_samples,
)
from finesight.synth.tickets import INK_COLOR, PAPER_COLORS, sample_pseudoword
from finesight.vision.drawing import load_builtin_font

FOLDER = Path(__file__).resolve().parents[1] / "src" / "finesight" / "assets" / "guard"
NUM_QUESTIONS = 32
"""Number of questions of each group."""

ALLOWED_DROP = 0.05

COLORS = {
    "red": (205, 40, 40),
    "green": (40, 150, 70),
    "blue": (45, 80, 200),
    "yellow": (235, 200, 40),
}
KINDS = tuple(product(COLORS, ("circle", "square", "triangle")))
"""Colors and names of the drawn shapes."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_CELL = 74
"""Side of a cell in pixels; an image has 3 x 3 cells with at most one shape each."""

Question = tuple[Image.Image | None, str, Sequence[str] | BoxPart]
"""Image or None, prompt, and all correct texts or the box."""


def write_guard_suite(folder: Path) -> None:
    """Write the suite, its images and samples into an existing folder."""
    groups = {}
    for name, (metric, _) in GROUPS.items():
        seeds = (f"{name} {index}" for index in range(NUM_QUESTIONS))
        write_samples(folder / f"{name}.jsonl", draw_samples(folder, name, seeds))
        groups[name] = {"metric": metric, "data": f"{name}.jsonl", "allowed_drop": ALLOWED_DROP}
    text = yaml.safe_dump({"groups": groups}, sort_keys=False, default_flow_style=None)
    (folder / "suite.yaml").write_text(text, encoding="utf-8")


def draw_samples(folder: Path, name: str, seeds: Iterable[str]) -> Iterator[Sample]:
    """Yield the samples of a group for different seeds, and write their images."""
    for index, seed in enumerate(seeds):
        image, prompt, answer = GROUPS[name][1](random.Random(seed))
        sample_id, question = f"{name}-{index:02}", list[ContentPart]()
        if image is not None:
            image.quantize(32).save(folder / f"{sample_id}.png", optimize=True)
            question.append(ImagePart(image=f"{sample_id}.png"))
        question.append(TextPart(text=prompt))
        parts = [answer] if isinstance(answer, BoxPart) else [TextPart(text=answer[0])]
        turns = (
            Message(role="user", content=tuple(question)),
            Message(role="assistant", content=tuple(parts)),
        )
        others = () if isinstance(answer, BoxPart) else tuple(answer[1:])
        yield Sample(id=sample_id, messages=turns, references=others)


def _ask_reading(rng: random.Random) -> Question:
    word = sample_pseudoword(rng)
    paper, font = rng.choice(PAPER_COLORS), load_builtin_font(rng.randint(20, 28))
    image = Image.new("RGB", (224, 112), paper)
    assert 16 + font.getlength(word) < image.width, f"{word} does not fit"
    baseline = rng.randint(45, 85)
    ImageDraw.Draw(image).text((16, baseline), word, INK_COLOR, font, anchor="ls")
    return image, "Read the text.", [word]


def _ask_counting(rng: random.Random) -> Question:
    color, shape = kind = rng.choice(KINDS)
    count = rng.randint(1, 6)
    others = rng.choices([one for one in KINDS if one != kind], k=rng.randint(0, 3))
    image, _ = _draw_shapes([*[kind] * count, *others], rng)
    things = f"{color} {shape}{'s' if count > 1 else ''}"
    verb = "are" if count > 1 else "is"
    answers = [str(count), _NUMBERS[count]]
    for number in tuple(answers):
        start = f"There {verb} {number} {things}"
        answers += [start, f"{start} in the image", f"{number} {things}"]
    return image, f"How many {color} {shape}s are there?", answers


def _ask_boxes(rng: random.Random) -> Question:
    kinds = rng.sample(KINDS, rng.randint(2, 4))
    image, boxes = _draw_shapes(kinds, rng)
    phrase = " ".join(kinds[0])
    return image, f"Locate the {phrase}.", BoxPart(label=phrase, xyxy=boxes[0])


def _ask_chat(rng: random.Random) -> Question:
    a, b, word = rng.randint(2, 30), rng.randint(31, 60), sample_pseudoword(rng)
    kind = rng.randrange(4)
    if kind == 0:
        return None, f"What is {a} plus {b}? Answer with the number only.", [str(a + b)]
    if kind == 1:
        return None, f"Which is larger, {b} or {a}? Answer with the number only.", [str(b)]
    if kind == 2:
        return None, f"Repeat this word and nothing else: {word}", [word]
    first, second = rng.sample(sorted(OPPOSITES), 2)
    text = f"The opposite of {first} is {OPPOSITES[first]}. What is the opposite of {second}?"
    return None, f"{text} Answer with one word.", [OPPOSITES[second]]


OPPOSITES = {"hot": "cold", "big": "small", "up": "down", "day": "night", "left": "right"}

GROUPS: Mapping[str, tuple[str, Callable[[random.Random], Question]]] = {
    "reading": ("ocr", _ask_reading),
    "counting": ("classification", _ask_counting),
    "boxes": ("grounding", _ask_boxes),
    "chat": ("classification", _ask_chat),
}
"""Metric and questions of each group."""


def _draw_shapes(
    kinds: Sequence[tuple[str, str]], rng: random.Random
) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
    """Draw shapes in different cells, and return the image and their boxes."""
    image = Image.new("RGB", (3 * _CELL, 3 * _CELL), "white")
    draw, boxes = ImageDraw.Draw(image), []
    for (color, shape), cell in zip(kinds, rng.sample(range(9), len(kinds)), strict=True):
        radius = rng.randint(18, 30)
        x, y = (_CELL * axis + _CELL // 2 for axis in (cell % 3, cell // 3))
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
        if shape == "circle":
            draw.ellipse((left, top, right, bottom), COLORS[color])
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), COLORS[color])
        else:
            draw.polygon([(x, top), (right, bottom), (left, bottom)], COLORS[color])
        boxes.append((float(left), float(top), right + 1.0, bottom + 1.0))
    return image, boxes


if __name__ == "__main__":
    write_guard_suite(FOLDER)
