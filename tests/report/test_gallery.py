"""Examples as data: pictures held once, boxes that can be drawn, texts of bounded length."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_folders import answer_line

from finesight.report.examples import Example
from finesight.report.formulas import Formulas
from finesight.report.gallery import LONGEST, MOST_BOXES, Gallery, boxes_of


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
    assert found["after"]["scores"] == {"similarity": 1.0, "exact": 1.0}


def test_a_picture_is_held_once_and_boxes_stay_in_its_pixels(picture: str) -> None:
    lines = [answer_line(name, "", "", 1.0, image=[picture, picture]) for name in "ab"]
    data = made(*(example(after=line) for line in lines))
    assert len(data["pictures"]) == 1
    assert [one["pictures"] for one in data["examples"]] == [[0, 0], [0, 0]]
    assert (data["pictures"][0]["width"], data["pictures"][0]["height"]) == (80, 40)
    assert data["pictures"][0]["src"].startswith("data:image/png;base64,")


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
