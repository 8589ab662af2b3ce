"""YOLO datasets as Ultralytics documents them, and those with classes.txt."""

from pathlib import Path
from typing import Any

import pytest
from box_fixtures import import_samples, list_answers, list_questions, write_box_image
from case_files import load_cases

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.ingest.formats.image_annotations import NOTE_UNLABELED
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.samples.sample import LocatedSample

CASES = load_cases("yolo")

WHITE = (12, 3, 32, 17)
# Centre 22 of 40 and 10 of 20 pixels, 20 x 14 pixels.
LINE = "1 0.55 0.5 0.5 0.7\n"
DESCRIPTION = """\
path: ../datasets/coco8 # dataset root dir
train: images/train
val: images/val
test: # optional

names:
  0: person
  1: dog
  2: red car
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout of the documentation: images and labels with a folder for each split."""
    root = tmp_path / "coco8"
    labels = {"train/a": LINE + "0 0.1 0.1 0.2 0.2\n", "train/b": "", "val/c": "2 0.5 0.5 1 1"}
    for name, text in labels.items():
        write_box_image(root / "images" / f"{name}.png", WHITE)
        file = root / "labels" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    write_box_image(root / "images" / "train" / "unlabelled.png", WHITE)
    (root / "data.yaml").write_text(DESCRIPTION, encoding="utf-8")
    return root


def test_detection(root: Path, tmp_path: Path) -> None:
    samples, summary = import_samples(root, tmp_path / "out")
    assert list_answers(samples) == [
        [("dog", (12, 3, 32, 17)), ("person", (0, 0, 8, 4))],
        ["none"],
        [("red car", (0, 0, 40, 20))],
    ]
    requested = "Locate every object of these classes in the image: person, dog, red car."
    assert list_questions(samples) == [requested] * 3
    assert [sample.meta["split"] for sample in samples] == ["train", "train", "val"]
    assert summary.detected_by == "names in data.yaml: 3 classes, images: train 3, val 1"
    assert summary.skipped_rows == {"images without a label file": 1}


def test_val_split_becomes_last_rows(root: Path, tmp_path: Path) -> None:
    write_box_image(root / "images" / "val" / "c.png", (0, 0, 3, 3))
    import_dataset(root, tmp_path / "out", ImportOptions(eval_last=1))
    assert '"val"' in (tmp_path / "out" / "eval.jsonl").read_text(encoding="utf-8")
    assert '"val"' not in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8")


def test_flat_folder_with_classes_txt(tmp_path: Path) -> None:
    root = tmp_path / "set"
    write_box_image(root / "a.png", WHITE)
    line = LINE.replace("1", "2", 1)
    (root / "a.txt").write_text(line, encoding="utf-8")
    (root / "classes.txt").write_text("person\n\ndog\n\n", encoding="utf-8")
    samples, summary = import_samples(root, tmp_path / "out")
    assert list_answers(samples) == [[("dog", WHITE)]]
    assert summary.detected_by.startswith("label files with class IDs, classes.txt")
    (root / "a.txt").write_text(f"{line}{line}dog here\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.txt:3: .dog here."):
        import_samples(root, tmp_path / "broken")
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"class IDs, such as .2 0\.55 "):
        import_samples(root, tmp_path / "other")


def test_roboflow_relative_paths(root: Path, tmp_path: Path) -> None:
    """As Roboflow writes them: ../train/images beside a folder train."""
    (root / "images").rename(root / "train")
    (root / "train" / "train").rename(root / "train" / "images")
    (root / "labels" / "train").rename(root / "train" / "labels")
    text = "train: ../train/images\nnc: 3\nnames: ['person', 'dog', 'red car']\n"
    (root / "data.yaml").write_text(text, encoding="utf-8")
    samples, _ = import_samples(root / "data.yaml", tmp_path / "out")
    assert list_answers(samples)[0][0] == ("dog", WHITE)


