"""Mappings with tables: rows of a document or of other files in the records that refer to them."""

import csv
import gzip
import json
import os
import random
import sqlite3
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_gray_image
from mapping_fixtures import build_context, mutate_record, summarize_example
from mutations import mutated_bytes, mutated_value

from finesight.errors import UserError
from finesight.ingest import joined_tables, json_stream
from finesight.ingest.explanation import explain_row
from finesight.ingest.formats.dataset_format import ImportContext
from finesight.ingest.import_source import ImportOptions, ImportSource, open_source
from finesight.ingest.importer import import_dataset
from finesight.ingest.mapping import parse_mapping, write_schema
from finesight.ingest.mapping_format import build_mapping_format
from finesight.ingest.preview import preview_import

DOCUMENT: dict[str, Any] = {
    "info": {"year": 2031},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 400, "height": 200},
        {"id": 8, "file_name": "b.png", "width": 1000, "height": 500},
        {"id": 9, "file_name": "a.png", "width": 400, "height": 200},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 40]},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [11, 20, 30, 40]},
    ],
    "categories": [
        {"id": 1, "name": "cup", "supercategory": "dish"},
        {"id": 2, "name": "pan", "supercategory": "dish"},
    ],
}

BOXES = {"from": "annotations", "group": "image_id", "by": "id"}
CATEGORY = {"from": "categories", "key": "id", "by": "boxes.*.category_id"}

ROLES: dict[str, Any] = {
    "rows": "images",
    "tables": {"boxes": BOXES, "category": CATEGORY},
    "images": "file_name",
    "question": {"const": "Find all."},
    "boxes": {
        "each": "boxes",
        "box": "bbox",
        "label": "category.name",
        "frame": {"order": "xywh", "unit": "pixels", "size": ["$.width", "$.height"]},
    },
    "ignore": ["boxes.*.id", "boxes.*.category.supercategory"],
}

PADDED: dict[str, Any] = {"rows": "rows", "images": "i", "question": {"const": "Which?"}}

