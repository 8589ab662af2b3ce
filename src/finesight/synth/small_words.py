"""Synthetic large images with one small word."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw

from finesight.files.storage import write_folder
from finesight.samples.frames import FRAME_1000, Box, ImageSize, rescale, round_to_size
from finesight.samples.sample import ToolCallPart, write_samples
from finesight.synth.tickets import BAND_COLORS, PAPER_COLORS, sample_pseudoword
from finesight.synth.tool_task import ToolTask, build_task_sample
from finesight.vision.drawing import load_builtin_font

IMAGE_SIDE = 1024
"""Sides of the images in pixels."""

FONT_SIZE = 24
"""Font size of the words, in pixels per em.

An image of 224 x 224 pixels has 5 pixels per em left, which nobody can read.
"""

QUESTION = "Read the small word."

ZOOM_TOOL = "image_zoom_in_tool"

_MAX_LETTERS = 5


def write_small_words(
    target: Path, count: int, seed: int, frame: ImageSize = FRAME_1000
) -> list[ToolTask]:
    """Write images of small words, and their questions and answers as `data.jsonl`.

    The output is determined by the seed. A larger count extends a smaller one.

    Args:
        frame: Height and width of the coordinate frame of the calls.

    Returns:
        The questions, each with the call that zooms in on the word.

    Raises:
        UserError: `target` exists.
    """
    tasks = []
    with write_folder(target) as folder:
        (folder / "images").mkdir()
        for index in range(count):
            # A text seed is hashed: adjacent indices give independent samples.
            rng = random.Random(f"small word {seed} {index}")
            word = sample_word(rng)
            image, box = draw_small_word(word, rng)
            name = f"images/{index:05}.png"
            image.save(folder / name)
            sample = build_task_sample(f"word-{index:05}", name, QUESTION, word, {})
            tasks.append(ToolTask(sample, [build_zoom_call(box, frame)]))
        write_samples(folder / "data.jsonl", [task.sample for task in tasks])
    return tasks


def sample_word(rng: random.Random) -> str:
    """Sample a number of four digits, or a pseudoword of three to five letters."""
    if rng.random() < 0.3:
        return str(rng.randrange(1000, 10_000))
    while True:
        word = sample_pseudoword(rng)
        if 3 <= len(word) <= _MAX_LETTERS:
            return word


def draw_small_word(word: str, rng: random.Random) -> tuple[Image.Image, Box]:
    """Draw a word at a random position of a large RGB image.

    Returns:
        The image, and the box of the word in pixels.
    """
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), rng.choice(PAPER_COLORS))
    draw = ImageDraw.Draw(image)
    font = load_builtin_font(FONT_SIZE)
    left, top, right, bottom = font.getbbox(word)
    margin = FONT_SIZE
    x = rng.randrange(margin, round(IMAGE_SIDE - margin - right))
    y = rng.randrange(margin, round(IMAGE_SIDE - margin - bottom))
    draw.text((x, y), word, rng.choice(BAND_COLORS), font)
    return image, (x + left, y + top, x + right, y + bottom)


def build_zoom_call(box: Box, frame: ImageSize) -> ToolCallPart:
    """Build the call that zooms in on a box.

    The box has no margin: models that locate words write such boxes already.

    Args:
        box: Box in pixels of the image.
        frame: Height and width of the coordinate frame of the call.
    """
    corners = round_to_size(rescale(box, (IMAGE_SIDE, IMAGE_SIDE), frame), frame)
    arguments = {"bbox_2d": list(corners), "label": "word", "img_idx": 0}
    return ToolCallPart(name=ZOOM_TOOL, arguments=arguments)
