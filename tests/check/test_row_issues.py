"""Foreign rows that cannot be read are told by what is wrong with them, not by who noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from case_files import load_cases
from check_fixtures import count_codes, run_check
from image_fixtures import write_gray_image, write_jsonl

CASES = load_cases("row_issues")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gray_image(tmp_path / "a.png", 100, 60)
    return tmp_path


@pytest.mark.parametrize(("record", "code"), CASES["test_invalid_conversation_row"])
def test_invalid_conversation_row(folder, record, code):
    source = write_jsonl(folder / "rows.jsonl", [record])
    found = run_check(source, format="llava")
    assert count_codes(found) == ({code: 1} if code else {}), json.dumps(record)


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_table_row_without_answer(folder, answer):
    source = write_jsonl(folder / "rows.jsonl", [{"image": "a.png", "text": answer}])
    columns = {"image": "image", "answer": "text"}
    found = run_check(source, format="table", columns=columns, prompt="What?")
    assert count_codes(found) == {"empty-answer": 1}


def test_box_issues_of_table_rows(folder):
    # Rows with the same image and question would be one sample.
    boxes = {"a.png": [50, 10, 60, 20], "./a.png": [90, 10, 200, 20]}
    rows = [{"image": name, "box": box} for name, box in boxes.items()]
    source = write_jsonl(folder / "rows.jsonl", rows)
    columns = {"image": "image", "box": "box"}
    found = run_check(source, format="table", columns=columns, prompt="Where?")
    assert count_codes(found) == {"box-outside": 1}
    assert found.issues[0].where == f"{source}:2"
    assert found.issues[0].images[0].boxes == ((90, 10, 200, 20),)
