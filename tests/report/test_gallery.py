"""Examples as data: pictures held once, boxes that can be drawn, texts of bounded length."""

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
from PIL import Image
from run_folders import answer_line

from finesight.report import gallery
from finesight.report.examples import Example
from finesight.report.formulas import Formulas
from finesight.report.gallery import LONGEST, MOST_BOXES, Gallery, boxes_of
from finesight.vision.picture import open_picture


def example(before: Any = None, after: Any = None) -> Example:
    return Example(before, after, "better", 0.5)


def made(*examples: Example, folders: tuple[Path, ...] = ()) -> Any:
    data = Gallery(folders, None).data(examples)
    json.dumps(data, allow_nan=False)
    return data


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (80, 40), "red").save(tmp_path / "p.png")
    return str(tmp_path / "p.png")


def test_an_example_holds_both_answers(picture: str) -> None:
    before = answer_line("s", "b", "gold", 0.25, image=picture, stopped=False)
    after = answer_line("s", "a", "gold", 1.0, image=picture, references=["", "other"])
    (found,) = made(example(before, after))["examples"]
    assert found["right"] == ["gold", "other"]
    assert found["pictures"] == [0]
    assert (found["before"]["text"], found["before"]["stopped"]) == ("b", False)
    assert found["after"]["scores"] == {"similarity": 1.0, "exactly right": 1.0}


def test_a_picture_is_held_once_and_boxes_stay_in_its_pixels(picture: str) -> None:
    lines = [answer_line(name, "", "", 1.0, image=[picture, picture]) for name in "ab"]
    data = made(*(example(after=line) for line in lines))
    assert len(data["pictures"]) == 1
    assert [one["pictures"] for one in data["examples"]] == [[0, 0], [0, 0]]
    assert (data["pictures"][0]["width"], data["pictures"][0]["height"]) == (80, 40)
    assert data["pictures"][0]["src"].startswith("data:image/png;base64,")


def test_a_later_page_makes_only_the_pictures_that_are_new(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(tmp_path / "other.png")
    Image.new("RGB", (20, 20), "blue").save(other)
    opened: list[str] = []

    def noted(path: Path, **kwargs: Any) -> Image.Image:
        opened.append(path.name)
        return open_picture(path, **kwargs)

    monkeypatch.setattr(gallery, "open_picture", noted)
    missing = str(tmp_path / "later.png")
    known: gallery.Thumbnails = {}

    def shown(*paths: str) -> Any:
        lines = [answer_line("s", "", "", 1.0, image=path) for path in paths]
        found = Gallery((), None, known).data([example(after=line) for line in lines])
        return [one.get("src") for one in found["pictures"]]

    first, _ = shown(picture, missing)
    Image.new("RGB", (9, 9), "green").save(missing)
    again, new, late = shown(picture, other, missing)
    assert first == again
    # In any order: they are read side by side.
    assert sorted(opened) == ["later.png", "other.png", "p.png"]
    assert None not in (new, late)
    shown(other)
    assert {Path(path).name for path, _ in known} == {"other.png"}


def test_relative_paths_are_looked_for_where_the_run_began(picture: str, tmp_path: Path) -> None:
    line = answer_line("s", "", "", 1.0, image="p.png")
    folders = (tmp_path / "elsewhere", tmp_path)
    assert "src" in made(example(after=line), folders=folders)["pictures"][0]
    missing = made(example(after=line), folders=folders[:1])["pictures"][0]
    assert missing == {"path": "p.png", "problem": "no such picture"}


@pytest.mark.parametrize("name", ["broken.png", "folder.png", "null\0.png", "x" * 5000])
def test_a_picture_that_cannot_be_read_says_why(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "folder.png").mkdir()
    line = answer_line("s", "", "", 1.0, image=os.path.join(tmp_path, name))
    (found,) = made(example(after=line))["pictures"]
    assert found["problem"]
    assert "src" not in found


@pytest.mark.parametrize(
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
def test_a_box_that_is_none_is_not_drawn(box: Any) -> None:
    good = {"image": 0, "label": None, "xyxy": [4, 3, 2, 1]}
    assert boxes_of([box, good]) == [{"image": 0, "label": "", "xyxy": [4.0, 3.0, 2.0, 1.0]}]
    assert boxes_of(box) == []


def test_runaway_answers_are_cut_and_say_so() -> None:
    boxes = [{"image": 0, "label": "l" * 500, "xyxy": [0, 0, 1, 1]}] * 1000
    line = answer_line("s", "x" * (LONGEST + 1234), "", 0.0, boxes=boxes)
    (found,) = made(example(after=line))["examples"]
    assert found["after"]["text"].endswith("x [and 1,234 more characters]")
    assert len(found["after"]["boxes"]) == MOST_BOXES
    assert len(found["after"]["boxes"][0]["label"]) == 80


def test_formulas_are_drawn_where_answers_are_formulas() -> None:
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    line = answer_line("s", r"\frac ab", r"\frac{a}{b}", 1.0)
    (found,) = Gallery((), Formulas()).data([example(after=line)])["examples"]
    assert found["formula"][0] == found["after"]["formula"][0] == "math"
    assert made(example(after=line))["examples"][0]["formula"] is None


def test_lines_of_older_versions_lack_keys() -> None:
    (found,) = made(example(after={"id": "s", "answer": "a"}))["examples"]
    assert (found["question"], found["right"], found["boxes"]) == ("", [], [])
    assert found["after"]["stopped"] is True


def test_boxes_are_in_pixels_of_the_picture_however_it_was_decoded(tmp_path: Path) -> None:
    """A large JPEG is decoded at a part of its size, turned as it asks."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (6000, 2000), "red")
    picture.paste("blue", (0, 0, 3000, 2000))
    picture.save(tmp_path / "p.jpg", exif=exif)
    line = answer_line("s", "", "", 1.0, image=str(tmp_path / "p.jpg"))
    (found,) = made(example(after=line))["pictures"]
    assert (found["width"], found["height"]) == (2000, 6000)
    shown = Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2]))).convert("RGB")
    assert shown.size == (320, 960)
    assert [shown.getpixel((160, y))[2] > 200 for y in (100, 860)] == [True, False]


def test_large_pictures_take_the_memory_of_one(tmp_path: Path) -> None:
    """A report is written beside a run that trains, which may need the memory."""
    Image.new("RGB", (7000, 7000)).save(tmp_path / "0.png", compress_level=1)
    for number in range(1, 8):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    program = (
        "import resource, sys; from finesight.report.gallery import Gallery;"
        "from finesight.report.examples import Example;"
        "highest = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3;"
        "before = highest();"
        "found = Gallery((), None).data([Example(None, {'id': '', 'image': sys.argv[1:]},"
        " 'right', 0.0)])['pictures'];"
        "print(sum('src' in one for one in found), highest() - before)"
    )
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, megabytes = done.stdout.split()
    assert count == "8"
    # One takes 147 MB as RGB, and twice that with the copy that is turned or shrunk.
    assert float(megabytes) < 600


def test_what_was_cut_off_is_not_drawn() -> None:
    pytest.importorskip("latex2mathml", reason="the extra `latex` is not installed")
    lines = [
        answer_line("s", "orange " * 50, "x", 0.0, stopped=stopped) for stopped in (True, False)
    ]
    found = Gallery((), Formulas()).data([example(after=line) for line in lines])["examples"]
    assert [one["after"]["formula"] is None for one in found] == [False, True]


def test_ids_are_short(picture: str) -> None:
    (found,) = made(example(after=answer_line("i" * 9000, "", "", 1.0)))["examples"]
    assert len(found["id"]) < 300
