"""COCO documents of instances and captions, as its data format page describes them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import import_samples, list_answers, list_questions, write_box_image
from case_files import load_cases

from finesight.errors import UserError
from finesight.ingest.formats.image_annotations import (
    CAPTION_PROMPT,
    NOTE_OMITTED_CLASSES,
    REASON_NO_OBJECTS,
)
from finesight.ingest.import_source import ImportOptions, open_unvalidated
from finesight.ingest.mapping_draft import detect_roles

CASES = load_cases("coco")

WHITE = (12, 3, 31, 17)


def instances() -> dict[str, Any]:
    return copy.deepcopy(CASES["instances"])


def write(
    root: Path, document: dict[str, Any], location: str = "annotations/instances.json"
) -> Path:
    """Write the document, and its images to `images` beside its folder."""
    for image in document["images"]:
        write_box_image(root / "images" / image["file_name"], WHITE)
    file = root / location
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


def test_detection(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", instances())
    samples, summary = import_samples(file, tmp_path / "out")
    assert list_answers(samples) == [
        [("dog", (12, 3, 31, 17)), ("person", (0.5, 0.25, 10.6, 9.95))],
        [("dog", (2, 1, 7, 6)), ("dog", (20, 1, 25, 6))],
        ["none"],
    ]
    requested = "Locate every object of these classes in the image: dog, {}toothbrush."
    assert list_questions(samples) == [requested.format(n) for n in ("person, ", "", "person, ")]
    assert samples[0].id == "000000397133"
    assert samples[0].meta["image_id"] == 397133
    assert samples[0].meta["license"] == 4
    assert summary.format == "coco"
    assert "annotations with bbox: COCO instances of 3 classes" in summary.detected_by
    assert summary.source_notes == {
        "crowd regions (skipped)": 1,
        "segmentation (ignored)": 4,
        NOTE_OMITTED_CLASSES: 1,
    }
    assert summary.other_keys["supercategory of categories, not imported"] == 3
    samples, summary = import_samples(file, tmp_path / "grounding", box_task="grounding")
    assert list_questions(samples)[0] == "Locate every dog in the image."
    assert summary.skipped_rows == {REASON_NO_OBJECTS: 1}
    images = [
        image | {"coco_url": f"http://images.org/{image['file_name']}", "file_name": None}
        for image in instances()["images"]
    ]
    file.write_text(json.dumps({**instances(), "images": images, "contributors": ["J"]}))
    again, summary = import_samples(file, tmp_path / "lvis", box_task="grounding")
    assert list_answers(again) == list_answers(samples)
    assert summary.other_keys["contributors of files, not imported"] == 1


def test_captions_and_boxes_of_five_values_are_counted(tmp_path: Path) -> None:
    document = instances()
    del document["annotations"][-1]
    document["annotations"][0]["caption"] = "A dog."
    document["annotations"][1] |= {"bbox": [5, 5, 9, 9, 30], "segmentation": []}
    document["annotations"].append({"id": 9, "image_id": 37777, "caption": "Two dogs."})
    samples, summary = import_samples(write(tmp_path / "coco", document), tmp_path / "out")
    assert list_answers(samples)[0] == [("dog", (12, 3, 31, 17))]
    assert [len(answer) for answer in list_answers(samples)] == [1, 2, 1]
    assert ["person" in question for question in list_questions(samples)] == [False, True, True]
    assert summary.source_notes["boxes of 5 values (skipped)"] == 1
    assert summary.other_keys["caption of annotations, not imported"] == 2


@pytest.mark.parametrize(
    ("level", "key", "value"),
    [
        ("annotations", "utf8_string", "EXIT"),
        ("annotations", "sentences", ["the dog on the left"]),
        ("annotations", "sentences", [{"raw": "the dog on the left"}]),
        ("annotations", "attributes", {"occluded": False, "text": "EXIT"}),
        ("images", "question", "Where is the dog?"),
        ("images", "Caption", "A dog."),
    ],
)
def test_texts_beside_boxes_need_consent(
    tmp_path: Path, level: str, key: str, value: object
) -> None:
    document = instances()
    document[level][0][key] = value
    file = write(tmp_path / "coco", document)
    with pytest.raises(UserError, match="have texts, which a detection dataset") as caught:
        detect_roles(file, ImportOptions(), tmp_path / "out")
    assert key in caught.value.what
    assert "--format coco" in str(caught.value.remedy)
    detected = detect_roles(file, ImportOptions(format="coco"), tmp_path / "out")
    assert detected.options.format == "coco"


def test_names_and_numbers_beside_boxes_need_no_consent(tmp_path: Path) -> None:
    document = instances()
    document["annotations"][0] |= {"text": "", "caption": 7, "iscrowd": 0}
    document["images"][0]["coco_url"] = "https://images.example/1.jpg"
    file = write(tmp_path / "coco", document)
    detected = detect_roles(file, ImportOptions(), tmp_path / "out")
    assert detected.proposal is None


def test_another_document_with_annotations_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "pages.json"
    file.write_text(json.dumps({"info": {}, "annotations": [{"page": "a", "lines": []}]}))
    with pytest.raises(UserError, match="cannot be detected from rows with the keys page, lines"):
        detect_roles(file, ImportOptions(), tmp_path / "out")


def captions() -> dict[str, Any]:
    document = instances()
    del document["categories"]
    document["annotations"] = [
        {"id": 1, "image_id": 37777, "caption": "A kitchen with a table."},
        {"id": 2, "image_id": 397133, "caption": "A man in a kitchen.\n"},
        {"id": 3, "image_id": 397133, "caption": "Someone cooks."},
    ]
    return document


def test_captions_of_an_image_answer_one_question(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", captions())
    samples, summary = import_samples(file, tmp_path / "out")
    assert list_answers(samples) == [
        ["A man in a kitchen."],
        ["Someone cooks."],
        ["A kitchen with a table."],
    ]
    assert list_questions(samples) == [CAPTION_PROMPT] * 3
    assert "COCO captions" in summary.detected_by
    assert summary.skipped_rows == {"images without a caption": 1}


def test_grounding_of_captions_and_blank_captions_are_rejected(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", captions())
    with pytest.raises(UserError, match="grounding of captions"):
        import_samples(file, tmp_path / "out", box_task="grounding")
    with pytest.raises(UserError, match="grounding of captions"):
        list(open_unvalidated(file, ImportOptions(box_task="grounding"), tmp_path))
    document = captions()
    document["annotations"][0]["caption"] = " "
    with pytest.raises(UserError, match="annotation 1 has the caption ' '"):
        import_samples(write(tmp_path / "coco", document), tmp_path / "out")


def test_missing_image_gives_unvalidated_row(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", instances())
    (tmp_path / "coco" / "images" / "000000037777.png").unlink()
    with pytest.raises(UserError, match="no such image"):
        import_samples(file, tmp_path / "out")
    drafts = list(open_unvalidated(file, ImportOptions(), tmp_path))
    assert [len(one.samples) for one in drafts] == [1, 1, 1]
    assert [len(one.boxes) for one in drafts] == [2, 2, 0]


def test_document_names_the_image_folder(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    file = write(root, instances(), "annotations/instances_val2017.json")
    (root / "images").rename(root / "val2017")
    for image in (root / "val2017").iterdir():
        write_box_image(root / "train2017" / image.name, (0, 0, 1, 1))
    _, summary = import_samples(file, tmp_path / "out")
    assert summary.detected_by.endswith(f"images in {root / 'val2017'}")
    file.rename(file.with_name("instances.json"))
    with pytest.raises(UserError, match="are in 2 folders") as caught:
        import_samples(file.with_name("instances.json"), tmp_path / "other")
    assert str(root / "train2017") in caught.value.expected
    shutil.rmtree(root / "train2017")
    (root / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="none of 3 images is found") as caught:
        import_samples(file.with_name("instances.json"), tmp_path / "other")
    assert str(root / "annotations" / "images") in caught.value.expected


@pytest.mark.parametrize("case", CASES["test_invalid_annotations_are_rejected"])
def test_invalid_annotations_are_rejected(tmp_path, case):
    change, what, *task = case
    document = instances()
    document["annotations"][2].update(change)
    wishes = {"box_task": task[0]} if task else {}
    with pytest.raises(UserError, match=what) as caught:
        import_samples(write(tmp_path / "coco", document), tmp_path / "out", **wishes)
    assert "image 37777 (000000037777.png)" in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("wishes", "what"), CASES["test_invalid_prompt_templates_are_rejected"])
def test_invalid_prompt_templates_are_rejected(tmp_path, wishes, what):
    with pytest.raises(UserError, match=what) as caught:
        import_samples(write(tmp_path / "coco", instances()), tmp_path / "out", **wishes)
    assert caught.value.where == "--prompt"
    assert "braces" in caught.value.remedy


def test_doubled_braces_are_literal(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", instances())
    samples, _ = import_samples(file, tmp_path / "out", prompt='Find. {{"box": []}}')
    assert list_questions(samples)[0] == 'Find. {"box": []}'
    assert "classes" not in samples[0].meta


def test_unlisted_and_duplicate_image_ids(tmp_path: Path) -> None:
    document = instances()
    document["annotations"].append(document["annotations"][0] | {"id": 9, "image_id": 5})
    file = write(tmp_path / "coco", document)
    _, summary = import_samples(file, tmp_path / "out")
    assert summary.detected_by.endswith("; annotations of 1 images that it does not list")
    for one in document["annotations"]:  # as pandas writes them
        one |= {"image_id": float(one["image_id"]), "category_id": float(one["category_id"])}
    samples, _ = import_samples(write(tmp_path / "coco", document), tmp_path / "floats")
    assert [len(answer) for answer in list_answers(samples)] == [2, 2, 1]
    others = [one | {"image_id": one["image_id"] + 0.5} for one in document["annotations"]]
    file = write(tmp_path / "others", {**document, "annotations": others})
    with pytest.raises(UserError, match="no annotation has the image_id of an image"):
        import_samples(file, tmp_path / "other")
    document["categories"][2]["name"] = "dog"
    samples, _ = import_samples(write(tmp_path / "coco", document), tmp_path / "same")
    assert list_questions(samples)[0].endswith(": dog, person.")
    for kind, number in (("categories", 18), ("images", 37777)):
        document[kind][2]["id"] = number
        with pytest.raises(UserError, match=f"2 {kind} have the id {number}"):
            import_samples(write(tmp_path / "coco", document), tmp_path / "other")
        document[kind][2]["id"] = 7
    document["annotations"] = []
    with pytest.raises(UserError, match="none with bbox or caption"):
        import_samples(write(tmp_path / "coco", document), tmp_path / "other")


def test_windows_paths_and_unnamed_category(tmp_path: Path) -> None:
    write_box_image(tmp_path / "set" / "inner" / "a.png", (12, 3, 32, 17))
    document = {
        "images": [{"id": 1, "file_name": "inner\\a.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [12, 3, 20, 14]}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": " "}],
    }
    (tmp_path / "set" / "set.json").write_text(json.dumps(document), encoding="utf-8")
    samples, _ = import_samples(tmp_path / "set" / "set.json", tmp_path / "out")
    assert list_answers(samples) == [[("dog", (12, 3, 32, 17))]]
    assert list_questions(samples) == ["Locate every object of these classes in the image: dog."]
