"""LabelMe's JSON files as the program saves them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from box_scenes import answers, imported, there_and_back, white_at, white_in
from PIL import Image

from finesight.data.sample import ImagePart
from finesight.errors import UserError

WHITE = (12, 3, 31, 17)


def shape(label: str, points: list[list[float]], kind: str = "rectangle") -> dict[str, Any]:
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
        "mask": None,
    }


def record(**change: Any) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            shape("dog", [[31.0, 17.0], [12.0, 3.0]]),
            shape("cat", [[1.25, 2.5], [9, 1], [5, 12.125]], "polygon"),
            shape("nose", [[5, 5]], "point"),
        ],
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": 20,
        "imageWidth": 40,
        **change,
    }


def save(root: Path, content: object, name: str = "a.json") -> Path:
    root.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = save(tmp_path / "set", record())
    save(root, record(shapes=[], imagePath="b.png"), "b.json")
    white_at(root / "a.png", WHITE)
    white_at(root / "b.png", WHITE)
    white_at(root / "unlabelled.png", WHITE)
    return root


def test_detection(root: Path, tmp_path: Path) -> None:
    samples, summary = imported(root, tmp_path / "out")
    assert answers(samples) == [
        [("cat", (1.25, 1, 9, 12.125)), ("dog", (12, 3, 31, 17))],
        ["none"],
    ]
    assert summary.known_by == "JSON files with shapes and imagePath: LabelMe, 2 classes"
    assert summary.noted == {
        "polygons, read as the boxes around them": 1,
        "shapes of type point, left out": 1,
    }


def test_known_pixels(root: Path, tmp_path: Path) -> None:
    samples, _ = imported(root, tmp_path / "out")
    assert answers(samples)[0][1] == ("dog", white_in(root / "a.png"))


@pytest.mark.parametrize("ask", ["detection", "grounding"])
def test_there_and_back(root: Path, tmp_path: Path, ask: str) -> None:
    there_and_back(root, tmp_path, ask=ask)


def test_four_corners_and_paths_of_windows(root: Path, tmp_path: Path) -> None:
    corners = [[12, 3], [31, 3], [31, 17], [12, 17]]
    (root / "json").mkdir()
    save(root / "json", record(imagePath="..\\a.png", shapes=[shape("dog", corners)]))
    samples, _ = imported(root / "json", tmp_path / "out")
    assert answers(samples) == [[("dog", WHITE)]]


def test_one_file(root: Path, tmp_path: Path) -> None:
    assert len(imported(root / "a.json", tmp_path / "out")[0]) == 1


def test_the_picture_in_the_file(root: Path, tmp_path: Path) -> None:
    data = base64.b64encode((root / "a.png").read_bytes()).decode()
    (root / "a.png").unlink()
    save(root, record(imageData=data))
    samples, _ = imported(root, tmp_path / "out")
    part = samples[0].messages[0].content[0]
    assert isinstance(part, ImagePart)
    assert part.image == "pictures/000001.png"
    assert white_in(tmp_path / "out" / part.image) == WHITE


def test_sizes_are_those_after_the_turn(root: Path, tmp_path: Path) -> None:
    """LabelMe turns a picture before it shows it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "a.png") as image:
        image.save(root / "a.png", exif=exif)
    turned = white_in(root / "a.png")
    corners = [[float(n) for n in turned[:2]], [float(n) for n in turned[2:]]]
    save(root, record(imageHeight=40, imageWidth=20, shapes=[shape("dog", corners)]))
    samples, _ = imported(root, tmp_path / "out")
    assert answers(samples)[0] == [("dog", turned)]
    save(root, record())
    with pytest.raises(UserError, match="labelled before the turn"):
        imported(root, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "broken JSON"),
        ("[1]", "no list of shapes"),
        (record(shapes=[5]), "no list of shapes"),
        (record(shapes=[shape("dog", [[1, 2]])]), "the rectangle"),
        (record(shapes=[shape("dog", [[1, 2, 3], [4, 5, 6]])]), "the rectangle"),
        (record(shapes=[shape("dog", [[1, 2], [1, 9]])]), "reversed or has no area"),
        (record(imagePath="missing.png"), "no such picture"),
        (record(imagePath="missing.png", imageData="%"), "no base64"),
        (record(imagePath="missing.png", imageData="aaaa"), "not a picture"),
        (record(imageHeight=40), "40 x 40 pixels, the picture has 40 x 20"),
    ],
)
def test_bad_files(root: Path, tmp_path: Path, content: object, what: str) -> None:
    save(root, content)
    with pytest.raises(UserError, match=what) as caught:
        imported(root, tmp_path / "out", format="labelme")
    assert "a.json" in caught.value.what
    assert caught.value.remedy
