"""Previews of an import: right samples or the reason, without any file."""

import json
from pathlib import Path

import pytest
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.mapping_format import load_mapping_format
from finesight.ingest.preview import ImportPreview, preview_import
from finesight.samples.sample import join_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with six images."""
    for number in range(6):
        write_gray_image(tmp_path / f"{number}.png", 40, 20, gray_level=number)
    return tmp_path


def preview(path: Path, **options: object) -> ImportPreview:
    embedded = path.parent / "embedded"
    embedded.mkdir(exist_ok=True)
    return preview_import(path, ImportOptions(prompt="", **options), embedded)


def list_answers(found: ImportPreview) -> list[str]:
    return [join_text(sample.messages[-1].content) for sample in found.samples]


def list_roles(found: ImportPreview) -> dict[str, str]:
    return {key.path: key.role for key in found.keys}


def test_table_with_two_value_columns(folder):
    lines = ["file,category,color", *(f"{n}.png,cup {n},red" for n in range(6))]
    (folder / "rows.csv").write_text("\n".join(lines))
    found = preview(folder / "rows.csv", columns={"image": "file", "fields": "category,color"})
    assert not found.is_blocked
    assert found.num_rows == 6
    assert list_roles(found) == {"file": "image", "category": "fields", "color": "fields"}
    assert json.loads(list_answers(found)[4]) == {"category": "cup 4", "color": "red"}
    assert len(found.samples) == 5
    assert sorted(path.name for path in folder.iterdir() if path.suffix == "") == ["embedded"]


def test_columns_without_a_role_are_shown_with_samples(folder):
    (folder / "rows.csv").write_text("file,caption,license\n0.png,a cup,CC0\n1.png,a jug,CC0\n")
    found = preview(folder / "rows.csv")
    assert found.is_blocked
    assert "license" in str(found.problem)
    assert list_roles(found) == {"file": "image", "caption": "answer", "license": ""}
    assert list_answers(found) == ["a cup", "a jug"]


def test_files_of_single_images_list_their_paths(folder):
    data = folder / "forms"
    data.mkdir()
    for number in range(2):
        write_gray_image(data / f"{number}.png", 40, 20)
        content = {"fields": {"name": f"Ann {number}"}, "scanner": "S1"}
        (data / f"{number}.json").write_text(json.dumps(content))
    found = preview(data)
    assert found.is_blocked
    assert list(list_roles(found)) == ["image", "fields.name", "scanner"]


def test_nested_records_list_their_paths(folder):
    records = [{"file": "0.png", "size": 20, "qa": [{"q": "How many?", "a": "Two."}]}]
    (folder / "rows.json").write_text(json.dumps(records))
    found = preview(folder / "rows.json")
    assert found.is_blocked
    assert not found.samples
    assert [*list_roles(found)] == ["file", "size", "qa.*.q", "qa.*.a"]
    text = "version: 1\nsample: qa\nimages: $.file\nquestion: q\nanswer: a\nmeta: [$.size]\n"
    (folder / "m.yaml").write_text(text)
    mapped = preview(folder / "rows.json", mapping=load_mapping_format(folder / "m.yaml"))
    assert not mapped.is_blocked
    roles = {"file": "images", "size": "meta", "qa.*.q": "question", "qa.*.a": "answer"}
    assert list_roles(mapped) == roles
    assert list_answers(mapped) == ["Two."]


def test_coco_file(folder):
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 20} for n in range(6)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 9, 8]} for n in range(6)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "coco.json").write_text(json.dumps(document))
    found = preview(folder / "coco.json")
    assert not found.is_blocked
    assert len(found.samples) == 5
    assert found.samples[0].messages[-1].content[0].xyxy == (1, 2, 10, 10)


def test_first_error_of_a_row_is_the_problem(folder):
    (folder / "rows.csv").write_text("image,answer\nmissing.png,a\n0.png,b\n")
    found = preview(folder / "rows.csv")
    assert not found.is_blocked
    assert list_answers(found) == ["b"]
    assert "missing.png" in str(found.problem)
    (folder / "rows.csv").write_text("image,answer\nmissing.png,a\n")
    assert preview(folder / "rows.csv").is_blocked


def test_source_without_records_is_an_error(folder):
    (folder / "rows.csv").write_bytes(b"a,b\n1,2,3\n")
    with pytest.raises(UserError, match="more or fewer cells"):
        preview(folder / "rows.csv")
