"""Mappings as dataset formats: rows of a file that are grouped to records."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from image_fixtures import write_gray_image
from mapping_fixtures import build_context, summarize_example

from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions, open_source
from finesight.ingest.importer import import_dataset
from finesight.ingest.mapping import parse_mapping
from finesight.ingest.mapping_format import MappingFormat, build_mapping_format
from finesight.ingest.row_reader import RowReader, SourceRow
from finesight.samples.sample import read_samples

TABLE = """\
image_id,class_name,reader,xmin,ymin,xmax,ymax,width
a,cup,R1,10,20,30,40,400
b,none,R1,,,,,1000
a,pan,R2,50,20,90,40,400
b,none,R2,,,,,1000
"""

ANSWER_OF_SECOND_ROW: dict[str, Any] = {
    "group": "image",
    "images": "rows.0.image",
    "question": {"const": "Which?"},
    "answer": "rows.1.a",
    "meta": {"first": "rows.0.a"},
}

BOXES: dict[str, Any] = {
    "each": "rows",
    "where": {"path": "class_name", "differs_from": "none"},
    "box": ["xmin", "ymin", "xmax", "ymax"],
    "label": "class_name",
    "frame": {"order": "xyxy", "unit": "pixels"},
}

ROLES: dict[str, Any] = {
    "group": "image_id",
    "images": {"template": "{rows.0.image_id}.png"},
    "question": {"const": "Find all."},
    "boxes": BOXES,
    "meta": ["rows.0.width"],
    "ignore": ["rows.*.reader"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 400 x 200 pixels and b.png of 1000 x 500."""
    write_gray_image(tmp_path / "a.png", 400, 200)
    write_gray_image(tmp_path / "b.png", 1000, 500)
    return tmp_path


def build_format(roles: dict[str, Any]) -> MappingFormat:
    """Build the format of a mapping with roles."""
    return build_mapping_format(parse_mapping({"version": 1, **roles}, "m.yaml"), "m.yaml")


def open_grouped(path: Path, roles: dict[str, Any], **options: Any) -> RowReader:
    """Open a source with a mapping that groups its rows."""
    return open_source(path, ImportOptions(mapping=build_format(roles), **options)).rows


def open_rows(path: Path, roles: dict[str, Any]) -> list[SourceRow]:
    """Return the rows of a file that a mapping groups."""
    reader = open_grouped(path, roles)
    return list(reader.iter_range(0, reader.num_rows))


def write_table(folder: Path, text: str = TABLE) -> Path:
    """Write a table."""
    path = folder / "rows.csv"
    path.write_text(text, encoding="utf-8")
    return path


