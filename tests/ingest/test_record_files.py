"""Folders with a JSON file for each image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions, open_source
from finesight.ingest.importer import import_dataset
from finesight.ingest.mapping import parse_mapping
from finesight.ingest.mapping_draft import check_proposal, detect_roles
from finesight.ingest.mapping_format import build_mapping_format
from finesight.ingest.record_files import open_record_files
from finesight.ingest.row_reader import Record
from finesight.ingest.source_fetch import fetch_source
from finesight.samples.sample import read_samples

MAPPING = {
    "version": 1,
    "images": "image",
    "question": {"const": "Which plant is it?"},
    "answer": "plant.name",
    "meta": ["plant.height"],
}


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (90, 120, 30)).save(path)


def write_record(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_plants(folder: Path, images: str, labels: str, suffix: str = ".json") -> None:
    for name, height in {"fern": 30, "moss": 2}.items():
        write_image(folder / images / f"{name}.png")
        content = {"plant": {"name": name, "height": height}}
        write_record(folder / labels / f"{name}{suffix}", content)


def list_records(source: Path) -> list[Record]:
    rows = open_record_files(source)
    assert rows is not None
    return [row.record for row in rows.iter_range(0, rows.num_rows)]


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [
        ("", "", ".json"),
        ("", "", ".png.json"),
        ("images", "labels", ".json"),
        ("images/train", "labels/train", ".txt"),
    ],
)
def test_the_object_of_an_image_has_its_name(
    tmp_path: Path, images: str, labels: str, suffix: str
) -> None:
    write_plants(tmp_path, images, labels, suffix)
    records = list_records(tmp_path)
    assert [Path(record["image"]).name for record in records] == ["fern.png", "moss.png"]
    assert [record["plant"]["height"] for record in records] == [30, 2]


def test_images_outside_of_the_folder_are_not_used(tmp_path: Path) -> None:
    write_plants(tmp_path, "images", "labels")
    assert open_record_files(tmp_path / "labels") is None


@pytest.mark.parametrize("own", ["fern.png", "../images/fern.png", "C:\\scans\\fern.png"])
def test_the_name_of_the_image_in_the_object_becomes_its_path(tmp_path: Path, own: str) -> None:
    write_image(tmp_path / "images" / "fern.png")
    write_record(tmp_path / "labels" / "fern.json", {"image": own})
    assert list_records(tmp_path) == [{"image": str(tmp_path / "images" / "fern.png")}]


@pytest.mark.parametrize("own", ["other.png", {"width": 40}])
def test_something_else_under_image_is_not_replaced(tmp_path: Path, own: object) -> None:
    write_image(tmp_path / "fern.png")
    write_record(tmp_path / "fern.json", {"image": own})
    assert list_records(tmp_path) == [{"image_file": str(tmp_path / "fern.png"), "image": own}]


def test_other_files_and_folders_are_named(tmp_path: Path) -> None:
    write_plants(tmp_path, "train", "train")
    write_image(tmp_path / "test" / "reed.png")
    write_record(tmp_path / "test" / "reed.json", {"plant": {"name": "reed", "height": 9}})
    write_image(tmp_path / "spruce.png")
    write_record(tmp_path / "about.json", {"license": "CC0"})
    rows = open_record_files(tmp_path)
    assert rows is not None
    assert rows.text_format == (
        "3 images with a JSON file of the same name, in 2 folders: test, train;"
        " other files, not read: 1 .json, 1 .png"
    )


def test_an_archive_of_the_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "plants"
    for name in ("fern", "moss"):
        write_image(folder / "images" / f"{name}.png")
        write_record(folder / "labels" / f"{name}.json", {"question": "Which?", "answer": name})
    shutil.make_archive(str(folder), "zip", folder)
    out = tmp_path / "out"
    with fetch_source(str(tmp_path / "plants.zip"), out, ImportOptions()) as fetched:
        detected = detect_roles(fetched.path, fetched.options, out)
        samples = import_folder(detected.path, out, detected.options)
    assert [sample.messages[-1].content[0].text for sample in samples] == ["fern", "moss"]


@pytest.mark.parametrize("content", ["a fern", "[1, 2]", ""])
def test_texts_and_lists_are_no_objects(tmp_path: Path, content: str) -> None:
    write_image(tmp_path / "fern.png")
    (tmp_path / "fern.txt").write_text(content)
    assert open_record_files(tmp_path) is None


def test_two_objects_of_an_image_are_an_error(tmp_path: Path) -> None:
    write_plants(tmp_path, "images", "labels")
    write_record(tmp_path / "other" / "fern.json", {"color": "green"})
    with pytest.raises(UserError, match="two JSON files of the image fern") as caught:
        open_record_files(tmp_path)
    assert str(tmp_path / "other" / "fern.json") in str(caught.value.remedy)
    shutil.rmtree(tmp_path / "other")
    assert len(list_records(tmp_path)) == 2


def test_two_images_of_an_object_are_an_error(tmp_path: Path) -> None:
    write_plants(tmp_path, "images", "labels")
    write_image(tmp_path / "masks" / "fern.png")
    with pytest.raises(UserError, match="several images may belong to the file"):
        open_record_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1, "a": 2}', "not valid JSON"),
        ('{"a": ', "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("[" * 600, None),
    ],
)
def test_broken_objects_are_invalid_rows(
    tmp_path: Path, content: str, expected: str | None
) -> None:
    write_plants(tmp_path, "", "")
    (tmp_path / "moss.json").write_text(content)
    if expected is None:
        assert len(list_records(tmp_path)) == 1
        return
    with pytest.raises(UserError, match=expected) as caught:
        list_records(tmp_path)
    assert str(tmp_path / "moss.json") in str(caught.value)


def import_folder(source: Path, out: Path, options: ImportOptions) -> list[Any]:
    import_dataset(source, out, options)
    return list(read_samples(out / "data.jsonl"))


def test_a_mapping_reads_the_objects(tmp_path: Path) -> None:
    write_plants(tmp_path / "plants", "images", "labels")
    mapping = build_mapping_format(parse_mapping(MAPPING, "mapping"), "plants")
    samples = import_folder(tmp_path / "plants", tmp_path / "out", ImportOptions(mapping=mapping))
    assert [sample.messages[-1].content[0].text for sample in samples] == ["fern", "moss"]
    assert [sample.meta["height"] for sample in samples] == [30, 2]


def test_values_without_a_role_need_consent(tmp_path: Path) -> None:
    write_plants(tmp_path / "plants", "images", "labels")
    with pytest.raises(UserError) as caught:
        detect_roles(tmp_path / "plants", ImportOptions(), tmp_path / "out")
    draft = tmp_path / "out-mapping.yaml"
    assert str(draft) in str(caught.value.remedy)
    assert "plant.height: 30" in draft.read_text()


def test_known_names_are_roles(tmp_path: Path) -> None:
    write_image(tmp_path / "plants" / "fern.png")
    content = {"question": "Which plant?", "answer": "fern"}
    write_record(tmp_path / "plants" / "fern.json", content)
    detected = detect_roles(tmp_path / "plants", ImportOptions(), tmp_path / "out")
    check_proposal(detected, tmp_path / "out")
    (sample,) = import_folder(detected.path, tmp_path / "out", detected.options)
    assert sample.messages[-1].content[0].text == "fern"


STEPS: dict[str, Any] = {
    "version": 1,
    "sample": "steps",
    "images": {"template": "screens/{screen}"},
    "question": "$.goal",
    "answer": "action",
}


def write_episodes(folder: Path) -> None:
    """Write two files of an episode each, and the screenshots that they name."""
    for name in ("a", "b"):
        steps = [{"screen": f"{name}_{number}.png", "action": f"tap {name}"} for number in (0, 1)]
        write_record(folder / "episodes" / f"{name}.json", {"goal": f"Open {name}", "steps": steps})
        for step in steps:
            write_image(folder / "screens" / step["screen"])


def test_objects_without_an_image_of_their_own_are_records_of_a_mapping(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    mapping = build_mapping_format(parse_mapping(STEPS, "mapping"), "steps")
    samples = import_folder(tmp_path, tmp_path / "out", ImportOptions(mapping=mapping))
    answers = [sample.messages[-1].content[0].text for sample in samples]
    assert answers == ["tap a", "tap a", "tap b", "tap b"]
    with pytest.raises(UserError, match="a folder without a known dataset format"):
        open_source(tmp_path, ImportOptions())


def test_rows_of_a_document_are_no_rows_of_a_folder(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    roles = {"version": 1, "rows": "steps", "images": "screen", "answer": "action"}
    mapping = build_mapping_format(parse_mapping(roles, "mapping"), "steps")
    with pytest.raises(UserError, match="names steps of one document") as caught:
        open_source(tmp_path, ImportOptions(mapping=mapping))
    assert "write sample: steps instead of rows" in str(caught.value)


def test_the_nearest_image_belongs_to_an_object(tmp_path: Path) -> None:
    for split in ("first", "second"):
        write_image(tmp_path / split / "img" / "a.png")
        write_record(tmp_path / split / "ann" / "a.json", {"answer": split})
    records = list_records(tmp_path)
    for record, split in zip(records, ("first", "second"), strict=True):
        assert record == {"image": str(tmp_path / split / "img" / "a.png"), "answer": split}


def test_drawings_below_an_object_are_no_nearest_image(tmp_path: Path) -> None:
    write_record(tmp_path / "json" / "a.json", {"answer": "x"})
    write_image(tmp_path / "json" / "drawn" / "a.png")
    write_image(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="several images may belong to the file"):
        open_record_files(tmp_path)


def test_a_mapping_reads_objects_with_and_without_an_image(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    write_image(tmp_path / "screens" / "a.png")  # has the name of an episode by chance
    rows = open_record_files(tmp_path, needs_images=False)
    assert rows is not None
    assert rows.num_rows == 2
    assert "2 JSON files, 1 image with a JSON file of the same name" in rows.text_format
    assert "other files, not read" in rows.text_format


def test_other_files_beside_the_objects_of_a_mapping(tmp_path: Path) -> None:
    write_episodes(tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert open_record_files(tmp_path) is None
    rows = open_record_files(tmp_path, needs_images=False)
    assert rows is not None
    assert rows.num_rows == 2