ANSWERS = [
    [["cup", 10.0, 20.0, 40.0, 60.0], ["pan", 11.0, 20.0, 41.0, 60.0]],
    ["none"],
    [["pan", 1.0, 2.0, 4.0, 6.0]],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 400 x 200 pixels and b.png of 1000 x 500."""
    write_gray_image(tmp_path / "a.png", 400, 200)
    write_gray_image(tmp_path / "b.png", 1000, 500)
    return tmp_path


def build_options(roles: dict[str, Any], **options: Any) -> ImportOptions:
    """Build options with the mapping of roles."""
    mapping = parse_mapping({"version": 1, **json.loads(json.dumps(roles))}, "m.yaml")
    return ImportOptions(mapping=build_mapping_format(mapping, "m.yaml"), **options)


def write_json(folder: Path, document: object, name: str = "d.json") -> Path:
    """Write a JSON document."""
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def open_document(folder: Path, document: object, roles: dict[str, Any]) -> ImportSource:
    """Write and open a document."""
    return open_source(write_json(folder, document), build_options(roles))


def read_samples(source: ImportSource, context: ImportContext) -> list[dict[str, Any]]:
    """Return the samples of all rows as simple data."""
    found: list[dict[str, Any]] = []
    for row in source.iter_rows():
        found += map(summarize_example, source.data_format.parse_examples(row, context))
    return found


def read_answers(folder: Path, document: object, roles: dict[str, Any]) -> list[Any]:
    """Return the answers of all samples of a document."""
    samples = read_samples(open_document(folder, document, roles), build_context(folder))
    return [answer for sample in samples for answer in sample["answers"]]


def change(path: str, value: Any) -> dict[str, Any]:
    """Return the document with another value at a path of keys and numbers."""
    document = deepcopy(DOCUMENT)
    *keys, last = path.split(".")
    holder: Any = document
    for key in keys:
        holder = holder[int(key)] if isinstance(holder, list) else holder[key]
    holder[int(last) if isinstance(holder, list) else last] = value
    return document


def with_tables(**tables: Any) -> dict[str, Any]:
    """Return the roles with other tables."""
    return {**ROLES, "tables": tables}


def test_rows_of_both_kinds_are_inserted(folder: Path) -> None:
    source = open_document(folder, DOCUMENT, ROLES)
    samples = read_samples(source, build_context(folder))
    assert [sample["user"] for sample in samples] == [
        ["a.png", "Find all."],
        ["b.png", "Find all."],
        ["a.png", "Find all."],
    ]
    assert [sample["answers"] for sample in samples] == [[one] for one in ANSWERS]
    assert [row.location for row in source.iter_rows()] == ["images.0", "images.1", "images.2"]
    assert [row.id for row in source.iter_rows()] == ["7", "8", "9"]
    assert dict(source.rows.other_keys) == {"info of the document": 1}
    assert source.rows.text_format == "joined tables boxes (3 rows), category (2 rows)"


def test_keys_are_compared_as_text(folder: Path) -> None:
    document = change("annotations.0.image_id", "9")
    document["images"][0]["id"] = 7.0
    assert read_answers(folder, document, ROLES) == ANSWERS


def test_objects_of_rows_have_their_keys(folder: Path) -> None:
    document = change("categories", {"1": {"name": "cup"}, "two": {"name": "pan"}})
    document["annotations"][0]["category_id"] = "two"
    document["annotations"][2]["category_id"] = "two"
    category = {**CATEGORY, "from": {"path": "categories", "key": "id"}}
    roles = with_tables(boxes=BOXES, category=category)
    assert read_answers(folder, document, roles) == ANSWERS


def test_records_of_an_object_have_their_keys(folder: Path) -> None:
    images = {"7": {"file_name": "a.png"}, "9": {"file_name": "b.png"}}
    roles = {**ROLES, "rows": {"path": "images", "key": "number"}}
    roles["tables"] = {"boxes": {**BOXES, "by": "number"}, "category": CATEGORY}
    roles["boxes"] = {**ROLES["boxes"], "frame": {"order": "xywh", "unit": "pixels"}}
    assert read_answers(folder, change("images", images), roles) == [ANSWERS[0], ANSWERS[2]]


def test_keys_of_objects_that_no_path_names_are_counted(folder: Path) -> None:
    document = change("categories", {"x": DOCUMENT["categories"][0], "y": {"id": 2, "name": "pan"}})
    notes = open_document(folder, document, ROLES).rows.other_keys
    assert notes["keys of the objects at categories, not imported"] == 2


@pytest.mark.parametrize("has_tables", [False, True])
def test_values_beside_nested_records_are_counted(folder: Path, has_tables: bool) -> None:
    roles = {"rows": "a.rows", "images": "file_name", "question": "q", "answer": "q"}
    rows = [{"file_name": "a.png", "q": "x", "id": 1}]
    roles["ignore"] = ["id"]
    if has_tables:
        roles["tables"] = {"found": {"from": "t", "group": "id", "by": "id"}}
    document = {"a": {"rows": rows, "note": "x"}, "t": [], "b": {"c": 1}}
    source = open_document(folder, document, roles)
    expected = {"a.note of the document": 1, "b of the document": 1}
    if not has_tables:
        expected["t of the document"] = 1
    assert dict(source.rows.other_keys) == expected


@pytest.mark.parametrize("has_tables", [False, True])
def test_empty_optional_records_have_no_rows(folder: Path, has_tables: bool) -> None:
    roles = {**ROLES, "rows": "images?"}
    if not has_tables:
        del roles["tables"]
    with pytest.raises(UserError, match="no rows are selected of 0"):
        open_document(folder, {**DOCUMENT, "images": None}, roles)


@pytest.mark.parametrize("has_tables", [False, True])
def test_compressed_documents_are_errors(folder: Path, has_tables: bool) -> None:
    roles = {**PADDED, "answer": "a"}
    if has_tables:
        roles["tables"] = {"found": {"from": "t", "group": "id", "by": "i"}}
    document = {"rows": [{"i": "a.png", "a": "x"}], "t": []}
    path = folder / "d.json.gz"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    with pytest.raises(UserError, match="a compressed document") as caught:
        open_source(path, build_options(roles))
    assert caught.value.where == str(path)
    assert caught.value.remedy.startswith("unpack it")
    assert open_document(folder, document, roles).rows.num_rows == 1  # the remedy works


def test_compressed_documents_of_tables_are_errors(folder: Path) -> None:
    path = folder / "names.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"kinds": DOCUMENT["categories"]}).encode()))
    category = {**CATEGORY, "file": path.name, "from": "kinds"}
    with pytest.raises(UserError, match="a compressed document") as caught:
        open_document(folder, DOCUMENT, with_tables(boxes=BOXES, category=category))
    assert caught.value.where == str(path)


def test_rows_without_a_class_name_are_errors(folder: Path) -> None:
    roles = {**ROLES, "classes": {"table": "category", "value": "name"}}
    del roles["question"]
    document = deepcopy(DOCUMENT)
    del document["categories"][1]["name"]
    with pytest.raises(UserError, match=r"no key name in categories.1") as caught:
        open_document(folder, document, roles)
    assert caught.value.where == "the table category of the mapping"
    assert caught.value.remedy.startswith("add it to the row")
    document["categories"][1]["name"] = "pan"  # the remedy works
    assert open_document(folder, document, roles).rows.num_rows == 3


@pytest.mark.parametrize(
    ("path", "role"), [("annotations.1.image_id", "group"), ("categories.1.id", "key")]
)
@pytest.mark.parametrize("is_missing", [False, True])
def test_rows_without_a_key_are_errors(folder: Path, path, role, is_missing) -> None:
    document = change(path, None)
    table, number, key = path.split(".")
    if is_missing:
        del document[table][int(number)][key]
    with pytest.raises(UserError, match=f"no key {key} " if is_missing else f"the {role} ") as it:
        open_document(folder, document, ROLES)
    assert it.value.where == f"{folder / 'd.json'}, {table}.{number}"
    assert it.value.remedy == f"add it to the row, or correct {role} of the table in the mapping"


def test_classes_of_a_table(folder: Path) -> None:
    roles = {**ROLES, "classes": {"table": "category", "value": "name"}}
    del roles["question"]
    document = change("categories.1.name", "jug")
    document["categories"].append({"id": 3, "name": "urn", "supercategory": "dish"})
    samples = read_samples(open_document(folder, document, roles), build_context(folder))
    assert "classes in the image: cup, jug, urn." in samples[0]["user"][1]
    assert samples[1]["answers"] == [["none"]]
    document["categories"][1]["name"] = ["jug"]
    with pytest.raises(UserError, match=r"the class name name of categories.1 is a list of 1"):
        open_document(folder, document, roles)


def test_rows_of_other_files(folder: Path) -> None:
    """The data file and the tables may be row files, whose rows have texts that are parsed."""
    write_json(folder, {"kinds": DOCUMENT["categories"], "note": "x"}, "names.json")
    with (folder / "boxes.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "bbox", "category_id"])
        for one in DOCUMENT["annotations"]:
            writer.writerow([one["image_id"], one["bbox"], one["category_id"]])
    images = folder / "images.jsonl"
    images.write_text("\n".join(map(json.dumps, DOCUMENT["images"])), encoding="utf-8")
    roles = with_tables(
        boxes={"file": "boxes.csv", "group": "image_id", "by": "id"},
        category={**CATEGORY, "file": "names.json", "from": "kinds"},
    )
    del roles["rows"]
    roles["parse"] = {"boxes.*.bbox": "json"}
    for row_files in ((), (images,)):
        options = build_options(roles, row_files=row_files)
        source = open_source(folder if row_files else images, options)
        samples = read_samples(source, build_context(folder))
        assert [sample["answers"] for sample in samples] == [[one] for one in ANSWERS]
        assert dict(source.rows.other_keys) == {"note of the document names.json": 1}
    assert source.rows.text_format.startswith("joined tables boxes (3 rows)")


def test_keys_beside_the_rows_of_a_file_are_counted(folder: Path) -> None:
    document = {"version": 3, "rows": DOCUMENT["annotations"]}
    write_json(folder, document, "boxes.json")
    boxes = {"file": "boxes.json", "group": "image_id", "by": "id"}
    notes = open_document(folder, DOCUMENT, with_tables(boxes=boxes, category=CATEGORY)).rows
    assert dict(notes.other_keys) == {
        "info of the document": 1,
        "annotations of the document": 1,
        "version of the document": 1,
    }


def test_questions_with_answers_of_a_second_document(folder: Path) -> None:
    write_gray_image(folder / "photo_000000000042.png", 40, 20)
    questions = {"questions": [{"question_id": 5, "image_id": 42, "question": "How many?"}]}
    answers = {"rows": [{"question_id": 5, "best": "two"}], "license": "CC0"}
    write_json(folder, answers, "answers.json")
    roles = {
        "rows": "questions",
        "tables": {
            "found": {
                "file": "answers.json",
                "from": "rows",
                "key": "question_id",
                "by": "question_id",
            }
        },
        "images": {"template": "photo_{image_id:012}.png"},
        "question": "question",
        "answer": "found.best",
    }
    (sample,) = read_samples(open_document(folder, questions, roles), build_context(folder))
    assert sample == {"user": ["photo_000000000042.png", "How many?"], "answers": [["two"]]}


@pytest.mark.parametrize(
    ("value", "text"), [(7, "007"), ("7", "007"), (7.0, "007"), (-7, "-07"), (12345, "12345")]
)
def test_templates_pad_integers(folder: Path, value: Any, text: str) -> None:
    roles = {**PADDED, "answer": {"template": "{n:03}|{{{n}}}"}}
    answers = read_answers(folder, {"rows": [{"i": "a.png", "n": value}]}, roles)
    assert answers == [[f"{text}|{{{value}}}"]]


@pytest.mark.parametrize("value", ["7a", 7.5, True, "٧"])
def test_templates_pad_only_integers(folder: Path, value: Any) -> None:
    roles = {**PADDED, "answer": {"template": "{n:03}"}}
    with pytest.raises(UserError, match=r"the answer \(n\) is .*, which zeros cannot pad"):
        read_answers(folder, {"rows": [{"i": "a.png", "n": value}]}, roles)


@pytest.mark.parametrize("field", ["n:3", "n:03d", "n:0", "n:", "n:00", "n:0100", "a:b"])
def test_other_formats_of_templates_are_errors(field: str) -> None:
    roles = {"images": "i", "answer": {"template": f"x{{{field}}}"}}
    with pytest.raises(UserError, match="a format other than a width such as :012"):
        build_options(roles)


def test_keys_with_a_colon_are_quoted_in_templates(folder: Path) -> None:
    roles = {**PADDED, "answer": {"template": '{"a:0":02}{"a:0"?}'}}
    assert read_answers(folder, {"rows": [{"i": "a.png", "a:0": 3}]}, roles) == [["033"]]


def test_optional_keys_insert_nothing(folder: Path) -> None:
    roles = with_tables(
        boxes={**BOXES, "by": "id?"}, category={**CATEGORY, "by": "boxes.*.category_id?"}
    )
    roles["boxes"] = {**ROLES["boxes"], "label": {"any_of": ["category?.name", {"const": "thing"}]}}
    document = change("annotations.0.category_id", 77)  # which no row has
    document["annotations"][1]["category_id"] = None
    del document["annotations"][2]["category_id"]
    del document["images"][1]["id"]
    answers = read_answers(folder, document, roles)
    labels = [[one[0] if isinstance(one, list) else one for one in answer] for answer in answers]
    assert labels == [["thing", "thing"], ["none"], ["thing"]]


@pytest.mark.parametrize(
    ("document", "what", "remedy"),
    [
        (
            change("annotations.0.category_id", 77),
            "no row of the table category has the id '77', which is boxes.*.category_id of boxes.0",
            "by: boxes.*.category_id?",
        ),
        (change("annotations.0.category_id", None), "(boxes.*.category_id) is", "add it"),
        (change("annotations.0.category_id", [2]), "(boxes.*.category_id) is", "correct the path"),
        (change("annotations.0.category", {}), "boxes.0 has a key category of its own", "rename"),
        (change("images.2.boxes", []), "the record has a key boxes of its own", "rename"),
        (change("images.2", {"file_name": "a.png"}), "no key id in the record", "id?"),
        (change("annotations.0.score", 3), "boxes.0.score with '3' has no role", "boxes.*.score"),
    ],
)
def test_records_that_do_not_fit_may_be_skipped(folder: Path, document, what, remedy) -> None:
    if "id" not in document["images"][2]:
        del document["annotations"][0]
    path = write_json(folder, document)
    with pytest.raises(UserError) as caught:
        import_dataset(path, folder / "out", build_options(ROLES))
    assert f"images.2: {what}" in str(caught.value) or what in str(caught.value)
    assert remedy in str(caught.value)
    summary = import_dataset(path, folder / "out", build_options(ROLES, on_invalid_row="skip"))
    assert [file.num_samples for file in summary.output_files] == [2]
    assert sum(summary.skipped_rows.values()) == 1


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (change("categories.1.id", "1.0"), "categories.0 and categories.1 have the same id '1'"),
        (change("categories.1.id", "1"), "categories.0 and categories.1 have the same id '1'"),
        (change("categories.1.id", 1.0), "categories.0 and categories.1 have the same id '1'"),
        (change("categories.1.id", None), r"categories.1: the key \(id\) is"),
        (change("annotations.1", {"bbox": []}), r"annotations.1: no key image_id in the record"),
        (change("annotations.1", [3]), r"annotations.1 is .*"),
        (change("images.1", "b.png"), r"images.1 is 'b.png'"),
        (change("annotations", 3), r"annotations is .*\(path annotations\)"),
    ],
)
def test_invalid_tables_are_errors(folder: Path, document, what) -> None:
    if what is None:
        assert open_document(folder, document, ROLES).rows.num_rows == 3
        return
    with pytest.raises(UserError, match=what) as caught:
        open_document(folder, document, ROLES)
    assert caught.value.where
    assert caught.value.remedy


def test_rows_without_a_record_are_counted(folder: Path) -> None:
    document = change("annotations.0.image_id", 70)
    notes = open_document(folder, document, ROLES).rows.other_keys
    assert notes["rows of the table boxes without a record, such as image_id '70'"] == 1
    options = build_options(ROLES, row_range=(1, 2))  # the other records are not selected
    notes = open_source(write_json(folder, DOCUMENT), options).rows.other_keys
    assert dict(notes) == {"info of the document": 1}


def test_tables_without_a_record_are_errors_or_counted(folder: Path) -> None:
    document = change("annotations", [{**DOCUMENT["annotations"][0], "image_id": "07"}])
    with pytest.raises(
        UserError, match=r"that is the image_id of one of the 1 rows, such as .* '07'"
    ):
        open_document(folder, document, ROLES)
    category = {**CATEGORY, "by": "boxes.*.category_id?"}
    document = change("categories", [{"id": 3, "name": "x"}, {"id": 4, "name": "y"}])
    roles = with_tables(boxes=BOXES, category=category)
    notes = open_document(folder, document, roles).rows.other_keys
    assert notes["rows of the table category, none of which a record has"] == 2
    assert open_document(folder, change("annotations", []), ROLES).rows.num_rows == 3
    with pytest.raises(UserError, match="no rows are selected of 0"):
        open_document(folder, change("images", []), ROLES)


def test_wrong_paths_of_all_records_are_errors_of_the_records(folder: Path) -> None:
    roles = with_tables(boxes={**BOXES, "by": "idd"})
    source = open_document(folder, DOCUMENT, roles)
    (first,) = source.rows.iter_range(0, 1)
    with pytest.raises(UserError, match=r"no key idd in the record \(path idd\)") as caught:
        source.data_format.parse_examples(first, build_context(folder))
    assert "id" in caught.value.remedy


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"boxes": {**BOXES, "key": "id"}}, "boxes: a table has either group .* or key"),
        ({"boxes": {"from": "a", "by": "id"}}, "boxes: a table has either group .* or key"),
        ({"boxes": {"group": "a", "by": "id"}}, "boxes: a table has from .*, file or both"),
        ({"boxes": {"from": "a", "group": "a"}}, "boxes.by: Field required"),
        ({"boxes": {**BOXES, "form": "a"}}, "unknown key 'form'"),
        ({"": BOXES}, "at least 1 character"),
        ({"boxes": {**BOXES, "group": "a?"}}, r"a\? is not the path of one value"),
        ({"boxes": {**BOXES, "group": "a.*"}}, r"a\.\* is not the path of one value"),
        ({"boxes": {**BOXES, "by": "ids.*"}}, r"by: ids\.\* does not end in a key"),
        ({"boxes": {**BOXES, "by": "."}}, "by: . does not end in a key"),
        (
            {"category": CATEGORY, "boxes": BOXES},
            "is in the rows of boxes, which is not an earlier",
        ),
        ({"k": {"from": "a", "key": "id", "by": "k"}}, "name of the table k; rename the table"),
        (
            {"boxes": BOXES, "kind": {**CATEGORY, "by": "boxes.*.kind"}},
            r"boxes\.\*\.kind is a value of the record, but also the name of the table kind",
        ),
        ({"boxes": {**BOXES, "file": "../d.json"}}, "is not a path below the folder"),
        ({"boxes": {**BOXES, "file": "a/../../d.json"}}, "is not a path below the folder"),
        ({"boxes": {**BOXES, "file": "/d.json"}}, "is not a path below the folder"),
        ({"boxes": {**BOXES, "file": ""}}, "is not a path below the folder"),
    ],
)
def test_invalid_tables_of_a_mapping_are_errors(tables: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        build_options(with_tables(**tables))
    assert caught.value.where.startswith("m.yaml")


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ({"rows": None}, "tables.boxes: from is a list of the document of the records: give rows"),
        ({"group": "file_name"}, r"group \(file_name\) and tables: give a table with group"),
        ({"match": {"keys": ["a"]}}, r"tables \(boxes, category\) and match"),
        ({"classes": {"table": "box", "value": "a"}, "question": None}, "classes: no table box"),
        ({"classes": {"table": "category", "value": "a"}}, "the classes of the table category are"),
        ({"classes": {"table": "boxes", "value": "a.*"}, "question": None}, "not the path of one"),
    ],
)
def test_tables_that_contradict_other_keys_are_errors(roles: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        build_options({**ROLES, **roles})


@pytest.mark.parametrize("is_row_file", [False, True])
def test_links_out_of_the_folder_are_errors(folder: Path, is_row_file: bool) -> None:
    inner = folder / "inner"
    inner.mkdir()
    write_json(folder, {"annotations": DOCUMENT["annotations"]}, "outside.json")
    write_json(inner, {"annotations": DOCUMENT["annotations"]}, "inside.json")
    boxes = {**BOXES, "file": "link.json"}
    if is_row_file:
        del boxes["from"]
    path = write_json(inner, DOCUMENT)
    options = build_options(with_tables(boxes=boxes, category=CATEGORY))
    (inner / "link.json").symlink_to(folder / "outside.json")
    with pytest.raises(UserError, match="a link to a file outside of the folder") as caught:
        open_source(path, options)
    assert caught.value.where == str(inner / "link.json")
    (inner / "link.json").unlink()
    (inner / "link.json").symlink_to("inside.json")
    assert open_source(path, options).rows.num_rows == 3
    (inner / "link.json").unlink()
    (inner / "sub").symlink_to(folder)
    boxes["file"] = "sub/outside.json"
    with pytest.raises(UserError, match="a link to a file outside of the folder"):
        open_source(path, build_options(with_tables(boxes=boxes, category=CATEGORY)))
    boxes["file"] = "none.json"
    with pytest.raises(UserError, match="no such file"):
        open_source(path, build_options(with_tables(boxes=boxes, category=CATEGORY)))


def test_rows_with_embedded_images_are_errors(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet` is not installed")
    images = {"id": [7, 8], "image": [(folder / "a.png").read_bytes(), b""]}
    parquet.write_table(pyarrow.table(images), folder / "images.parquet")
    rows = folder / "rows.jsonl"
    rows.write_text('{"image_id": 7, "a": "x"}\n', encoding="utf-8")
    table = {"file": "images.parquet", "key": "id", "by": "image_id"}
    roles = {"tables": {"found": table}, "images": "found.image", "answer": "a"}
    with pytest.raises(
        UserError, match=r"a value that a joined row cannot have: [0-9]+ bytes"
    ) as it:
        open_source(rows, build_options(roles))
    assert it.value.remedy.startswith("give the file with embedded images as the data file")
    # The remedy works.
    table = {"file": "rows.jsonl", "group": "image_id", "by": "id"}
    roles = {
        "tables": {"found": table},
        "sample": "found",
        "images": "$.image",
        "question": {"const": "Which?"},
        "answer": "a",
    }
    summary = import_dataset(folder / "images.parquet", folder / "out", build_options(roles))
    assert [file.num_samples for file in summary.output_files] == [1]


def test_explanation_and_preview_have_the_locations_of_rows(folder: Path) -> None:
    path = write_json(folder, change("annotations.2.score", 3))
    found = explain_row(path, build_options(ROLES), 1, folder)
    assert found.location == "images.0"
    readings = {one.location: (one.role, one.value) for one in found.readings}
    assert readings["boxes.0.bbox"] == ("boxes", [10, 20, 30, 40])
    assert readings["boxes.1.category.name"] == ("label", "pan")
    assert readings["boxes.1.category_id"] == ("key", 2)
    assert readings["boxes.1.image_id"] == ("key", 7)
    assert readings["boxes.1.category.id"] == ("key", 2)
    assert [one.location for one in found.unused] == ["boxes.1.score"]
    preview = preview_import(path, build_options(ROLES), folder)
    assert preview.num_rows == 3
    assert {"boxes.*.bbox", "boxes.*.category.name"} <= {key.path for key in preview.keys}
    assert len(preview.samples) == 2
    assert "boxes.1.score" in str(preview.problem)


def test_a_value_without_a_role_has_one_error(folder: Path) -> None:
    """Each row of a class is the same value; one entry of `ignore` is enough."""
    roles = {**ROLES, "ignore": ["boxes.*.id"]}
    source = open_document(folder, DOCUMENT, roles)
    (first,) = source.rows.iter_range(0, 1)
    with pytest.raises(UserError, match=r"supercategory with 'dish' has no role") as caught:
        source.data_format.parse_examples(first, build_context(folder))
    assert "ignore: [boxes.*.category.supercategory]" in caught.value.remedy
    open_source(folder / "d.json", build_options(ROLES))


def list_temporary_databases() -> list[str]:
    """Return the open temporary files of SQLite in this process."""
    found: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except OSError:
            continue
    return [name for name in found if "etilqs" in name]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux lists open files")
def test_the_temporary_database_is_removed(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(joined_tables, "CACHE_KIB", 8)  # rows are on disk at once
    document = deepcopy(DOCUMENT)
    document["annotations"] *= 2000
    path = write_json(folder, document)
    source = open_source(path, build_options(ROLES))
    names = list_temporary_databases()
    assert names
    assert all(name.endswith("(deleted)") for name in names)
    del source
    assert list_temporary_databases() == []
    path.write_text(json.dumps(document)[:-1], encoding="utf-8")
    with pytest.raises(UserError, match="not a JSON document"):
        open_source(path, build_options(ROLES))
    assert list_temporary_databases() == []


def test_a_full_disk_is_an_error_of_the_user(folder: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(joined_tables, "StoredRow", fail)
    with pytest.raises(UserError, match="database or disk is full") as caught:
        open_document(folder, DOCUMENT, ROLES)
    assert "TMPDIR" in caught.value.remedy


def test_a_broken_database_is_an_error_of_the_user(folder: Path, monkeypatch) -> None:
    is_broken = False

    class Connection(sqlite3.Connection):
        def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
            if is_broken and query.startswith("SELECT"):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(query, *values)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    source = open_document(folder, DOCUMENT, ROLES)
    (first,) = source.rows.iter_range(0, 1)
    assert isinstance(first.record, joined_tables.UnjoinedRecord)
    store = first.record.tables.store
    is_broken = True
    reads: list[Callable[[], object]] = [
        lambda: store.count("boxes"),
        store.count_all,
        lambda: store.find("boxes", "7"),
        lambda: store.find_repeated("boxes"),
        lambda: list(store.iter_keys("boxes")),
        lambda: list(store.iter_rows("boxes")),
        lambda: list(source.rows.iter_range(0, 3)),
    ]
    for read in reads:
        with pytest.raises(UserError, match="cannot be written or read: disk I/O error"):
            read()


def test_a_large_document_is_not_held_in_memory(folder: Path) -> None:
    """About 60 MB of JSON are read in less than a tenth of it."""
    num_images = 1000
    path = folder / "large.json"
    outline = "0.125, " * 4200
    with path.open("w", encoding="utf-8") as file:
        file.write('{"annotations": [')
        for number in range(2 * num_images):
            row = {**DOCUMENT["annotations"][1], "id": number, "image_id": number % num_images}
            file.write(f"{', ' if number else ''}{json.dumps({**row, 'outline': outline})}")
        file.write('], "images": [')
        for number in range(num_images):
            row = {**DOCUMENT["images"][0], "id": number}
            file.write(f"{', ' if number else ''}{json.dumps(row)}")
        file.write(f'], "categories": {json.dumps(DOCUMENT["categories"])}}}')
    assert path.stat().st_size > 55e6
    options = build_options({**ROLES, "ignore": [*ROLES["ignore"], "boxes.*.outline"]})
    context = build_context(folder)
    tracemalloc.start()
    try:
        source = open_source(path, options)
        num_boxes = 0
        for row in source.iter_rows():
            (example,) = source.data_format.parse_examples(row, context)
            num_boxes += len(example.answers[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_boxes == 2 * num_images
    assert peak < 6e6


def account_for(document: object, folder: Path) -> tuple[list[Any], str]:
    """Return the samples of a document, and the texts in which an import names keys."""
    named: list[str] = []
    samples: list[Any] = []
    try:
        source = open_document(folder, document, ROLES)
        named += source.rows.other_keys
        context = build_context(folder)
        for row in source.iter_rows():
            samples += map(summarize_example, source.data_format.parse_examples(row, context))
            named += [*context.other_keys, *context.row_notes, *context.skipped_rows]
    except UserError as error:
        named.append(str(error))
        samples.append("error")
    return samples, "\n".join(named)


@pytest.mark.parametrize("seed", range(4))
def test_changed_keys_of_a_document_are_named(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    original, _ = account_for(DOCUMENT, folder)
    for _ in range(150):
        mutation = mutate_record(DOCUMENT, rng)
        samples, named = account_for(mutation.record, folder)
        is_named = mutation.key in named or (mutation.kind == "nest" and "value" in named)
        assert is_named or samples == original, f"{mutation.kind} of {mutation.key}: {named}"


@pytest.mark.parametrize("seed", range(2))
def test_broken_documents_have_errors_of_the_user(folder: Path, monkeypatch, seed: int) -> None:
    """No invalid document is read, and no error is one of Python."""
    rng = random.Random(seed)
    path = folder / "d.json"
    options = build_options(ROLES)
    for _ in range(150):
        monkeypatch.setattr(json_stream, "WINDOW_CHARS", rng.choice([5, 50, 2**18]))
        content = json.dumps(mutated_value(rng, DOCUMENT)).encode()
        if rng.random() < 0.5:
            content = mutated_bytes(rng, json.dumps(DOCUMENT).encode())
        path.write_bytes(content)
        try:
            source = open_source(path, options)
        except UserError:
            continue
        json.loads(content)
        for row in source.iter_rows():
            with suppress(UserError):
                source.data_format.parse_examples(row, build_context(folder))


def test_schema_accepts_tables() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the extra `schema` is not installed")
    schema = json.loads(write_schema())
    jsonschema.validate({"version": 1, **ROLES}, schema)
    classes = {"table": "category", "value": "name"}
    jsonschema.validate({"version": 1, **ROLES, "classes": classes}, schema)
    with pytest.raises(jsonschema.ValidationError, match="source"):
        jsonschema.validate({"version": 1, **with_tables(a={"source": "b", "by": "c"})}, schema)
