"""LabelMe's JSON files as the program saves them."""

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import (
    find_box,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
)
from case_files import load_cases
from PIL import Image

from finesight.errors import UserError

CASES = load_cases("labelme")

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
    write_box_image(root / "a.png", WHITE)
    write_box_image(root / "b.png", WHITE)
    write_box_image(root / "unlabelled.png", WHITE)
    return root


def test_detection(root: Path, tmp_path: Path) -> None:
    samples, summary = import_samples(root, tmp_path / "out")
    assert list_answers(samples) == [
        [("cat", (1.25, 1, 9, 12.125)), ("dog", (12, 3, 31, 17))],
        ["none"],
    ]
    assert summary.detected_by == "JSON files with shapes: LabelMe, 2 classes"
    assert summary.source_notes == {
        "polygons (converted to bounding boxes)": 1,
        "shapes of type point (skipped)": 1,
    }


def test_four_corner_shapes_windows_paths_and_embedded_images(root: Path, tmp_path: Path) -> None:
    corners = [[12, 3], [31, 3], [31, 17], [12, 17]]
    (root / "json").mkdir()
    save(root / "json", record(imagePath="..\\a.png", shapes=[shape("dog", corners)]))
    samples, _ = import_samples(root / "json", tmp_path / "out")
    assert list_answers(samples) == [[("dog", WHITE)]]
    data = base64.b64encode((root / "a.png").read_bytes()).decode()
    (root / "a.png").unlink()
    (root / "json" / "a.json").unlink()
    samples, _ = import_samples(save(root, record(imageData=data)), tmp_path / "embedded")
    image = samples[0].messages[0].content[0].image
    assert image == "images/000001.png"
    assert find_box(tmp_path / "embedded" / image) == WHITE


def test_sizes_include_exif_rotation(root: Path, tmp_path: Path) -> None:
    """Check that the EXIF orientation is applied, as LabelMe does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(root / "a.png") as image:
        image.save(root / "a.png", exif=exif)
    turned = find_box(root / "a.png")
    corners = [[float(n) for n in turned[:2]], [float(n) for n in turned[2:]]]
    save(root, record(imageHeight=40, imageWidth=20, shapes=[shape("dog", corners)]))
    samples, _ = import_samples(root, tmp_path / "out")
    assert list_answers(samples)[0] == [("dog", turned)]
    save(root, record())
    with pytest.raises(UserError, match="annotated before rotation"):
        import_samples(root, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "broken JSON"),
        ("[1]", "no list of shapes"),
        (record(shapes=[5]), "no list of shapes"),
        (record(shapes=[shape("dog", [[1, 2]])]), "has inverted corners or no area"),
        (record(shapes=[shape("dog", [[1, 2, 3], [4, 5, 6]])]), "the shape"),
        (record(shapes=[shape("dog", [[1, 2], [1, 9]])]), "has inverted corners or no area"),
        (record(imagePath="missing.png"), "no such image"),
        (record(imagePath="missing.png", imageData="%"), "not base64"),
        (record(imagePath="missing.png", imageData="aaaa"), "not an image"),
        (record(imageHeight=40), "40 x 40 pixels, the image has 40 x 20"),
    ],
)
def test_invalid_files(root: Path, tmp_path: Path, content: object, what: str) -> None:
    save(root, content)
    with pytest.raises(UserError, match=what) as caught:
        import_samples(root, tmp_path / "out", format="labelme")
    assert "a.json" in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize("stem", ["a", os.fsdecode("猫".encode("gbk"))])
@pytest.mark.parametrize("suffix", [".png", ".JPG"])
def test_empty_image_path(tmp_path: Path, stem: str, suffix: str) -> None:
    for name in (f"{stem}{suffix}", os.fsdecode("狗.png".encode("gbk"))):
        write_box_image(tmp_path / "set" / name, WHITE)
    for index, path in enumerate(("", None)):
        save(tmp_path / "set", record(imagePath=path), f"{stem}.json")
        samples, _ = import_samples(tmp_path / "set", tmp_path / f"out{index}")
        assert ("dog", WHITE) in list_answers(samples)[0]


def save_files(root: Path, changes: list[dict[str, Any]]) -> Path:
    """Save a file per change, without shapes, each with an image."""
    for number, change in enumerate(changes):
        content = record(**{"shapes": [], "imagePath": f"{number}.png"} | change)
        save(root, content, f"{number}.json")
        write_box_image(root / f"{number}.png", WHITE)
    return root


@pytest.mark.parametrize(
    ("changes", "question", "answers", "meta"), CASES["test_labels_of_images_without_shapes"]
)
def test_labels_of_images_without_shapes(tmp_path, changes, question, answers, meta):
    samples, summary = import_samples(save_files(tmp_path / "set", changes), tmp_path / "out")
    assert list_questions(samples)[0] == question
    assert [answer for (answer,) in list_answers(samples)] == answers
    assert samples[0].meta == meta
    assert "flags of files, not imported" not in summary.other_keys


@pytest.mark.parametrize(
    ("changes", "what", "remedy"), CASES["test_unclear_labels_of_images_are_rejected"]
)
@pytest.mark.parametrize("prompt", [None, "Which?"])
def test_unclear_labels_of_images_are_rejected(tmp_path, changes, what, remedy, prompt):
    root = save_files(tmp_path / "set", changes)
    with pytest.raises(UserError, match=what) as caught:
        import_samples(root, tmp_path / "out", prompt=prompt)
    assert remedy in str(caught.value)


def test_flags_next_to_shapes_are_stored(tmp_path: Path) -> None:
    shapes = [shape("dog", [[31.0, 17.0], [12.0, 3.0]])]
    changes = [{"shapes": shapes, "flags": {"night": True}}, {}]
    samples, summary = import_samples(save_files(tmp_path / "set", changes), tmp_path / "out")
    assert list_answers(samples) == [[("dog", WHITE)], ["none"]]
    assert samples[0].meta == {"flags": {"night": True}, "classes": ["dog"]}
    assert summary.source_notes == {"images with flags next to shapes (in meta)": 1}


def test_ignored_images_are_skipped(tmp_path: Path) -> None:
    flags = [{"__ignore__": number == 0, "a": number == 1, "b": number != 1} for number in range(3)]
    root = save_files(tmp_path / "set", [{"flags": one} for one in flags])
    samples, summary = import_samples(root, tmp_path / "out", prompt="Is it {labels}?")
    assert list_answers(samples) == [["a"], ["b"]]
    assert list_questions(samples) == ["Is it a, b?"] * 2
    assert summary.skipped_rows == {"images with the flag __ignore__": 1}


def test_tasks_of_boxes_need_shapes(tmp_path: Path) -> None:
    root = save_files(tmp_path / "set", [{"flags": {"a": True, "b": False}}])
    with pytest.raises(UserError, match="no file has shapes"):
        import_samples(root, tmp_path / "out", box_task="points")