def parse(row: SourceRow, roles: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Return the samples of a row as simple data."""
    examples = build_format(roles).parse_examples(row, build_context(folder))
    return [summarize_example(example) for example in examples]


def test_boxes_of_all_rows_of_an_image_are_one_sample(folder: Path) -> None:
    rows = open_rows(write_table(folder), ROLES)
    assert [row.location for row in rows] == ["row 1 with 1 more", "row 2 with 1 more"]
    assert [row.id for row in rows] == ["rows-1", "rows-2"]
    (first,) = parse(rows[0], ROLES, folder)
    boxes = [["cup", 10.0, 20.0, 30.0, 40.0], ["pan", 50.0, 20.0, 90.0, 40.0]]
    assert first == {"user": ["a.png", "Find all."], "answers": [boxes], "meta": {"width": "400"}}
    (second,) = parse(rows[1], ROLES, folder)
    assert second["answers"] == [["none"]]


def test_an_image_without_boxes_is_a_sample_of_the_classes(folder: Path) -> None:
    roles = {**ROLES, "classes": ["cup", "pan"]}
    del roles["question"]
    rows = open_rows(write_table(folder), roles)
    assert [len(one) for one in parse(rows[0], roles, folder)[0]["answers"]] == [2]
    (second,) = parse(rows[1], roles, folder)
    assert second["answers"] == [["none"]]
    assert "cup, pan" in second["user"][1]


def test_values_that_differ_from_the_first_row_need_a_role(folder: Path) -> None:
    path = write_table(folder, TABLE.replace("90,40,400", "90,40,401"))
    rows = open_rows(path, ROLES)
    with pytest.raises(UserError, match=r"rows\.1\.width with '401' has no role") as caught:
        parse(rows[0], ROLES, folder)
    assert r"ignore: [rows.*.width]" in caught.value.remedy


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"key": None}, r"the group \(info.id\) is an empty|no key info"),
        ({"info": {"id": ""}}, r"the group \(info.id\) is ''"),
        ({"info": {"id": [1]}}, r"the group \(info.id\) is"),
        ({"info": '{"id": 1}'}, r"info is '"),
    ],
)
def test_rows_without_a_value_are_errors_of_their_own(folder: Path, record, what) -> None:
    """They do not change other groups, and an import may skip them."""
    valid = {"info": {"id": 1}, "image": "a.png", "q": "Which?", "a": "x"}
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [valid, record, valid])), encoding="utf-8")
    roles = {"images": "rows.0.image", "question": "rows.0.q", "answer": "rows.0.a"}
    roles["group"] = "info.id"
    first, second = open_rows(path, roles)
    assert first.location == "line 1 with 1 more"
    assert len(parse(first, roles, folder)) == 1
    assert second.location == "line 2"
    with pytest.raises(UserError, match=what):
        parse(second, roles, folder)


def test_objects_of_other_rows_are_compared_by_key(folder: Path) -> None:
    image = {"bytes": None, "path": "a.png"}
    record = {"id": 1, "image": image, "info": {"size": 3, "q": "Which?"}, "a": "x"}
    path = folder / "rows.json"
    path.write_text(json.dumps([record, record, record]), encoding="utf-8")
    roles = {
        "group": "id",
        "images": "rows.0.image",
        "question": "rows.0.info.q",
        "answers": {"path": "rows.*.a", "use": "first"},
        "meta": ["rows.0.info.size"],
    }
    (row,) = open_rows(path, roles)
    assert row.location == "row 1 with 2 more"
    (sample,) = parse(row, roles, folder)
    assert sample["answers"] == [["x"]]


def test_rows_inside_of_a_document_are_grouped(folder: Path) -> None:
    records = [{"image": "a.png", "a": "x"}, {"image": "b.png", "a": "y"}]
    path = folder / "rows.json"
    path.write_text(json.dumps({"info": 1, "data": [*records, *records]}), encoding="utf-8")
    roles = {"rows": "data", "group": "image", "images": "rows.0.image", "answer": "rows.1.a"}
    reader = open_grouped(path, roles)
    assert (reader.num_rows, dict(reader.other_keys)) == (2, {"info of the document": 1})
    assert "4 rows in 2 groups by image" in reader.text_format


def test_rows_of_several_files_are_grouped(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"image": "a.png", "a": name}))
    roles = ANSWER_OF_SECOND_ROW
    files = (folder / "a.jsonl", folder / "b.jsonl")
    reader = open_grouped(folder, roles, row_files=files)
    (row,) = reader.iter_range(0, reader.num_rows)
    assert row.location == "a.jsonl, line 1 with 1 more"
    (sample,) = parse(row, roles, folder)
    assert sample["answers"] == [["b"]]


def test_encoding_of_a_grouped_table(folder: Path) -> None:
    text = "image,a\na.png,caf\u00e9\na.png,th\u00e9\n"
    (folder / "rows.csv").write_bytes(text.encode("cp1250"))
    roles = ANSWER_OF_SECOND_ROW
    reader = open_grouped(folder / "rows.csv", roles, encoding="cp1250")
    (row,) = reader.iter_range(0, 1)
    (sample,) = parse(row, roles, folder)
    assert sample["answers"] == [["th\u00e9"]]


def test_lists_under_the_names_of_images_are_records(folder: Path) -> None:
    document = {"a": [{"text": "exit", "box": [1, 2, 30, 40]}], "b": []}
    path = folder / "words.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    frame = {"order": "xyxy", "unit": "pixels"}
    roles = {
        "rows": {"path": "*", "key": "name"},
        "images": {"template": "{name}.png"},
        "question": {"const": "Read the words."},
        "boxes": {"each": "rows", "box": "box", "label": "text", "frame": frame},
    }
    reader = open_grouped(path, roles)
    samples = [parse(row, roles, folder)[0] for row in reader.iter_range(0, reader.num_rows)]
    assert [sample["answers"] for sample in samples] == [
        [[["exit", 1.0, 2.0, 30.0, 40.0]]],
        [["none"]],
    ]
    assert samples[1]["user"] == ["b.png", "Read the words."]


SPLIT_ROLES: dict[str, Any] = {
    "images": "image",
    "question": {"const": "Which?"},
    "answer": "a",
    "split": {"path": "part", "values": {"train": "train", "val": "eval"}},
}


def test_stated_splits_become_files(folder: Path) -> None:
    parts = ["val", "train", "train", "val"]
    rows: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        write_gray_image(folder / f"{number}.png", 40 + number, 20)
        rows.append({"image": f"{number}.png", "a": str(number), "part": part})
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    import_dataset(path, folder / "out", ImportOptions(mapping=build_format(SPLIT_ROLES)))
    answers: dict[str, list[str]] = {}
    for name in ("train", "eval"):
        samples = read_samples(folder / "out" / f"{name}.jsonl")
        answers[name] = [sample.messages[-1].content[0].text for sample in samples]
    assert answers == {"train": ["1", "2"], "eval": ["0", "3"]}


@pytest.mark.parametrize(
    ("parts", "options", "what", "remedy"),
    [
        (
            ["val", "val"],
            {},
            "no row is for training, 2 rows for validation",
            "correct split in the mapping",
        ),
        (["val", "train"], {}, "shares an image with the last 1", "remove split from the mapping"),
        (
            ["val", "train"],
            {"train_fraction": 0.5},
            "the mapping states the split of each row",
            "remove this option",
        ),
    ],
)
def test_splits_that_cannot_be_files(folder: Path, parts, options, what, remedy) -> None:
    rows = [{"image": "a.png", "a": "x", "part": part} for part in parts]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    chosen = ImportOptions(mapping=build_format(SPLIT_ROLES), **options)
    with pytest.raises(UserError, match=what) as caught:
        import_dataset(path, folder / "out", chosen)
    assert remedy in str(caught.value)
    assert not (folder / "out").exists()


def test_rows_that_are_left_out_are_not_for_training(folder: Path) -> None:
    rows = [
        {"image": "a.png", "a": "x", "part": "val"},
        {"image": "b.png", "a": "", "part": "train"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    roles = {**SPLIT_ROLES, "where": {"path": "a", "differs_from": ""}}
    with pytest.raises(UserError, match="no row is for training, 1 row for validation"):
        import_dataset(path, folder / "out", ImportOptions(mapping=build_format(roles)))


def encode(value: object) -> str:
    """Return a value as JSON in base64."""
    return base64.b64encode(json.dumps(value).encode()).decode()


def test_texts_in_base64_are_decoded(folder: Path) -> None:
    record = {"file": "a.png", "note": base64.b64encode(b"Read it.").decode()}
    record["label"] = encode({"read": "7 bar", "wrong": "9 bar"})
    source = folder / "rows.jsonl"
    source.write_text(json.dumps(record))
    roles = {
        "parse": {"note": "base64", "label": ["base64", "json"]},
        "images": "file",
        "question": "note",
        "answer": "label.read",
        "rejected": "label.wrong",
    }
    import_dataset(source, folder / "out", ImportOptions(mapping=build_format(roles)))
    (sample,) = read_samples(folder / "out" / "data.jsonl")
    assert sample.messages[0].content[-1].text == "Read it."
    assert sample.messages[1].content[0].text == "7 bar"
    assert sample.rejected[0].text == "9 bar"


@pytest.mark.parametrize(
    ("notation", "value", "remedy"),
    [
        ("json", encode({"read": "7 bar"}), r"give \[base64, json\] in parse"),
        ("base64", "7 bar", "correct the row"),
        ("base64", base64.b64encode(bytes(range(200, 250))).decode(), "correct the row"),
    ],
)
def test_texts_that_a_notation_does_not_fit(folder: Path, notation, value, remedy) -> None:
    source = folder / "rows.jsonl"
    source.write_text(json.dumps({"file": "a.png", "label": value}))
    roles = {"parse": {"label": notation}, "images": "file", "answer": "label.read"}
    with pytest.raises(UserError, match=f"label is not valid {notation}") as caught:
        import_dataset(source, folder / "out", ImportOptions(mapping=build_format(roles)))
    assert re.search(remedy, str(caught.value.remedy))


def test_items_that_no_lookup_selects_are_counted(folder: Path) -> None:
    records = [{"file": "a.png", "facts": [{"k": k, "v": f"{k} 1"} for k in ("sum", "day", "who")]}]
    records[0]["wanted"] = "day"
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(record) for record in records))
    lookup = {"list": "facts", "key": "k", "value": "v"}
    roles = {"images": "file", "question": "wanted", "answer": {"path": "wanted", "lookup": lookup}}
    options = ImportOptions(mapping=build_format(roles))
    summary = import_dataset(source, folder / "out", options)
    assert summary.source_notes == {"items of facts, which no lookup selects": 2}
    used = {**roles, "choices": "facts.*.v"}
    options = ImportOptions(mapping=build_format(used))
    assert not import_dataset(source, folder / "all", options).source_notes
