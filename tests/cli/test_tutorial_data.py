"""What users of popular tutorials' data are told: the messages that docs/en/data.md quotes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from finesight.cli.app import run
from finesight.model.tiny import make_tiny

Record = dict[str, Any]
SIZES = [(640, 480), (480, 640), (800, 600)]
QUESTION = "Outline the rectangle as [x1, y1, x2, y2] in JSON."


@dataclass(frozen=True)
class Drawn:
    """A dark rectangle on a light picture."""

    path: str
    size: tuple[int, int]
    box: tuple[int, int, int, int]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Drawn]]:
    folder, chance = tmp_path_factory.mktemp("tutorial"), random.Random(0)
    found = []
    for number in range(60):
        width, height = chance.choice(SIZES)
        w, h = chance.randint(40, 200), chance.randint(40, 200)
        x, y = chance.randint(0, width - w - 1), chance.randint(0, height - h - 1)
        light = tuple(chance.randint(180, 255) for _ in range(3))
        picture = Image.new("RGB", (width, height), light)
        dark = tuple(chance.randint(0, 120) for _ in range(3))
        ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), fill=dark)
        picture.save(folder / f"{number}.png")
        found.append(Drawn(f"{number}.png", (width, height), (x, y, x + w, y + h)))
    return folder, found


@pytest.fixture
def told(
    drawn: tuple[Path, list[Drawn]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Rows made of the pictures go into a file, and a command looks at it: exit code and words."""
    folder, pictures = drawn

    def tell(make: Callable[[Drawn], Record], *words: str, out: bool = False) -> tuple[int, str]:
        source = folder / "data.json"
        source.write_text(json.dumps([make(one) for one in pictures]))
        last = [str(tmp_path / "out")] if out else []
        code = run([*words[:2], str(source), *last, *words[2:]])
        said = capsys.readouterr()
        return code, said.out + said.err

    return tell


def boxed(numbers: Callable[[Drawn], list[int]]) -> Callable[[Drawn], Record]:
    def make(one: Drawn) -> Record:
        answer = json.dumps({"bbox_2d": numbers(one)})
        return {"image": [one.path], "query": QUESTION, "response": answer}

    return make


def spoken(*turns: str) -> Callable[[Drawn], Record]:
    def make(one: Drawn) -> Record:
        said = [turn.replace("PICTURE", one.path) for turn in turns]
        speakers = ("user", "assistant") * len(said)
        pairs = zip(speakers, said, strict=False)
        return {"conversations": [{"from": who, "value": text} for who, text in pairs]}

    return make


def corner_and_size(one: Drawn) -> list[int]:
    x1, y1, x2, y2 = one.box
    return [x1, y1, x2 - x1, y2 - y1]


def in_copy(one: Drawn) -> list[int]:
    return [round(value * 256 / max(one.size)) for value in one.box]


def in_thousandths(one: Drawn) -> list[int]:
    sides = (*one.size, *one.size)
    return [round(1000 * value / side) for value, side in zip(one.box, sides, strict=True)]


def test_sizes_in_place_of_corners(told: Callable[..., tuple[int, str]]) -> None:
    code, said = told(boxed(corner_and_size), "data", "import", out=True)
    assert code == 2
    assert "of 60 rows cannot be used; nothing was written" in said
    assert "are the boxes xywh? then give --box-format xywh" in said
    code, said = told(boxed(corner_and_size), "data", "check")
    assert code == 2
    assert "the boxes are a corner and a size (x, y, width, height) in pixels" in said
    assert "remedy: give --box-format xywh" in said
    # The remedy mends it.
    code, said = told(boxed(corner_and_size), "data", "check", "--box-format", "xywh")
    assert (code, "no faults found" in said) == (0, True)


def test_boxes_of_a_resized_copy(told: Callable[..., tuple[int, str]]) -> None:
    code, said = told(boxed(in_copy), "data", "check")
    assert code == 2
    assert "in pixels of a resized copy, the longest side about 25" in said
    assert "scale the boxes back to the picture that the data names" in said


def test_thousandths_in_place_of_pixels(told: Callable[..., tuple[int, str]]) -> None:
    code, said = told(boxed(in_thousandths), "data", "import", out=True)
    assert (code, "--box-units pixel, 1 or 1000" in said) == (2, True)
    code, said = told(boxed(in_thousandths), "data", "check")
    assert code == 2
    assert "in thousandths of the picture" in said
    assert "remedy: give --box-units 1000" in said
    assert told(boxed(in_thousandths), "data", "check", "--box-units", "1000")[0] == 0


def test_the_padding_token_at_the_end_of_answers(told: Callable[..., tuple[int, str]]) -> None:
    make = spoken("Say it: <|vision_start|>PICTURE<|vision_end|>", "A box.<|endoftext|>")
    code, said = told(make, "data", "check")
    assert code == 2
    assert "a special token is typed in the text" in said
    assert "<|endoftext|> in a text" in said


def test_a_path_in_place_of_a_question(told: Callable[..., tuple[int, str]]) -> None:
    code, said = told(spoken("PICTURE", "x"), "data", "import", out=True)
    assert code == 2
    assert "a question without words (pictures: 1)" in said
    assert 'give --prompt "..."' in said


def test_all_turns_and_the_datas_own_words_are_kept(
    told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    first = "COCO Yes: <|vision_start|>PICTURE<|vision_end|>"
    code, _ = told(spoken(first, "A box.", "How wide?", "40."), "data", "import", out=True)
    assert code == 0
    sample = json.loads((tmp_path / "out" / "data.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"] * 2
    assert sample["messages"][0]["content"][0]["text"] == "COCO Yes: "


def test_samples_that_a_script_would_cut(
    told: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    make_tiny(tmp_path / "model", "qwen2_vl")
    make = spoken("Say it: <|vision_start|>PICTURE<|vision_end|>", "A box.")
    model = ("--model", str(tmp_path / "model"), "--max-length", "50")
    code, said = told(make, "data", "check", *model)
    assert code == 2
    assert "over-long for the model" in said


def test_every_message_that_the_page_quotes_is_tested_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "en" / "data.md").read_text(encoding="utf-8")
    for words in (
        "are the boxes xywh? then give --box-format xywh",
        "the boxes are a corner and a size (x, y, width, height) in pixels",
        "in pixels of a resized copy, the longest side about 25",
        "--box-units pixel, 1 or 1000",
        "in thousandths of the picture",
        "a special token is typed in the text",
        "a question without words (pictures: 1)",
        "over-long for the model",
        "a held-out picture is trained on",
    ):
        assert words in page, words
