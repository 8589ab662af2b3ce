"""One scene in every format of boxes: the same questions and the same answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from box_fixtures import (
    LABEL_FILES,
    find_box,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
)
from each_value import each

from finesight.data.exporter import export_dataset
from finesight.data.formats import get_format
from finesight.data.formats.dataset_format import NOTE_SKIPPED_BOX
from finesight.data.formats.image_annotations import (
    NOTE_OMITTED_BOXES,
    NOTE_OMITTED_CLASSES,
    REASON_OBJECT_WITHOUT_BOX,
    REASON_UNLISTED_CLASSES,
)
from finesight.data.sample import LocatedSample
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


def cvat(root: Path) -> Path:
    boxes = [("dog", 12, 3, 32, 17), ("lawn", 0, 0, 40, 20), ("dog", 4, 5, 12, 13)]
    shapes = "".join(
        f'<box label="{name}" xtl="{x1}" ytl="{y1}" xbr="{x2}.00" ybr="{y2}.00"/>'
        for name, x1, y1, x2, y2 in boxes
    )
    image = f'<image id="0" name="a.png" width="40" height="20">{shapes}</image>'
    text = f"<annotations><version>1.1</version>{image}</annotations>"
    (root / "annotations.xml").write_text(text, encoding="utf-8")
    return root


def fiftyone(root: Path) -> Path:
    (root / "data").mkdir()
    (root / "a.png").rename(root / "data" / "a.png")
    shares = [(0, [0.3, 0.15, 0.5, 0.7]), (1, [0, 0, 1, 1]), (0, [0.1, 0.25, 0.2, 0.4])]
    boxes = [{"label": kind, "bounding_box": box} for kind, box in shares]
    document = {"classes": ["dog", "lawn"], "labels": {"a": boxes}}
    (root / "labels.json").write_text(json.dumps(document), encoding="utf-8")
    return root


def label_studio(root: Path) -> Path:
    shares = [("dog", 30, 15, 50, 70), ("lawn", 0, 0, 100, 100), ("dog", 10, 25, 20, 40)]
    results = [
        {
            "id": str(number),
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": 40,
            "original_height": 20,
            "value": {"x": x, "y": y, "width": w, "height": h, "rectanglelabels": [name]},
        }
        for number, (name, x, y, w, h) in enumerate(shares)
    ]
    data = {"image": "/data/local-files/?d=project/a.png"}
    tasks = [{"id": 7, "data": data, "annotations": [{"result": results}]}]
    (root / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
    return root / "export.json"


SOURCES = [coco, yolo, voc, labelme, cvat, fiftyone, label_studio]


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make: Callable[[Path], Path] = request.param
    write_box_image(tmp_path / "set" / "a.png", WHITE)
    return make(tmp_path / "set")


def test_detection(source: Path, tmp_path: Path) -> None:
    samples, _ = import_samples(source, tmp_path / "out")
    dogs = [("dog", find_box(*(tmp_path / "set").rglob("a.png"))), ("dog", (4, 5, 12, 13))]
    assert list_answers(samples) == [[*dogs, ("lawn", (0, 0, 40, 20))]]
    requested = "Locate every object of these classes in the image: dog, lawn."
    assert list_questions(samples) == [requested]
    assert samples[0].id == "a"


def test_grounding(source: Path, tmp_path: Path) -> None:
    samples, _ = import_samples(
        source, tmp_path / "out", box_task="grounding", prompt="The {label}?"
    )
    assert list_answers(samples) == [
        [("dog", WHITE), ("dog", (4, 5, 12, 13))],
        [("lawn", (0, 0, 40, 20))],
    ]
    assert list_questions(samples) == ["The dog?", "The lawn?"]
    assert [sample.id for sample in samples] == ["a-dog", "a-lawn"]


@each("to", ["coco", "yolo", "voc", "labelme", "cvat", "fiftyone", *list(LABEL_FILES)[1:]])
@each("ask", ["detection", "grounding"])
def test_conversion_between_all_box_formats(
    source: Path, tmp_path: Path, to: str, ask: str
) -> None:
    samples, _ = import_samples(source, tmp_path / "out", box_task=ask)
    located_sample = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    export_dataset(located_sample, tmp_path / "exported", to, copy_images=True)
    location = tmp_path / "exported" / LABEL_FILES.get(to, "")
    name = to if to == "label-studio-predictions" else None
    again, summary = import_samples(location, tmp_path / "again", box_task=ask, format=name)
    assert summary.format == to
    assert (list_questions(again), list_answers(again)) == (
        list_questions(samples),
        list_answers(samples),
    )
    assert [sample.id for sample in again] == [sample.id for sample in samples]


def write_changed(make: Callable[[Path], Path], root: Path, old: str, new: str) -> Path:
    """Write a source, and replace a text of its annotation file."""
    write_box_image(root / "a.png", WHITE)
    source = make(root)
    files = [source] if source.is_file() else [*root.glob("*.json"), *root.glob("*.xml")]
    file = (files or [root / "a.txt"])[0]
    text = file.read_text(encoding="utf-8")
    assert old in text, text
    file.write_text(text.replace(old, new), encoding="utf-8")
    return source


LAWNS = {
    coco: '"category_id": 2, "bbox": [0, 0, 40, 20]',
    voc: "<name>lawn</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>40</xmax><ymax>20</ymax></bndbox>",
    labelme: '"shape_type": "rectangle", "points": [[40, 20], [0, 0]]',
    cvat: '<box label="lawn" xtl="0" ytl="0" xbr="40.00" ybr="20.00"/>',
    label_studio: '"width": 100, "height": 100, "rectanglelabels"',
}


@pytest.mark.parametrize(
    ("make", "lawn", "box"),
    [
        (coco, '"category_id": 2, "bbox": [0, 0, 40, 20], "iscrowd": 1', None),
        (coco, '"category_id": 2, "keypoints": [1, 2, 2], "segmentation": {"counts": "a"}', None),
        (coco, '"category_id": 2, "segmentation": [[0, 0, 9, 1, 4, 8]]', (0, 0, 9, 8)),
        (voc, "<name>lawn</name><point><x>1</x><y>2</y></point>", None),
        (labelme, '"shape_type": "point", "points": [[9, 0]]', None),
        (labelme, '"shape_type": "line", "points": [[9, 0], [0, 0]]', None),
        (labelme, '"shape_type": "circle", "points": [[9, 9], [9, 4]]', (4, 4, 14, 14)),
        (cvat, '<points label="lawn" points="1,2;3,4"/>', None),
        (cvat, '<tag label="lawn"/>', None),
        (cvat, '<mask label="lawn" left="2" top="3" width="5" height="6"/>', (2, 3, 7, 9)),
        (label_studio, '"width": 1, "keypointlabels"', None),
    ],
)
def test_other_shapes(
    tmp_path: Path, make: Callable[[Path], Path], lawn: str, box: tuple[int, ...] | None
) -> None:
    source = write_changed(make, tmp_path / "set", LAWNS[make], lawn)
    samples, summary = import_samples(source, tmp_path / "out")
    lawns = [] if box is None else [("lawn", box)]
    assert list_answers(samples) == [[("dog", WHITE), ("dog", (4, 5, 12, 13)), *lawns]]
    assert ["lawn" in question for question in list_questions(samples)] == [bool(lawns)]
    assert any(note.endswith(("(skipped)", "boxes)")) for note in summary.source_notes)
    if box is None:
        with pytest.raises(UserError, match=re.escape(REASON_UNLISTED_CLASSES)):
            import_samples(source, tmp_path / "all", prompt="Locate all objects.")
        for name, options in {
            "listed": {"prompt": "Locate all of {labels}."},
            "grounding": {"box_task": "grounding"},
        }.items():
            samples, _ = import_samples(source, tmp_path / name, **options)
            assert list_answers(samples) == [[("dog", WHITE), ("dog", (4, 5, 12, 13))]]


@pytest.mark.parametrize(
    ("make", "lawn", "points"),
    [
        (
            coco,
            '"category_id": 2, "bbox": [0, 0, 40, 20], "keypoints": [30, 4, 2, 0, 0, 0, 8, 9, 1]',
            [("lawn 3", (8, 9)), ("lawn a", (30, 4))],
        ),
        (labelme, '"shape_type": "point", "points": [[30, 4]]', [("lawn", (30, 4))]),
        (
            cvat,
            '<points label="lawn" points="30.0,4.0;8,9"/><skeleton label="lawn"><points label="a"'
            ' points="1,2"/><points label="b" outside="1" points="1,2"/></skeleton>',
            [("lawn", (30, 4)), ("lawn", (8, 9)), ("lawn a", (1, 2))],
        ),
        (label_studio, '"width": 1, "keypointlabels"', [("lawn", (0, 0))]),
        (
            yolo,
            "1 0.5 0.5 1 1 0.75 0.2 2 0 0 0 0.2 0.45 1",
            [("lawn 1", (30, 4)), ("lawn 3", (8, 9))],
        ),
    ],
)
def test_points(
    tmp_path: Path,
    make: Callable[[Path], Path],
    lawn: str,
    points: list[tuple[str, tuple[int, int]]],
) -> None:
    old = {**LAWNS, yolo: "1 0.5 0.5 1 1"}[make]
    source = write_changed(make, tmp_path / "set", old, lawn)
    if make is coco:
        text = source.read_text(encoding="utf-8").replace(
            '"name": "lawn"', '"name": "lawn", "keypoints": ["a", "b"]'
        )
        source.write_text(text, encoding="utf-8")
    if make is yolo:
        (source / "data.yaml").write_text("names: [dog, lawn]\nkpt_shape: [3, 3]\n")
    samples, summary = import_samples(source, tmp_path / "out", box_task="points")
    assert list_answers(samples) == [[(label, 2 * xy) for label, xy in points]]
    assert all(part.type == "point" for part in samples[0].messages[-1].content)
    assert ("lawn" in list_questions(samples)[0], "dog" in list_questions(samples)[0]) == (
        True,
        make is yolo,
    )
    assert not any("skipped" in note or "ignored" in note for note in summary.source_notes)


def test_points_are_required_and_inside_their_image(tmp_path: Path) -> None:
    write_box_image(tmp_path / "set" / "a.png", WHITE)
    with pytest.raises(UserError, match="no points in the annotations"):
        import_samples(fiftyone(tmp_path / "set"), tmp_path / "out", box_task="points")
    lawn = '"shape_type": "point", "points": [[44, 4]]'
    source = write_changed(labelme, tmp_path / "outside", LAWNS[labelme], lawn)
    with pytest.raises(UserError, match=r"the point \[44, 4\] .* outside its image"):
        import_samples(source, tmp_path / "out", box_task="points")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("kpt_shape: [3, 2]", r"1 0.5 .* expected: .* 10 values with keypoints"),
        (
            "kpt_shape: [3, 3]\nkpt_names: {1: [a, b]}",
            r"kpt_shape is \[3, 3\].* 2 names",
        ),
        ("kpt_shape: 3", "data.yaml: kpt_shape is 3"),
    ],
)
def test_keypoints_agree_with_their_declaration(tmp_path: Path, description, message) -> None:
    lawn = "1 0.5 0.5 1 1 0.75 0.2 2 0 0 0 0.2 0.45 1"
    source = write_changed(yolo, tmp_path / "set", "1 0.5 0.5 1 1", lawn)
    (source / "data.yaml").write_text(f"names: [dog, lawn]\n{description}\n")
    with pytest.raises(UserError, match=f"(?s){message}"):
        import_samples(source, tmp_path / "out", box_task="points")


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_boxes_of_a_class_with_a_crowd_are_left_out(tmp_path: Path, key: str) -> None:
    dog = "[4, 5, 8, 8]"
    source = write_changed(coco, tmp_path / "set", dog, f'{dog}, "{key}": 1')
    samples, summary = import_samples(source, tmp_path / "out")
    assert list_answers(samples) == [[("lawn", (0, 0, 40, 20))]]
    assert samples[0].meta["classes"] == ["lawn"]
    assert summary.source_notes[NOTE_OMITTED_CLASSES] == 1
    assert summary.source_notes[NOTE_OMITTED_BOXES] == 1


@pytest.mark.parametrize(
    ("make", "dog", "empty_dog", "wide_dog"),
    [
        (coco, "[4, 5, 8, 8]", "[4, 5, 0, 8]", "[4, 5, 80, 8]"),
        (yolo, "0.2 0.45 0.2 0.4", "0.2 0.45 0 0.4", "0.2 0.45 0.9 0.4"),
        (voc, "<xmax>12<", "<xmax>4<", "<xmax>80<"),
        (labelme, "[12, 5]", "[4, 5]", "[80, 5]"),
        (cvat, 'xbr="12.00"', 'xbr="4.00"', 'xbr="80"'),
        (fiftyone, "0.25, 0.2, 0.4]", "0.25, 0, 0.4]", "0.25, 2, 0.4]"),
        (label_studio, '"width": 20', '"width": 0', '"width": 200'),
    ],
)
def test_stray_boxes_keep_their_class_in_the_question(
    tmp_path: Path, make: Callable[[Path], Path], dog: str, empty_dog: str, wide_dog: str
) -> None:
    source = write_changed(make, tmp_path / "set", dog, empty_dog)
    with pytest.raises(UserError, match="no area"):
        import_samples(source, tmp_path / "fail")
    for number, option in enumerate(("drop", "clip", None)):
        options = {"on_invalid_box": option} if option else {"on_invalid_row": "skip"}
        samples, summary = import_samples(source, tmp_path / str(number), **options)
        assert list_answers(samples) == [[("dog", WHITE), ("lawn", (0, 0, 40, 20))]]
        assert summary.source_notes[NOTE_SKIPPED_BOX] == 1
    source = write_changed(make, tmp_path / "wide", dog, wide_dog)
    samples, summary = import_samples(source, tmp_path / "lawn", on_invalid_box="drop")
    assert list_answers(samples) == [[("lawn", (0, 0, 40, 20))]]
    assert samples[0].meta["classes"] == ["lawn"]
    assert summary.source_notes[NOTE_SKIPPED_BOX] == 1
    with pytest.raises(UserError, match="outside its image") as caught:
        import_samples(source, tmp_path / "fail")
    has_options = "boxes" in get_format(summary.format).supported_options
    assert ("--box-format" in caught.value.remedy) == has_options
    with pytest.raises(UserError, match="for which the question would ask"):
        import_samples(source, tmp_path / "all", on_invalid_box="drop", prompt="Find all.")


@each("to", ["coco", "voc", "labelme", "fiftyone"])
def test_images_can_be_referenced_in_export(source: Path, tmp_path: Path, to: str) -> None:
    samples, _ = import_samples(source, tmp_path / "out")
    located_sample = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    export_dataset(located_sample, tmp_path / "exported", to, copy_images=False)
    location = tmp_path / "exported" / LABEL_FILES.get(to, "")
    again, _ = import_samples(location, tmp_path / "again")
    assert list_answers(again) == list_answers(samples)
    assert not list((tmp_path / "exported").rglob("*.png"))


def test_image_with_only_skipped_objects_is_not_empty(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_box_image(tmp_path / "set" / name, WHITE)
    source = labelme(tmp_path / "set")
    point = {"label": "dog", "shape_type": "point", "points": [[4, 5]]}
    record = {"imagePath": "b.png", "shapes": [point]}
    (tmp_path / "set" / "b.json").write_text(json.dumps(record), encoding="utf-8")
    samples, summary = import_samples(source, tmp_path / "out")
    assert [sample.id for sample in samples] == ["a"]
    assert summary.skipped_rows == {REASON_OBJECT_WITHOUT_BOX: 1}
    assert summary.source_notes == {"shapes of type point (skipped)": 1}


def test_class_question_needs_class_names(tmp_path: Path) -> None:
    write_box_image(tmp_path / "set" / "a.png", WHITE)
    record = {"imagePath": "a.png", "shapes": []}
    (tmp_path / "set" / "a.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match="no object of the source has a class"):
        import_samples(tmp_path / "set", tmp_path / "out")
    samples, _ = import_samples(tmp_path / "set", tmp_path / "out", prompt="What is there?")
    assert list_answers(samples) == [["none"]]
