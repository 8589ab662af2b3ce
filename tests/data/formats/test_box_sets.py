"""One scene in every format of boxes: the same questions and the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from box_scenes import answers, imported, questions, white_at

from finesight.data.exporting import export
from finesight.data.jsonl import Located
from finesight.errors import UserError

WHITE = (12, 3, 32, 17)


def coco(root: Path) -> Path:
    boxes = [(1, [12, 3, 20, 14]), (2, [0, 0, 40, 20]), (1, [4, 5, 8, 8])]
    annotations = [{"image_id": 1, "category_id": kind, "bbox": box} for kind, box in boxes]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "lawn"}],
    }
    (root / "set.json").write_text(json.dumps(document), encoding="utf-8")
    return root / "set.json"


def yolo(root: Path) -> Path:
    (root / "classes.txt").write_text("dog\nlawn\n", encoding="utf-8")
    lines = ("0 0.55 0.5 0.5 0.7", "1 0.5 0.5 1 1", "0 0.2 0.45 0.2 0.4")
    (root / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    return root


def voc(root: Path) -> Path:
    boxes = [("dog", 13, 4, 32, 17), ("lawn", 1, 1, 40, 20), ("dog", 5, 6, 12, 13)]
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    text = f"<annotation><filename>a.png</filename>{objects}</annotation>"
    (root / "a.xml").write_text(text, encoding="utf-8")
    return root


def labelme(root: Path) -> Path:
    boxes = [("dog", 12, 3, 32, 17), ("lawn", 40, 20, 0, 0), ("dog", 12, 5, 4, 13)]
    shapes = [
        {"label": name, "shape_type": "rectangle", "points": [[x1, y1], [x2, y2]]}
        for name, x1, y1, x2, y2 in boxes
    ]
    record = {"imagePath": "a.png", "shapes": shapes, "imageHeight": 20, "imageWidth": 40}
    (root / "a.json").write_text(json.dumps(record), encoding="utf-8")
    return root


@pytest.fixture(params=[coco, yolo, voc, labelme])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[Path], Path] = request.param
    white_at(tmp_path / "set" / "a.png", WHITE)
    return make(tmp_path / "set")


def test_detection(source: Path, tmp_path: Path) -> None:
    samples, _ = imported(source, tmp_path / "out")
    dogs = [("dog", WHITE), ("dog", (4, 5, 12, 13))]
    assert answers(samples) == [[*dogs, ("lawn", (0, 0, 40, 20))]]
    asked = "Locate every object of these classes in the picture: dog, lawn."
    assert questions(samples) == [asked]
    assert samples[0].id == "a"


def test_grounding(source: Path, tmp_path: Path) -> None:
    samples, _ = imported(source, tmp_path / "out", ask="grounding", prompt="The {label}?")
    assert answers(samples) == [
        [("dog", WHITE), ("dog", (4, 5, 12, 13))],
        [("lawn", (0, 0, 40, 20))],
    ]
    assert questions(samples) == ["The dog?", "The lawn?"]
    assert [sample.id for sample in samples] == ["a-dog", "a-lawn"]


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "labelme"])
@pytest.mark.parametrize("ask", ["detection", "grounding"])
def test_from_each_format_to_each(source: Path, tmp_path: Path, to: str, ask: str) -> None:
    samples, _ = imported(source, tmp_path / "out", ask=ask)
    located = [Located(sample, tmp_path / "out") for sample in samples]
    export(located, tmp_path / "exported", to, copy_pictures=True)
    place = tmp_path / "exported" / ("annotations.json" if to == "coco" else "")
    again, summary = imported(place, tmp_path / "again", ask=ask)
    assert summary.format == to
    assert (questions(again), answers(again)) == (questions(samples), answers(samples))
    assert [sample.id for sample in again] == [sample.id for sample in samples]


@pytest.mark.parametrize("to", ["coco", "voc", "labelme"])
def test_pictures_can_stay_where_they_are(source: Path, tmp_path: Path, to: str) -> None:
    samples, _ = imported(source, tmp_path / "out")
    located = [Located(sample, tmp_path / "out") for sample in samples]
    export(located, tmp_path / "exported", to, copy_pictures=False)
    place = tmp_path / "exported" / ("annotations.json" if to == "coco" else "")
    again, _ = imported(place, tmp_path / "again")
    assert answers(again) == answers(samples)
    assert not list((tmp_path / "exported").rglob("*.png"))


def test_a_picture_whose_objects_are_all_left_out_is_not_called_empty(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        white_at(tmp_path / "set" / name, WHITE)
    source = labelme(tmp_path / "set")
    circle = {"label": "dog", "shape_type": "circle", "points": [[4, 5], [6, 5]]}
    record = {"imagePath": "b.png", "shapes": [circle]}
    (tmp_path / "set" / "b.json").write_text(json.dumps(record), encoding="utf-8")
    samples, summary = imported(source, tmp_path / "out")
    assert [sample.id for sample in samples] == ["a"]
    assert summary.left_out == {"pictures whose objects are all of kinds that are not read": 1}
    assert summary.noted == {"shapes of type circle, left out": 1}


def test_a_question_for_classes_needs_classes(tmp_path: Path) -> None:
    white_at(tmp_path / "set" / "a.png", WHITE)
    record = {"imagePath": "a.png", "shapes": []}
    (tmp_path / "set" / "a.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="no object of the source has a class"):
        imported(tmp_path / "set", tmp_path / "out")
    samples, _ = imported(tmp_path / "set", tmp_path / "out", prompt="What is there?")
    assert answers(samples) == [["none"]]
