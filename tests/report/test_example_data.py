"""Tests of example data: thumbnails, boxes, and truncated texts."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from each_value import each
from PIL import Image
from run_dir_fixtures import make_prediction_line

from finesight.evaluate.mathml import FormulaConverter
from finesight.report import examples
from finesight.report.examples import (
    MAX_ANSWER_CHARS,
    MAX_BOXES,
    Example,
    ExampleDataBuilder,
    diff_fields,
    diff_texts,
    read_boxes,
)
from finesight.vision.image_processing import load_image

CASES = load_cases("example_data")


def example(before: Any = None, after: Any = None) -> Example:
    return Example([before, after], [None, None], "better", 0.5)


def build_data(*examples: Example, folders: tuple[Path, ...] = ()) -> Any:
    data = ExampleDataBuilder(folders, None).build(examples)
    json.dumps(data, allow_nan=False)
    return data


@pytest.fixture
def image_path(tmp_path: Path) -> str:
    Image.new("RGB", (80, 40), "red").save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def test_example_has_both_answers(image_path: str) -> None:
    images = [image_path, image_path]
    before = make_prediction_line("s", "b", "gold", 0.25, image=images, finish_reason="length")
    after = make_prediction_line("s", "a", "gold", 1.0, image=images, references=["", "other"])
    data = build_data(example(before, after), example(after=after))
    found, _ = data["examples"]
    assert found["references"] == ["gold", "other"]
    assert (found["predictions"][0]["text"], found["predictions"][0]["is_complete"]) == ("b", False)
    assert found["predictions"][1]["scores"] == {"similarity": 1.0, "exact match": 1.0}
    # Images are embedded once.
    (image,) = data["images"]
    assert [one["images"] for one in data["examples"]] == [[0, 0], [0, 0]]
    assert (image["width"], image["height"]) == (80, 40)
    assert image["src"].startswith("data:image/png;base64,")


def test_later_page_renders_only_new_images(
    image_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(tmp_path / "other.png")
    Image.new("RGB", (20, 20), "blue").save(other)
    opened: list[str] = []

    def noted(path: Path, **kwargs: Any) -> Image.Image:
        opened.append(path.name)
        return load_image(path, **kwargs)

    monkeypatch.setattr(examples, "load_image", noted)
    missing = str(tmp_path / "later.png")
    known: examples.ThumbnailCache = {}

    def shown(*paths: str) -> Any:
        lines = [make_prediction_line("s", "", "", 1.0, image=path) for path in paths]
        found = ExampleDataBuilder((), None, known).build([example(after=line) for line in lines])
        return [one.get("src") for one in found["images"]]

    first, _ = shown(image_path, missing)
    Image.new("RGB", (9, 9), "green").save(missing)
    again, new, late = shown(image_path, other, missing)
    assert first == again
    # In any order: they are read side by side.
    assert sorted(opened) == ["later.png", "other.png", "p.png"]
    assert None not in (new, late)
    shown(other)
    assert {Path(path).name for path, _ in known} == {"other.png"}


def test_relative_paths_use_the_start_folder(image_path: str, tmp_path: Path) -> None:
    line = make_prediction_line("s", "", "", 1.0, image="p.png")
    folders = (tmp_path / "elsewhere", tmp_path)
    assert "src" in build_data(example(after=line), folders=folders)["images"][0]
    missing = build_data(example(after=line), folders=folders[:1])["images"][0]
    assert missing == {"path": "p.png", "error": "no such image"}


@each("name", ["broken.png", "folder.png", "null\0.png", "x" * 5000])
def test_unreadable_image_has_a_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    line = make_prediction_line("s", "", "", 1.0, image=os.path.join(tmp_path, name))
    (found,) = build_data(example(after=line))["images"]
    assert found["error"]
    assert "src" not in found


@each(
    "box",
    [
        {"xyxy": [1, 2, 3]},
        {"xyxy": [1, 2, 3, float("nan")]},
        {"xyxy": [1, 2, 3, "4"]},
        {"label": "x"},
        [1, 2, 3, 4],
        None,
    ],
)
def test_invalid_boxes_are_not_drawn(box: Any) -> None:
    good = {"image": 0, "label": None, "xyxy": [4, 3, 2, 1]}
    assert read_boxes([box, good]) == [{"image": 0, "label": "", "xyxy": [4.0, 3.0, 2.0, 1.0]}]
    assert read_boxes(box) == []


def test_long_answers_are_truncated() -> None:
    boxes = [{"image": 0, "label": "l" * 500, "xyxy": [0, 0, 1, 1]}] * 1000
    line = make_prediction_line("s", "x" * (MAX_ANSWER_CHARS + 1234), "", 0.0, boxes=boxes)
    (found,) = build_data(example(after=line))["examples"]
    assert found["predictions"][1]["text"].endswith("x [and 1,234 more characters]")
    assert found["is_truncated"] is True
    assert len(found["predictions"][1]["boxes"]) == MAX_BOXES
    assert len(found["predictions"][1]["boxes"][0]["label"]) == 80


TOO_LONG = ("word " * 300, "word other " * 300, None)


@each(("answer", "reference", "pairs"), [*CASES["test_differences_of_texts"], TOO_LONG])
def test_differences_of_texts(answer: str, reference: str, pairs: list[list[str]] | None) -> None:
    spans = diff_texts(answer, reference)
    found = spans and [[answer[a:b], reference[c:d]] for a, b, c, d in spans]
    assert found == pairs


@each(("answer", "reference", "fields"), CASES["test_differences_of_json_fields"])
def test_differences_of_json_fields(answer: str, reference: str, fields: object) -> None:
    found = diff_fields(answer, reference)
    if found:
        found["differences"].sort()
    assert found == fields
    (data,) = build_data(example(after=make_prediction_line("s", answer, reference, 0.0)))[
        "examples"
    ]
    assert (data["predictions"][1]["fields"] is None) == (fields is None)


def test_complete_formulas_of_latex_answers_are_rendered() -> None:
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    lines = [
        make_prediction_line("s", answer, r"\frac{a}{b}", 0.0, finish_reason=reason)
        for answer, reason in ((r"\frac ab", "stop"), ("orange " * 50, "length"))
    ]
    several = [example(after=line) for line in lines]
    first, second = ExampleDataBuilder((), FormulaConverter()).build(several)["examples"]
    assert first["formula"][0] == first["predictions"][1]["formula"][0] == "math"
    assert second["predictions"][1]["formula"] is None
    assert build_data(*several)["examples"][0]["formula"] is None


def test_box_coordinates_follow_decoded_image_size(tmp_path: Path) -> None:
    """A large JPEG is decoded at reduced size and rotated by EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (6000, 2000), "red")
    image.paste("blue", (0, 0, 3000, 2000))
    image.save(tmp_path / "p.jpg", exif=exif)
    line = make_prediction_line("s", "", "", 1.0, image=str(tmp_path / "p.jpg"))
    (found,) = build_data(example(after=line))["images"]
    assert (found["width"], found["height"]) == (2000, 6000)
    shown = Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2]))).convert("RGB")
    assert shown.size == (320, 960)
    assert [shown.getpixel((160, y))[2] > 200 for y in (100, 860)] == [True, False]


def test_large_images_use_bounded_memory(tmp_path: Path) -> None:
    """Reports are rendered in training processes, which need the memory.

    Takes long: decodes eight images of 49 megapixels.
    """
    Image.new("RGB", (7000, 7000)).save(tmp_path / "0.png", compress_level=1)
    for number in range(1, 8):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    program = (
        "import pathlib, sys; from finesight.report.examples import ExampleDataBuilder;"
        "from finesight.report.examples import Example;"
        "status = pathlib.Path('/proc/self/status');"
        "highest = lambda: int(status.read_text().split('VmHWM:')[1].split()[0]) / 1e3;"
        "before = highest();"
        "example = Example([None, {'id': '', 'image': sys.argv[1:]}], [None, None], 'right', 0.0);"
        "found = ExampleDataBuilder((), None).build([example])['images'];"
        "print(sum('src' in one for one in found), highest() - before)"
    )
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, megabytes = done.stdout.split()
    assert count == "8"
    # An image takes 147 MB as RGB, and 294 MB with its rotated or resized copy.
    assert float(megabytes) < 600
