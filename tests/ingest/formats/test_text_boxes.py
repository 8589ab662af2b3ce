"""Boxes and points as numbers in texts: conversion at import, and reports of import and check."""

import json
import random
import re
from pathlib import Path

import pytest
from box_fixtures import import_samples, list_answers, write_box_image
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest.check.check_issues import CheckIssue
from finesight.ingest.check.data_checker import DataChecker, inputs_from_files
from finesight.ingest.exporter import export_dataset
from finesight.ingest.formats.dataset_format import NOTE_PIXELS, NOTE_THOUSANDTHS
from finesight.ingest.import_source import ImportOptions
from finesight.samples.sample import LocatedSample

CASES = load_cases("text_boxes")


def write_rows(root: Path, answer: str, question: str = "find fruit") -> Path:
    write_gray_image(root / "a.png", 300, 200)
    turns = [("user", f"<image>{question}"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return write_jsonl(root / "rows.jsonl", [{"messages": messages, "images": ["a.png"]}] * 3)


@pytest.mark.parametrize(
    ("answer", "units", "expected"), CASES["test_boxes_with_known_units_are_converted"]
)
def test_boxes_with_known_units_are_converted(tmp_path, answer, units, expected):
    samples, summary = import_samples(write_rows(tmp_path, answer), tmp_path / "o", box_units=units)
    assert json.loads(json.dumps(list_answers(samples))) == [expected] * 3
    note = NOTE_PIXELS if "bbox_2d" in answer else NOTE_THOUSANDTHS
    num_boxes = sum(isinstance(part, list) for part in expected)
    if num_boxes:
        assert summary.source_notes == ({note: 3 * num_boxes} if units is None else {})


@pytest.mark.parametrize(
    "answer", ["The kite [[80,70,150,90]] flies.", "[[80, 70, 150, 90], [1, 2, 9, 9]]"]
)
@pytest.mark.parametrize("name", ["samples", "ms-swift", "llava"])
def test_converted_lists_survive_an_export(tmp_path: Path, answer: str, name: str) -> None:
    source = write_rows(tmp_path, answer)
    samples, _ = import_samples(source, tmp_path / "first", box_units="1000")
    located = [LocatedSample(sample, tmp_path / "first") for sample in samples]
    export_dataset(located, tmp_path / name, name, copy_images=False)
    (file,) = (path for path in (tmp_path / name).iterdir() if path.stem == "data")
    again, _ = import_samples(file, tmp_path / "second")
    assert list_answers(again) == list_answers(samples)
    assert '"' not in str(list_answers(samples)[0])


NOTATIONS = """x1=20, y1=10, x2=120, y2=90|20,10,120,90|20 10 120 90|<point>20 40</point>
{"x":20,"y":10,"width":100,"height":60}|bbox: 20 10 120 90|<rect>20 10 120 90</rect>
{<20><10><120><90>}|[.1, .1, .6, .9]|[20，10，120，90]|[20px, 10px, 120px, 90px]
0 0.35 0.5 0.5 0.8|xmin=20 ymin=10 xmax=120 ymax=90|left 10%, top 20%, width 30%, height 40%
{"segmentation":[[20,10,120,10,120,90]]}|<quad>20,10 120,10 120,90 20,90</quad>
<box><xmin>20</xmin><ymin>10</ymin><xmax>120</xmax><ymax>90</ymax></box>
{"r": "{\\"x\\":20,\\"y\\":10,\\"width\\":100,\\"height\\":60}"}"""
YAML_BOX = "box:\n  x1: 20\n  y1: 10\n  x2: 120\n  y2: 90"
PLAIN_ANSWERS = """3|3 dogs and 2 cats|12.50|$12.50, $3.20 and $99.00|2026-11-26|11/26/2026|10:30
10:30-11:45|100, 200, 300|C:\\187\\110\\226\\174|width: 120, height: 60|1,250,000
a 20x30 cm plate|Call 555 123 4567 8901."""


def test_common_notations_are_reported_and_plain_numbers_are_not(tmp_path: Path) -> None:
    for text, is_reported in ((NOTATIONS, True), (PLAIN_ANSWERS, False)):
        for number, answer in enumerate([*re.split(r"[|\n]", text), *[YAML_BOX] * is_reported]):
            root = tmp_path / f"{is_reported}{number}"
            root.mkdir()
            question = "Where is the dog?" if is_reported else "Find the value."
            _, summary = import_samples(write_rows(root, answer, question), root / "out")
            assert bool(summary.source_notes) == is_reported, answer
            assert bool(find_issues(root)) == is_reported, answer


def test_errors_of_boxes_within_sentences(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "It is at [20, 10, 1120, 90].")
    for policy, text in ((None, "--on-invalid-box clip"), ("drop", "cannot be dropped")):
        with pytest.raises(UserError, match=text):
            import_samples(rows, tmp_path / "out", box_units="pixel", on_invalid_box=policy)


@pytest.mark.parametrize("number", [2, 12])
def test_broken_json_of_a_conversation_is_located(tmp_path: Path, number: int) -> None:
    turns = json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    rows = [{"messages": turns} for _ in range(20)]
    rows[number - 1] = {"messages": turns[:-1]}
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = rf"(row|line) {number}: messages is .* not valid JSON at line 1, column {len(turns)}"
    with pytest.raises(UserError, match=message):
        import_samples(source, tmp_path / "out")


def test_boxes_of_qwen_vl_next_to_image_placeholders(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 300, 200)
    values = ("<image>\nWhere?", "<box>(20,10),(120,90)</box>")
    turns = [{"from": who, "value": v} for who, v in zip(("human", "gpt"), values, strict=True)]
    for row in ({"image": "a.png"}, {"images": ["a.png"]}):
        source = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": turns, **row}])
        samples, _ = import_samples(source, tmp_path / next(iter(row)))
        assert list_answers(samples) == [[(None, (6, 2, 36, 18))]]


def find_issues(folder: Path) -> list[CheckIssue]:
    """Check the imported samples, and return the issues about coordinates in texts."""
    inputs = inputs_from_files([folder / "out" / "data.jsonl"], [], ImportOptions())
    result, _ = DataChecker(inputs, folder).run(single_process=True)
    return [issue for issue in result.issues if issue.code == "coordinates-in-text"]


@pytest.mark.parametrize(("answer", "kind"), CASES["test_coordinates_in_texts_are_reported"])
def test_coordinates_in_texts_are_reported(tmp_path: Path, answer: str, kind: str | None) -> None:
    _, summary = import_samples(write_rows(tmp_path, answer), tmp_path / "out")
    found = [issue.what for issue in find_issues(tmp_path)]
    expected = [f"3 samples with {kind} in their text"] if kind else []
    assert [note.partition(",")[0] for note in found] == expected
    notes = [f"{count} {note}" for note, count in summary.source_notes.items()]
    assert [note.partition(",")[0] for note in notes] == expected


def test_lists_that_are_no_boxes_are_not_reported(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png", 300, 200)
    values = ([80, 70, 150, 90], [90, 20, 60, 99], [5, 80, 60, 7], [120, 3, 7, 150])
    rows = [{"image": "a.png", "answer": str(value)} for value in values]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"image": "image", "answer": "answer"}
    options = {"columns": columns, "prompt": "Read the numbers."}
    _, summary = import_samples(source, tmp_path / "out", **options)
    assert summary.source_notes == {}


def test_check_names_the_units_that_match_the_images(tmp_path: Path) -> None:
    rng, rows = random.Random(0), []
    for number in range(25):
        width, height = rng.randrange(400, 900), rng.randrange(300, 700)
        x, y = rng.randrange(20, width // 2), rng.randrange(20, height // 2)
        box = (x, y, x + rng.randrange(60, width // 2), y + rng.randrange(60, height // 2))
        write_box_image(tmp_path / f"{number}.png", box, (width, height))
        sides = (width, height, width, height)
        answer = str([round(1000 * value / side) for value, side in zip(box, sides, strict=True)])
        rows.append({"image": f"{number}.png", "answer": answer})
    columns = {"image": "image", "answer": "answer"}
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    import_samples(source, tmp_path / "out", columns=columns, prompt="Where?")
    (issue,) = find_issues(tmp_path)
    assert issue.remedy.endswith("in thousandths of the image: --box-units 1000")
