"""COCO documents of instances and captions, as its data format page describes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import (
    check_export_roundtrip,
    import_samples,
    list_answers,
    list_questions,
    write_box_image,
)
from case_files import load_cases

from finesight.data.formats.image_annotations import (
    CAPTION_PROMPT,
    NOTE_OMITTED_CLASSES,
    REASON_NO_OBJECTS,
)
from finesight.data.import_source import ImportOptions, open_unvalidated
from finesight.errors import UserError

CASES = load_cases("coco")

WHITE = (12, 3, 31, 17)


def instance(number: int, image: int, category: int, bbox: list[float], **more: Any) -> Any:
    x, y, width, height = bbox
    outline = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": outline,
        "area": width * height,
        "bbox": bbox,
        "iscrowd": 0,
        **more,
    }


def instances() -> dict[str, Any]:
    """A document with every key of the format's page."""
    return {
        "info": {"year": 2017, "version": "1.0", "description": "", "url": ""},
        "licenses": [{"id": 4, "name": "Attribution", "url": ""}],
        "images": [
            {"id": 397133, "width": 40, "height": 20, "file_name": "000000397133.png"}
            | {"license": 4, "coco_url": "", "date_captured": "2013-11-14 17:02:52"},
            {"id": 37777, "width": 40, "height": 20, "file_name": "000000037777.png"},
            {"id": 252219, "width": 40, "height": 20, "file_name": "000000252219.png"},
        ],
        "annotations": [
            instance(1, 397133, 18, [12, 3, 19, 14]),
            instance(2, 397133, 1, [0.5, 0.25, 10.1, 9.7]),
            instance(3, 37777, 18, [20, 1, 5, 5]),
            instance(4, 37777, 18, [2, 1, 5, 5]),
            instance(5, 37777, 1, [0, 0, 40, 20], iscrowd=1),
        ],
        "categories": [
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        ],
    }


def instances_without_crowd() -> dict[str, Any]:
    return instances() | {"annotations": instances()["annotations"][:-1]}


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
    document = instances_without_crowd()
    document["annotations"][0]["caption"] = "A dog."
    document["annotations"][1] |= {"bbox": [5, 5, 9, 9, 30], "segmentation": []}
    document["annotations"].append({"id": 9, "image_id": 37777, "caption": "Two dogs."})
    samples, summary = import_samples(write(tmp_path / "coco", document), tmp_path / "out")
    assert list_answers(samples)[0] == [("dog", (12, 3, 31, 17))]
    assert [len(answer) for answer in list_answers(samples)] == [1, 2, 1]
    assert ["person" in question for question in list_questions(samples)] == [False, True, True]
    assert summary.source_notes["boxes of 5 values (skipped)"] == 1
    assert summary.other_keys["caption of annotations, not imported"] == 2


@pytest.mark.parametrize("ask", ["detection", "grounding"])
def test_roundtrip(tmp_path: Path, ask: str) -> None:
    source = write(tmp_path / "coco", instances_without_crowd())
    done = check_export_roundtrip(source, tmp_path, box_task=ask)
    assert done.lost_counts == {
        "questions, which an import regenerates from --prompt and --box-task": 3
    }


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


def test_caption_roundtrip(tmp_path: Path) -> None:
    check_export_roundtrip(write(tmp_path / "coco", captions()), tmp_path)


def test_grounding_of_captions_is_rejected(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", captions())
    with pytest.raises(UserError, match="grounding of captions"):
        import_samples(file, tmp_path / "out", box_task="grounding")
    with pytest.raises(UserError, match="grounding of captions"):
        list(open_unvalidated(file, ImportOptions(box_task="grounding"), tmp_path))


def test_blank_caption_is_rejected(tmp_path: Path) -> None:
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


def test_error_lists_searched_image_folders(tmp_path: Path) -> None:
    file = write(tmp_path / "coco", instances())
    (tmp_path / "coco" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="none of 3 images is found") as caught:
        import_samples(file, tmp_path / "out")
    assert str(tmp_path / "coco" / "annotations" / "images") in caught.value.expected


@pytest.mark.parametrize(("change", "what"), CASES["test_invalid_annotations_are_rejected"])
def test_invalid_annotations_are_rejected(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    document = instances()
    document["annotations"][2].update(change)
    with pytest.raises(UserError, match=what) as caught:
        import_samples(write(tmp_path / "coco", document), tmp_path / "out")
    assert "image 37777 (000000037777.png)" in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("wishes", "what"), CASES["test_invalid_prompt_templates_are_rejected"])
def test_invalid_prompt_templates_are_rejected(
    tmp_path: Path, wishes: dict[str, Any], what: str
) -> None:
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
    document["annotations"].append(instance(9, 5, 1, [1, 1, 2, 2]))
    file = write(tmp_path / "coco", document)
    _, summary = import_samples(file, tmp_path / "out")
    assert summary.detected_by.endswith("; annotations of 1 images that it does not list")
    document["categories"][2]["name"] = "dog"
    samples, _ = import_samples(write(tmp_path / "coco", document), tmp_path / "same")
    assert list_questions(samples)[0].endswith(": dog, person.")
    for kind, number in (("categories", 18), ("images", 37777)):
        document[kind][2]["id"] = number
        with pytest.raises(UserError, match=f"2 {kind} have the id {number}"):
            import_samples(write(tmp_path / "coco", document), tmp_path / "other")
        document[kind][2]["id"] = 7


def test_annotations_without_boxes_or_captions(tmp_path: Path) -> None:
    document = instances() | {"annotations": []}
    with pytest.raises(UserError, match="none with bbox or caption"):
        import_samples(write(tmp_path / "coco", document), tmp_path / "out")


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
