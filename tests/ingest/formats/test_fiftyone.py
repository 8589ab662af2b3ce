"""FiftyOne datasets, and exported files that the readers of labeling tools read."""

import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import import_samples, list_answers, write_box_image, write_scene

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.samples.sample import BoxPart, LocatedSample, Sample

WHITE = (12, 3, 32, 17)
BOX = {"label": "dog", "bounding_box": [0.3, 0.15, 0.5, 0.7]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_box_image(tmp_path / "set" / "data" / "sub" / "a.b.png", WHITE)
    write_box_image(tmp_path / "set" / "data" / "b.png", WHITE)
    return tmp_path / "set"


def write_labels(root: Path, labels: dict[str, Any], classes: list[str] | None = None) -> Path:
    (root / "labels.json").write_text(json.dumps({"classes": classes, "labels": labels}))
    return root


def test_detection(root: Path, tmp_path: Path) -> None:
    boxes = [{**BOX, "confidence": 0.9, "attributes": {"age": 2}}, {**BOX, "label": "lawn"}]
    source = write_labels(root, {"sub/a.b": boxes, "b": None})
    samples, summary = import_samples(source, tmp_path / "out")
    assert list_answers(samples) == [[("dog", WHITE), ("lawn", WHITE)]]
    assert samples[0].meta["boxes"] == [{"age": 2}, {}]
    assert summary.skipped_rows == {"images without a label": 1}
    assert import_samples(root / "labels.json", tmp_path / "again")[1].format == "fiftyone"


def test_points_are_required(tmp_path: Path) -> None:
    source = write_scene("fiftyone", tmp_path / "set")
    with pytest.raises(UserError, match="no points in the annotations"):
        import_samples(source, tmp_path / "out", box_task="points")


def test_classification(root: Path, tmp_path: Path) -> None:
    labels = {"sub/a.b": 1, "b": {"label": "cat", "confidence": 0.5}}
    source = write_labels(root, labels, ["cat", "dog"])
    samples, summary = import_samples(source, tmp_path / "out")
    assert list_answers(samples) == [["dog"], ["cat"]]
    assert summary.other_keys == {"confidence of labels, not imported": 1}
    several = write_labels(root, {"b": ["cat", {"label": "dog"}]})
    assert list_answers(import_samples(several, tmp_path / "several")[0]) == [["cat, dog"]]


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ({"b": [{**BOX, "label": 7}]}, "the label"),
        ({"b": [{**BOX, "bounding_box": [0.3, 0.15, 0.5]}]}, "the box"),
        ({"b": [{**BOX, "bounding_box": [0.8, 0.15, 0.5, 0.7]}]}, "outside its image"),
        ({"missing": [BOX]}, "no such image"),
    ],
)
def test_invalid_labels(root: Path, tmp_path: Path, labels: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        import_samples(write_labels(root, labels), tmp_path / "out")


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("cat", "labels without a box"),
        ({"label": "cat"}, "labels without a box"),
        ({"label": "cat", "bounding_box": []}, "labels without a box"),
        ({"label": "cat", "bounding_box": [0.1, 0.1, 0.2, 0.2, 30]}, "boxes of 5 values"),
    ],
)
def test_label_without_a_box_does_not_fail_its_image(root, tmp_path, item, kind):
    source = write_labels(root, {"b": [BOX, item]}, ["dog", "cat"])
    samples, summary = import_samples(source, tmp_path / "out")
    assert samples[0].meta["classes"] == ["dog"]
    assert summary.source_notes[f"{kind} (skipped)"] == 1


def read_with_pycocotools(folder: Path) -> list[Any]:
    coco = pytest.importorskip("pycocotools.coco").COCO(folder / "annotations.json")
    boxes = [one["bbox"] for one in coco.loadAnns(coco.getAnnIds())]
    return [(x, y, x + width, y + height) for x, y, width, height in boxes]


def test_exported_boxes_are_read_by_pycocotools(root: Path, tmp_path: Path) -> None:
    samples, _ = import_samples(write_labels(root, {"b": [BOX]}), tmp_path / "out")
    odd = (0.125, 1 / 3, 39.99, 20.0)
    message = samples[0].messages[-1]
    boxes = (*message.content, BoxPart(image=0, label="lawn", xyxy=odd))
    answer = message.model_copy(update={"content": boxes})
    sample = Sample(id="b", messages=(*samples[0].messages[:-1], answer))
    located_samples = [LocatedSample(sample, tmp_path / "out")]
    export_dataset(located_samples, tmp_path / "exported", "coco", copy_images=True)
    found = read_with_pycocotools(tmp_path / "exported")
    for mine, expected in zip(sorted(found), [odd, WHITE], strict=True):
        assert mine == pytest.approx(expected, abs=0.01)
