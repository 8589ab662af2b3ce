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

from finesight.cli.app import run_command

Record = dict[str, Any]
SIZES = [(640, 480), (480, 640), (800, 600)]
QUESTION = "Outline the rectangle as [x1, y1, x2, y2] in JSON."


@dataclass(frozen=True)
class DrawnImage:
    """A dark rectangle on a light background."""

    path: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]


@pytest.fixture(scope="module")
def drawn_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DrawnImage]]:
    folder, chance = tmp_path_factory.mktemp("tutorial"), random.Random(0)
    found = []
    for number in range(60):
        width, height = chance.choice(SIZES)
        w, h = chance.randint(40, 200), chance.randint(40, 200)
        x, y = chance.randint(0, width - w - 1), chance.randint(0, height - h - 1)
        light = tuple(chance.randint(180, 255) for _ in range(3))
        image = Image.new("RGB", (width, height), light)
        dark = tuple(chance.randint(0, 120) for _ in range(3))
        ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), fill=dark)
        image.save(folder / f"{number}.png")
        found.append(DrawnImage(f"{number}.png", (width, height), (x, y, x + w, y + h)))
    return folder, found


@pytest.fixture
def run_on_rows(
    drawn_images: tuple[Path, list[DrawnImage]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Write rows of the images to a file and run a command. Returns exit code and output."""
    folder, images = drawn_images

    def run_cli(
        make: Callable[[DrawnImage], Record], *words: str, out: bool = False
    ) -> tuple[int, str]:
        source = folder / "data.json"
        source.write_text(json.dumps([make(one) for one in images]))
        last = [str(tmp_path / "out")] if out else []
        code = run_command([words[0], str(source), *last, *words[1:]])
        output = capsys.readouterr()
        return code, output.out + output.err

    return run_cli


def make_box_rows(values: Callable[[DrawnImage], list[int]]) -> Callable[[DrawnImage], Record]:
    def make(one: DrawnImage) -> Record:
        answer = json.dumps({"bbox_2d": values(one)})
        return {"image": [one.path], "query": QUESTION, "response": answer}

    return make


def make_text_rows(*turns: str) -> Callable[[DrawnImage], Record]:
    def make(one: DrawnImage) -> Record:
        output = [turn.replace("IMAGE", one.path) for turn in turns]
        speakers = ("user", "assistant") * len(output)
        pairs = zip(speakers, output, strict=False)
        return {"conversations": [{"from": who, "value": text} for who, text in pairs]}

    return make


def to_xywh(one: DrawnImage) -> list[int]:
    x1, y1, x2, y2 = one.box
    return [x1, y1, x2 - x1, y2 - y1]


def to_resized(one: DrawnImage) -> list[int]:
    return [round(value * 256 / max(one.size)) for value in one.box]


def to_thousandths(one: DrawnImage) -> list[int]:
    sides = (*one.size, *one.size)
    return [round(1000 * value / side) for value, side in zip(one.box, sides, strict=True)]


def test_xywh_given_as_xyxy(run_on_rows: Callable[..., tuple[int, str]]) -> None:
    code, output = run_on_rows(make_box_rows(to_xywh), "import", out=True)
    assert code == 2
    assert "of 60 rows are invalid; no files were written" in output
    assert "if the boxes are xywh, give --box-format xywh" in output
    code, output = run_on_rows(make_box_rows(to_xywh), "check")
    assert code == 2
    assert "the boxes are a corner and a size (x, y, width, height) in pixels" in output
    assert "remedy: give --box-format xywh" in output
    # The remedy fixes it.
    code, output = run_on_rows(make_box_rows(to_xywh), "check", "--box-format", "xywh")
    assert (code, "no issues found" in output) == (0, True)


def test_boxes_of_resized_copy(run_on_rows: Callable[..., tuple[int, str]]) -> None:
    code, output = run_on_rows(make_box_rows(to_resized), "check")
    assert code == 2
    assert "in pixels of a resized image, the longest side about 25" in output
    assert "scale the boxes to the referenced image" in output


def test_thousandths_given_as_pixels(run_on_rows: Callable[..., tuple[int, str]]) -> None:
    code, output = run_on_rows(make_box_rows(to_thousandths), "import", out=True)
    assert (code, "--box-units pixel, 1 or 1000" in output) == (2, True)
    code, output = run_on_rows(make_box_rows(to_thousandths), "check")
    assert code == 2
    assert "in thousandths of the image" in output
    assert "remedy: give --box-units 1000" in output
    assert run_on_rows(make_box_rows(to_thousandths), "check", "--box-units", "1000")[0] == 0


def test_padding_token_at_end_of_answers(run_on_rows: Callable[..., tuple[int, str]]) -> None:
    make = make_text_rows("Say it: <|vision_start|>IMAGE<|vision_end|>", "A box.<|endoftext|>")
    code, output = run_on_rows(make, "check")
    assert code == 2
    assert "the text contains a special token" in output
    assert "<|endoftext|> in a text" in output


def test_path_given_as_question(run_on_rows: Callable[..., tuple[int, str]]) -> None:
    code, output = run_on_rows(make_text_rows("IMAGE", "x"), "import", out=True)
    assert code == 2
    assert "a question without text (images: 1)" in output
    assert 'give --prompt "..."' in output


def test_all_turns_and_original_text_are_imported(
    run_on_rows: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    first = "COCO Yes: <|vision_start|>IMAGE<|vision_end|>"
    code, _ = run_on_rows(make_text_rows(first, "A box.", "How wide?", "40."), "import", out=True)
    assert code == 0
    sample = json.loads((tmp_path / "out" / "data.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * 2
    assert sample["messages"][0]["content"][0]["text"] == "COCO Yes: "


def test_samples_over_max_length(
    run_on_rows: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    create_tiny_model(tmp_path / "model", "qwen2_vl")
    make = make_text_rows("Say it: <|vision_start|>IMAGE<|vision_end|>", "A box.")
    model = ("--model", str(tmp_path / "model"), "--max-length", "50")
    code, output = run_on_rows(make, "check", *model)
    assert code == 2
    assert "the sample exceeds the maximum length" in output


def test_quoted_messages_are_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "en" / "data.md").read_text(encoding="utf-8")
    for words in (
        "if the boxes are xywh, give --box-format xywh",
        "the boxes are a corner and a size (x, y, width, height) in pixels",
        "in pixels of a resized image, the longest side about 25",
        "--box-units pixel, 1 or 1000",
        "in thousandths of the image",
        "the text contains a special token",
        "a question without text (images: 1)",
        "the sample exceeds the maximum length",
        "a validation image is in the training data",
    ):
        assert words in page, words
