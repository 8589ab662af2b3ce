"""Presets: golden records, signatures, and records with a changed key."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import import_samples, list_answers
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl
from mapping_fixtures import (
    find_silent_change,
    mutate_record,
    read_record,
    summarize_example,
)

from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.ingest.mapping_format import MappingFormat, build_mapping_format
from finesight.ingest.presets import find_preset, load_presets, matches
from finesight.samples.line_index import MAX_LINE_BYTES
from finesight.samples.sample import read_samples

GOLDEN: dict[str, list[dict[str, Any]]] = load_cases("presets")

NUM_MUTATIONS = 200
NUM_FUZZED_MUTATIONS = 5000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 400 x 200 pixels, b.png of 1000 x 500, c.png, d.jpg of 100 x 100."""
    write_gray_image(tmp_path / "a.png", 400, 200)
    write_gray_image(tmp_path / "b.png", 1000, 500)
    write_gray_image(tmp_path / "c.png", 100, 100)
    write_gray_image(tmp_path / "d.jpg", 100, 100)
    return tmp_path


def write_source(golden: dict[str, Any], folder: Path) -> Path:
    """Write golden records as JSON Lines, or their document as JSON."""
    if "document" in golden:
        path = folder / "data.json"
        path.write_text(json.dumps(golden["document"]), encoding="utf-8")
        return path
    path = folder / "data.jsonl"
    lines = [json.dumps(record) for record in golden["records"]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def list_records(
    golden: dict[str, Any], preset: MappingFormat, folder: Path
) -> list[dict[str, Any]]:
    """Return the golden records of a preset, or those inside of its document."""
    if "records" in golden:
        return golden["records"]
    assert preset.open_requested is not None
    opened = preset.open_requested(write_source(golden, folder))
    assert opened is not None
    reader, _ = opened
    return [row.record for row in reader.iter_range(0, reader.num_rows)]


def test_each_preset_has_golden_records() -> None:
    assert sorted(GOLDEN) == sorted(load_presets())


@pytest.mark.parametrize("name", sorted(load_presets()))
def test_presets_state_their_title_and_source(name: str) -> None:
    preset = load_presets()[name]
    assert preset.title
    assert preset.source.startswith("https://")
    assert preset.match is not None


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_records_become_samples(name: str, folder: Path) -> None:
    for golden in GOLDEN[name]:
        path = write_source(golden, folder)
        found = find_preset(path)
        assert found is not None, f"no preset matches {golden}"
        assert found.name == name
        records = list_records(golden, found, folder)
        prompt = golden.get("prompt", "")
        rows = [read_record(record, found.mapping, folder, prompt) for record in records]
        assert [reading.location for row in rows for reading in row.unused] == []
        samples = [summarize_example(example) for row in rows for example in row.examples]
        assert samples == golden["samples"]


def check_mutations(name: str, count: int, folder: Path) -> None:
    """Change records of a preset, and require that each change is visible."""
    mapping = load_presets()[name]
    rng = random.Random(name)
    records: list[dict[str, Any]] = []
    for golden in GOLDEN[name]:
        records += list_records(golden, build_mapping_format(mapping, name), folder)
    originals = [read_record(record, mapping, folder, "") for record in records]
    for _ in range(count):
        index = rng.randrange(len(records))
        mutation = mutate_record(records[index], rng)
        problem = find_silent_change(mutation, originals[index], mapping, folder)
        assert not problem, f"{mutation.kind} of {mutation.key}: {problem}"


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_changed_keys_are_named(name: str, folder: Path) -> None:
    check_mutations(name, NUM_MUTATIONS, folder)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_many_changed_keys_are_named(name: str, folder: Path) -> None:
    check_mutations(name, NUM_FUZZED_MUTATIONS, folder)


CHAT_RECORDS = [
    (name, case["record"])
    for name, cases in load_cases("row_formats").items()
    for case in cases["samples"]
]
TABLE_RECORDS = [
    ("table", case["record"]) for case in load_cases("table")["test_rows_become_samples"]
]


@pytest.mark.parametrize(("name", "record"), [*CHAT_RECORDS, *TABLE_RECORDS])
def test_presets_leave_rows_of_formats_and_tables(
    name: str, record: dict[str, Any], folder: Path
) -> None:
    matching = [
        preset
        for preset, mapping in load_presets().items()
        if mapping.rows is None and matches(mapping, [record], folder)
    ]
    assert matching == [], f"{name} is read by a preset"


def test_presets_do_not_match_records_with_further_inner_keys(folder: Path) -> None:
    golden = GOLDEN["dashscope"][0]["records"][0]
    assert matches(load_presets()["dashscope"], [golden], folder)
    changed = json.loads(json.dumps(golden))
    changed["messages"][1]["content"][0]["type"] = "image"
    assert not matches(load_presets()["dashscope"], [changed], folder)


def test_a_folder_with_a_file_for_each_image_has_a_preset(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "img" / "1.png", 100, 100)
    (tmp_path / "entities").mkdir()
    record = {"company": "LAKE CAFE", "date": "06/07/2031", "address": "", "total": "3.10"}
    (tmp_path / "entities" / "1.txt").write_text(json.dumps(record), encoding="utf-8")
    found = find_preset(tmp_path)
    assert found is not None
    assert found.name == "sroie"


@pytest.mark.parametrize("splits", [[""], ["train", "validation"]])
def test_an_imagefolder_has_a_preset(tmp_path: Path, splits: list[str]) -> None:
    for split in splits:
        (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
        write_gray_image(tmp_path / "data" / split / "a.png", 100 + len(split), 100)
        row = {
            "file_name": "a.png",
            "ground_truth": json.dumps({"gt_parse": {"seat": f"4{split}"}}),
        }
        write_jsonl(tmp_path / "data" / split / "metadata.jsonl", [row])
    found = find_preset(tmp_path / "data")
    assert found is not None
    assert found.name == "donut_folder"
    options = ImportOptions(mapping=found, prompt="Read the ticket.")
    summary = import_dataset(tmp_path / "data", tmp_path / "out", options)
    texts: list[str] = []
    for output in summary.output_files:
        for sample in read_samples(Path(output.file)):
            texts += [part.text for part in sample.messages[-1].content]
    assert texts == [json.dumps({"seat": f"4{split}"}) for split in splits]


def test_json_lines_in_a_json_file_have_a_preset(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 100, 100)
    row = {"question_id": 1, "image": "a.png", "text": "Is there a pan?", "label": "no"}
    write_jsonl(tmp_path / "coco_pope.json", [row, row])
    found = find_preset(tmp_path / "coco_pope.json")
    assert found is not None
    assert found.name == "pope"


def test_a_preset_of_a_folder_leaves_out_files_of_the_project(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "ds0" / "img" / "a.png", 400, 200)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": [{"title": "kettle"}]}))
    (tmp_path / "ds0" / "ann").mkdir()
    record = dict(GOLDEN["supervisely"][0]["records"][0])
    del record["image"]
    (tmp_path / "ds0" / "ann" / "a.png.json").write_text(json.dumps(record))
    found = find_preset(tmp_path)
    assert found is not None
    samples, summary = import_samples(tmp_path, tmp_path / "out", mapping=found)
    assert list_answers(samples) == [[("kettle", (40, 30, 140, 120))]]
    assert "other files, not read: 1 .json" in summary.text_format


def test_answers_that_are_numbers_of_boxes_have_no_preset(folder: Path) -> None:
    document = json.loads(json.dumps(GOLDEN["visual7w"][0]["document"]))
    pair = document["images"][0]["qa_pairs"][0]
    pair |= {"type": "which", "answer": 7, "multiple_choices": [8, 9, 10]}
    (folder / "pointing.json").write_text(json.dumps(document), encoding="utf-8")
    assert find_preset(folder / "pointing.json") is None


@pytest.mark.parametrize(
    ("name", "objects", "change"),
    [
        (
            "supervisely",
            "objects",
            {
                "geometryType": "polygon",
                "points": {"exterior": [[40, 30], [90, 30], [90, 90]], "interior": []},
            },
        ),
        ("supervisely", "objects", {"geometryType": "line"}),
        ("superannotate", "instances", {"type": "polygon", "points": [40, 30, 90, 30, 90, 90]}),
    ],
)
def test_shapes_without_boxes_are_not_left_out(
    folder: Path, name: str, objects: str, change: dict[str, Any]
) -> None:
    record = json.loads(json.dumps(GOLDEN[name][0]["records"][0]))
    assert matches(load_presets()[name], [record], folder)
    record[objects].append({**record[objects][0], **change})
    assert not matches(load_presets()[name], [record], folder)


def test_a_document_in_a_file_of_lines_has_a_preset(folder: Path) -> None:
    golden = GOLDEN["hiertext"][0]
    path = folder / "train.jsonl"
    document = {**golden["document"], "padding": "x" * MAX_LINE_BYTES}
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")
    found = find_preset(path)
    assert found is not None
    samples, _ = import_samples(path, folder / "out", mapping=found)
    labels = [[label for label, _ in boxes] for boxes in list_answers(samples)]
    assert labels == [["MIND THE", "STEP"]]
