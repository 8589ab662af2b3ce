"""Tests of the messages for data of popular tutorials that docs/en/data.md quotes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from tiny_model import create_tiny_model

from finesight.data.sample import ImagePart, read_samples

SIZES = [(640, 480), (480, 640), (800, 600)]
QUESTION = "Outline the rectangle as [x1, y1, x2, y2] in JSON."
SAY_IT = "Say it: <|vision_start|>IMAGE<|vision_end|>"


@dataclass(frozen=True)
class DrawnImage:
    """A dark rectangle on a light background."""

    path: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]


MakeRow = Callable[[DrawnImage], dict[str, Any]]


@pytest.fixture(scope="module")
def drawn_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DrawnImage]]:
    folder, chance = tmp_path_factory.mktemp("tutorial"), random.Random(0)
    found = []
    for number in range(60):
        width, height = chance.choice(SIZES)
        w, h = chance.randint(40, 200), chance.randint(40, 200)
        x, y = chance.randint(0, width - w - 1), chance.randint(0, height - h - 1)
        image = Image.new("RGB", (width, height), (chance.randint(180, 255), 230, 200))
        dark = (chance.randint(0, 120), 60, 90)
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=dark)
        image.save(folder / f"{number}.png")
        found.append(DrawnImage(f"{number}.png", (width, height), (x, y, x + w, y + h)))
    return folder, found


@pytest.fixture
def run_on_rows(drawn_images: tuple[Path, list[DrawnImage]], tmp_path: Path, cli: Any) -> Any:
    """Write rows of the images to a file, and run `check`, or `import` into the folder out."""
    folder, images = drawn_images

    def run(make: MakeRow, command: str, *options: object, code: int = 2) -> str:
        source = folder / "data.json"
        source.write_text(json.dumps([make(one) for one in images]))
        out = [tmp_path / "out"] if command == "import" else []
        return str(cli(command, source, *out, *options, code=code).text)

    return run


def boxes(values: Callable[[DrawnImage], list[int]]) -> MakeRow:
    def make(one: DrawnImage) -> dict[str, Any]:
        answer = json.dumps({"bbox_2d": values(one)})
        return {"image": [one.path], "query": QUESTION, "response": answer}

    return make


def texts(*turns: str) -> MakeRow:
    def make(one: DrawnImage) -> dict[str, Any]:
        values = [turn.replace("IMAGE", one.path) for turn in turns]
        pairs = zip(("user", "assistant") * len(turns), values, strict=False)
        return {"conversations": [{"from": who, "value": text} for who, text in pairs]}

    return make


@boxes
def xywh(one: DrawnImage) -> list[int]:
    x1, y1, x2, y2 = one.box
    return [x1, y1, x2 - x1, y2 - y1]


@boxes
def resized(one: DrawnImage) -> list[int]:
    return [round(value * 256 / max(one.size)) for value in one.box]


@boxes
def thousandths(one: DrawnImage) -> list[int]:
    sides = (*one.size, *one.size)
    return [round(1000 * value / side) for value, side in zip(one.box, sides, strict=True)]


@pytest.mark.parametrize(
    ("make", "command", "words"),
    [
        (xywh, "import", "if the boxes are xywh, give --box-format xywh"),
        (xywh, "check", "the boxes are a corner and a size (x, y, width, height) in pixels"),
        (xywh, "check", "remedy: give --box-format xywh"),
        (resized, "check", "in pixels of a resized image, the longest side about 25"),
        (resized, "check", "scale the boxes to the referenced image"),
        (thousandths, "import", "--box-units pixel, 1 or 1000"),
        (thousandths, "check", "in thousandths of the image"),
        (thousandths, "check", "remedy: give --box-units 1000"),
        (texts(SAY_IT, "A box.<|endoftext|>"), "check", "the text contains a special token"),
        (texts("IMAGE", "x"), "import", "a question without text (images: 1)"),
        (texts("IMAGE", "x"), "import", 'give --prompt "..."'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_is_explained(run_on_rows, make, command, words):
    assert words in run_on_rows(make, command)


def test_remedies_for_boxes_fix_them(run_on_rows):
    assert "no issues found" in run_on_rows(xywh, "check", "--box-format", "xywh", code=0)
    run_on_rows(thousandths, "check", "--box-units", "1000", code=0)


def test_samples_over_max_length(run_on_rows, tmp_path):
    model = create_tiny_model(tmp_path / "model", "qwen2_vl")
    output = run_on_rows(texts(SAY_IT, "A box."), "check", "--model", model, "--max-length", "50")
    assert "the sample exceeds the maximum length" in output


def test_all_turns_and_original_text_are_imported(run_on_rows, tmp_path):
    turns = ("COCO Yes: <|vision_start|>IMAGE<|vision_end|>", "A box.", "How wide?", "40.")
    run_on_rows(texts(*turns), "import", code=0)
    sample, *_ = read_samples(tmp_path / "out" / "data.jsonl")
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    text, image = sample.messages[0].content
    assert (text.text, type(image)) == ("COCO Yes: ", ImagePart)
