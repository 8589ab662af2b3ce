"""One scene in every format of boxes: the same questions and the same answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import (
    LABEL_FILES,
    SCENE,
    SCENES,
    check_export_roundtrip,
    find_box,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
    write_scene,
)
from case_files import load_cases
from fuzzed_sources import SOURCES, encode_files

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.ingest.formats import get_format
from finesight.ingest.formats.dataset_format import NOTE_SKIPPED_BOX
from finesight.ingest.formats.image_annotations import (
    NOTE_HOLES,
    NOTE_OMITTED_BOXES,
    NOTE_OMITTED_CLASSES,
    NOTE_PARTS,
    REASON_OBJECT_WITHOUT_BOX,
    REASON_UNLISTED_CLASSES,
)
from finesight.samples.sample import LocatedSample, join_text

CASES = load_cases("box_shapes")
WHITE = SCENE
DOGS = [("dog", WHITE), ("dog", (4, 5, 12, 13))]
LAWN = [("lawn", (0, 0, 40, 20))]


@pytest.fixture(params=SCENES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_scene(request.param, tmp_path / "set")


def test_detection_and_grounding(source: Path, tmp_path: Path) -> None:
    samples, _ = import_samples(source, tmp_path / "out")
    assert find_box(*(tmp_path / "set").rglob("a.png")) == WHITE
    assert list_answers(samples) == [[*DOGS, *LAWN]]
    requested = "Locate every object of these classes in the image: dog, lawn."
    assert (list_questions(samples), samples[0].id) == ([requested], "a")
    options = {"box_task": "grounding", "prompt": "The {label}?"}
    samples, _ = import_samples(source, tmp_path / "grounding", **options)
    assert list_answers(samples) == [DOGS, LAWN]
    assert list_questions(samples) == ["The dog?", "The lawn?"]
    assert [sample.id for sample in samples] == ["a-dog", "a-lawn"]


@pytest.mark.parametrize("to", ["coco", "yolo", "cvat", *list(LABEL_FILES)[1:]])
@pytest.mark.parametrize("ask", ["detection", "grounding"])
def test_conversion_between_all_box_formats(source, tmp_path, to, ask):
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


IMPORT_ONLY = {"voc", "labelme", "fiftyone", "qwen-vl", "query-response"}


@pytest.mark.parametrize(
    "kind", sorted(SOURCES.keys() - IMPORT_ONLY - {"yolo", "label-studio, short", "web-dataset"})
)
def test_metadata_and_images_roundtrip(tmp_path: Path, kind: str) -> None:
    case = SOURCES[kind]
    requests = case.get("requests", [{}])[: 1 if kind == "coco captions" else 2]
    for number, options in enumerate(requests):
        root = tmp_path / str(number)
        for name, content in encode_files(case["files"]).items():
            if name not in ("b.xml", "b.json"):  # of the same image
                (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
                (root / "set" / name).write_bytes(content)
        check_export_roundtrip(root / "set" / case.get("path", "."), root, **options)


@pytest.mark.parametrize(("name", "lawn", "box"), CASES["test_other_shapes"])
def test_other_shapes(tmp_path: Path, name: str, lawn: str, box: list[int] | None) -> None:
    source = write_scene(name, tmp_path / "set", SCENES[name]["lawn"], lawn)
    samples, summary = import_samples(source, tmp_path / "out")
    lawns = [] if box is None else [("lawn", tuple(box))]
    assert list_answers(samples) == [[*DOGS, *lawns]]
    assert ["lawn" in question for question in list_questions(samples)] == [bool(lawns)]
    assert any(note.endswith(("(skipped)", "boxes)")) for note in summary.source_notes)
    if box is None:
        with pytest.raises(UserError, match=re.escape(REASON_UNLISTED_CLASSES)):
            import_samples(source, tmp_path / "all", prompt="Locate all objects.")
        for options in ({"prompt": "Locate all of {labels}."}, {"box_task": "grounding"}):
            samples, _ = import_samples(source, tmp_path / next(iter(options)), **options)
            assert list_answers(samples) == [DOGS]


@pytest.mark.parametrize(("name", "lawn", "points"), CASES["test_points"])
def test_points(tmp_path: Path, name: str, lawn: str, points: list[Any]) -> None:
    source = write_scene(name, tmp_path / "set", SCENES[name]["lawn"], lawn)
    if name == "coco":
        text = source.read_text(encoding="utf-8").replace(
            '"name": "lawn"', '"name": "lawn", "keypoints": ["a", "b"]'
        )
        source.write_text(text, encoding="utf-8")
    if name == "yolo":
        (source / "data.yaml").write_text("names: [dog, lawn]\nkpt_shape: [3, 3]\n")
    samples, summary = import_samples(source, tmp_path / "out", box_task="points")
    assert list_answers(samples) == [[(label, 2 * tuple(xy)) for label, xy in points]]
    assert all(part.type == "point" for part in samples[0].messages[-1].content)
    (question,) = list_questions(samples)
    assert ("lawn" in question, "dog" in question) == (True, name == "yolo")
    assert not any("skipped" in note or "ignored" in note for note in summary.source_notes)


@pytest.mark.parametrize(("name", "lawn", "kind", "num_parts", "num_holes"), CASES["test_polygons"])
def test_polygons(
    tmp_path: Path, name: str, lawn: str, kind: str, num_parts: int, num_holes: int
) -> None:
    source = write_scene(name, tmp_path / "set", SCENES[name]["lawn"], lawn)
    (sample,), summary = import_samples(source, tmp_path / "out", box_task="polygons")
    assert list_questions([sample])[0].endswith("with polygons: lawn.")
    answer = json.loads(join_text(sample.messages[-1].content))
    assert [one["label"] for one in answer] == ["lawn"] * len(answer)
    found = [rotate_to_start(one["polygon_2d"]) for one in answer]
    assert found == [*map(rotate_to_start, CASES["outlines"][kind])]
    assert summary.source_notes == {
        note: count
        for note, count in (
            (NOTE_PARTS, num_parts),
            (NOTE_HOLES, num_holes),
            (NOTE_OMITTED_CLASSES, 1),
        )
        if count
    }


@pytest.mark.parametrize(("name", "lawn", "problem"), CASES["test_invalid_polygons"])
def test_invalid_polygons(tmp_path: Path, name: str, lawn: str, problem: str) -> None:
    source = write_scene(name, tmp_path / "set", SCENES[name]["lawn"], lawn)
    with pytest.raises(UserError, match=f"(?s){problem}"):
        import_samples(source, tmp_path / "out", box_task="polygons")


def test_shapes_without_polygons_are_reported(tmp_path: Path) -> None:
    polygon, kinds = (
        '"shape_type": "polygon", "points": [[0, 0], [8, 1], [9, 4]]',
        ("circle", "line"),
    )
    others = [f'"shape_type": "{kind}", "points": [[9, 9], [5, 4]]' for kind in kinds]
    lawn = '}, {"label": "tree", '.join([polygon, *others])
    source = write_scene("labelme", tmp_path / "set", SCENES["labelme"]["lawn"], lawn)
    _, summary = import_samples(source, tmp_path / "out", box_task="polygons")
    skipped = {f"shapes of type {kind} (skipped)": 1 for kind in kinds}
    assert summary.source_notes == {NOTE_OMITTED_CLASSES: 2, **skipped}
    crowd = '"category_id": 2, "segmentation": [[0, 0, 8, 1, 9, 4]]}, {"id": 9, "image_id": 1, '
    crowd += '"category_id": 1, "iscrowd": 1'
    source = write_scene("coco", tmp_path / "crowd", SCENES["coco"]["lawn"], crowd)
    _, summary = import_samples(source, tmp_path / "crowd out", box_task="polygons")
    assert summary.source_notes["crowd regions (skipped)"] == 1


def rotate_to_start(outline: list[list[float]]) -> list[list[float]]:
    """Return a closed outline from its smallest corner on."""
    start = outline.index(min(outline))
    return outline[start:] + outline[:start]


def test_polygons_are_required_and_inside_their_image(tmp_path: Path) -> None:
    source = write_scene("labelme", tmp_path / "set")
    with pytest.raises(UserError, match="without a valid box or polygon"):
        import_samples(source, tmp_path / "out", box_task="polygons")
    lawn = '"shape_type": "polygon", "points": [[44, 4], [30, 4], [30, 9]]'
    source = write_scene("labelme", tmp_path / "outside", SCENES["labelme"]["lawn"], lawn)
    with pytest.raises(UserError, match=r"the point \[44, 4\] .* outside its image"):
        import_samples(source, tmp_path / "out", box_task="polygons")
    clipped = {"box_task": "polygons", "on_invalid_box": "clip"}
    (sample,), _ = import_samples(source, tmp_path / "clipped", **clipped)
    answer = json.loads(join_text(sample.messages[-1].content))
    assert answer == [{"polygon_2d": [[40, 4], [30, 4], [30, 9]], "label": "lawn"}]
    line = lawn.replace("44", "40")
    line += '}, {"label": "lawn", "shape_type": "polygon", "points": [[1, 1], [2, 2]]'
    source = write_scene("labelme", tmp_path / "line", SCENES["labelme"]["lawn"], line)
    with pytest.raises(UserError, match="three or more points"):
        import_samples(source, tmp_path / "line out", box_task="polygons")
    (again,), _ = import_samples(source, tmp_path / "without", **clipped)
    assert again.messages[-1] == sample.messages[-1]
    line = lawn.replace("44", "40")
    line += f'}}, {{"label": "lawn", {lawn.replace("30", "50")}'
    source = write_scene("labelme", tmp_path / "stray", SCENES["labelme"]["lawn"], line)
    (again,), summary = import_samples(source, tmp_path / "stray out", **clipped)
    assert again.messages[-1] == sample.messages[-1]
    assert summary.source_notes == {NOTE_SKIPPED_BOX: 1, NOTE_OMITTED_CLASSES: 1}


def test_points_are_inside_their_image(tmp_path: Path) -> None:
    lawn = '"shape_type": "point", "points": [[44, 4]]'
    source = write_scene("labelme", tmp_path / "outside", SCENES["labelme"]["lawn"], lawn)
    with pytest.raises(UserError, match=r"the point \[44, 4\] .* outside its image"):
        import_samples(source, tmp_path / "out", box_task="points")


@pytest.mark.parametrize(
    ("description", "message"), CASES["test_keypoints_agree_with_their_declaration"]
)
def test_keypoints_agree_with_their_declaration(tmp_path: Path, description, message) -> None:
    lawn = "1 0.5 0.5 1 1 0.75 0.2 2 0 0 0 0.2 0.45 1"
    source = write_scene("yolo", tmp_path / "set", SCENES["yolo"]["lawn"], lawn)
    (source / "data.yaml").write_text(f"names: [dog, lawn]\n{description}\n")
    with pytest.raises(UserError, match=f"(?s){message}"):
        import_samples(source, tmp_path / "out", box_task="points")


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_boxes_of_a_class_with_a_crowd_are_left_out(tmp_path: Path, key: str) -> None:
    dog = SCENES["coco"]["dog"]
    source = write_scene("coco", tmp_path / "set", dog, f'{dog}, "{key}": 1')
    samples, summary = import_samples(source, tmp_path / "out")
    assert list_answers(samples) == [LAWN]
    assert samples[0].meta["classes"] == ["lawn"]
    assert summary.source_notes[NOTE_OMITTED_CLASSES] == 1
    assert summary.source_notes[NOTE_OMITTED_BOXES] == 1


@pytest.mark.parametrize("name", SCENES)
def test_stray_boxes_keep_their_class_in_the_question(tmp_path: Path, name: str) -> None:
    scene = SCENES[name]
    source = write_scene(name, tmp_path / "set", scene["dog"], scene["empty_dog"])
    with pytest.raises(UserError, match="no area"):
        import_samples(source, tmp_path / "fail")
    for number, option in enumerate(("drop", "clip", None)):
        options = {"on_invalid_box": option} if option else {"on_invalid_row": "skip"}
        samples, summary = import_samples(source, tmp_path / str(number), **options)
        assert list_answers(samples) == [[DOGS[0], *LAWN]]
        assert summary.source_notes[NOTE_SKIPPED_BOX] == 1
    source = write_scene(name, tmp_path / "wide", scene["dog"], scene["wide_dog"])
    samples, summary = import_samples(source, tmp_path / "lawn", on_invalid_box="drop")
    assert list_answers(samples) == [LAWN]
    assert samples[0].meta["classes"] == ["lawn"]
    assert summary.source_notes[NOTE_SKIPPED_BOX] == 1
    with pytest.raises(UserError, match="outside its image") as caught:
        import_samples(source, tmp_path / "fail")
    has_options = "boxes" in get_format(summary.format).supported_options
    assert ("--box-format" in caught.value.remedy) == has_options
    with pytest.raises(UserError, match="for which the question would ask"):
        import_samples(source, tmp_path / "all", on_invalid_box="drop", prompt="Find all.")


def test_images_can_be_referenced_in_export(tmp_path: Path) -> None:
    samples, _ = import_samples(write_scene("yolo", tmp_path / "set"), tmp_path / "out")
    located_sample = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    export_dataset(located_sample, tmp_path / "exported", "coco", copy_images=False)
    again, _ = import_samples(tmp_path / "exported" / LABEL_FILES["coco"], tmp_path / "again")
    assert list_answers(again) == list_answers(samples)
    assert not list((tmp_path / "exported").rglob("*.png"))


def test_image_with_only_skipped_objects_is_not_empty(tmp_path: Path) -> None:
    source = write_scene("labelme", tmp_path / "set")
    write_box_image(tmp_path / "set" / "b.png", WHITE)
    point = {"label": "dog", "shape_type": "point", "points": [[4, 5]]}
    record = {"imagePath": "b.png", "shapes": [point]}
    (tmp_path / "set" / "b.json").write_text(json.dumps(record), encoding="utf-8")
    samples, summary = import_samples(source, tmp_path / "out")
    assert [sample.id for sample in samples] == ["a"]
    assert summary.skipped_rows == {REASON_OBJECT_WITHOUT_BOX: 1}
    assert summary.source_notes == {"shapes of type point (skipped)": 1}


def test_class_question_needs_class_names(tmp_path: Path) -> None:
    source = write_scene("labelme", tmp_path / "set")
    (source / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": []}))
    with pytest.raises(UserError, match="no object of the source has a class"):
        import_samples(source, tmp_path / "out")
    samples, _ = import_samples(source, tmp_path / "out", prompt="What is there?")
    assert list_answers(samples) == [["none"]]