def test_polygons_and_keypoints(root: Path, tmp_path: Path) -> None:
    labels = root / "labels" / "train" / "a.txt"
    labels.write_text("0 0.3 0.15 0.8 0.5 0.4 0.85\n", encoding="utf-8")
    samples, summary = import_samples(root, tmp_path / "outline")
    assert list_answers(samples)[0] == [("person", WHITE)]
    assert summary.source_notes == {"polygons (converted to bounding boxes)": 1}
    labels.write_text("0 0.55 0.5 0.5 0.7 0.3 0.2 2 0.1 0.1 1\n", encoding="utf-8")
    description = DESCRIPTION + "kpt_shape: [2, 3]\n"
    (root / "data.yaml").write_text(description, encoding="utf-8")
    samples, summary = import_samples(root, tmp_path / "pose")
    assert list_answers(samples)[0] == [("person", WHITE)]
    assert summary.source_notes == {"keypoints (ignored)": 1}
    labels.write_text("0 0.55 0.5 0.5 0.7 0.3 0.2 2 0.1 0.1 0\n", encoding="utf-8")
    (labels.parent / "z.txt").write_text(LINE, encoding="utf-8")
    _, summary = import_samples(root, tmp_path / "points", box_task="points")
    assert summary.source_notes[NOTE_UNLABELED] == 1
    assert summary.detected_by.endswith("; 1 .txt files of no listed image, not read")


@pytest.mark.parametrize(
    ("kind", "lines"), [(kind, one) for kind, many in CASES["shapes"].items() for one in many]
)
def test_keypoints_without_declared_shape(root: Path, tmp_path: Path, kind, lines) -> None:
    (root / "labels" / "val" / "c.txt").write_text("", encoding="utf-8")
    (root / "labels" / "train" / "a.txt").write_text(lines, encoding="utf-8")
    samples, summary = import_samples(root, tmp_path / "out")
    (note,) = summary.source_notes
    assert note.partition(" ")[0] == kind
    assert summary.source_notes[note] == len(lines.splitlines())
    if kind == "values":
        centers = [float(line.split()[1]) * 40 for line in lines.splitlines()]
        found = [(x1 + x2) / 2 for _, (x1, _, x2, _) in list_answers(samples)[0]]
        assert sorted(found) == pytest.approx(sorted(centers))


@pytest.mark.parametrize(("line", "what"), CASES["test_invalid_lines"])
def test_invalid_lines(root: Path, tmp_path: Path, line: str, what: str) -> None:
    (root / "labels" / "train" / "a.txt").write_text(LINE + line, encoding="utf-8")
    with pytest.raises(UserError, match=what) as caught:
        import_samples(root, tmp_path / "out")
    assert caught.value.remedy


def test_declared_pixels(root: Path, tmp_path: Path) -> None:
    for name, text in (("train/a", "1 22 10 20 14"), ("val/c", "2 10 10 20 20")):
        (root / "labels" / f"{name}.txt").write_text(text, encoding="utf-8")
    samples, _ = import_samples(root, tmp_path / "out", box_units="pixel")
    assert list_answers(samples)[0] == [("dog", WHITE)]


@pytest.mark.parametrize(("change", "what"), CASES["test_invalid_data_yaml"])
def test_invalid_data_yaml(root: Path, tmp_path: Path, change: dict[str, str], what: str) -> None:
    text = DESCRIPTION
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    (root / "data.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=what) as caught:
        import_samples(root, tmp_path / "out")
    assert "data.yaml" in caught.value.where


def test_export_needs_images_inside_folder(root: Path, tmp_path: Path) -> None:
    samples, _ = import_samples(root, tmp_path / "out")
    located_samples = [LocatedSample(sample, tmp_path / "out") for sample in samples]
    with pytest.raises(UserError, match="outside the output folder") as caught:
        export_dataset(located_samples, tmp_path / "exported", "yolo", copy_images=False)
    assert "--copy-images" in caught.value.remedy


def test_unrelated_yaml_is_ignored(tmp_path: Path) -> None:
    write_box_image(tmp_path / "set" / "a.png", WHITE)
    (tmp_path / "set" / "a.txt").write_text("A dog.", encoding="utf-8")
    (tmp_path / "set" / "recipe.yaml").write_text("train: {epochs: 2}", encoding="utf-8")
    output: dict[str, Any] = {"prompt": "What?"}
    assert import_samples(tmp_path / "set", tmp_path / "out", **output)[1].format == "folder"
