"""Foreign rows that cannot be read are told by what is wrong with them, not by who noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversing import checked, codes
from scenery import paint, write_jsonl


def turns(question: str, answer: str = "A square.", **more):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": said, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png", 100, 60)
    return tmp_path


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (turns("<image>\nWhat?", image="a.png"), None),
        (turns("<image>\n<image>\nWhat?", image="a.png"), "marks-differ"),
        (turns("What?", image="a.png"), "marks-differ"),
        (turns("<image>\nWhat?", image="gone.png"), "picture-missing"),
        (turns("<image>\nWhat?", image="https://pictures/a.png"), "picture-missing"),
        (turns("<image>\nWhat?<|image_pad|>", image="a.png"), "placeholder-typed"),
        (turns("<image>\nWhat?", "", image="a.png"), "empty-answer"),
        (turns("<image>\nWhat?", "A square.<|im_end|>", image="a.png"), "special-token"),
        ({"conversations": turns("<image>")["conversations"][:1]}, "marks-differ"),
        ({"conversations": turns("What?")["conversations"][:1]}, "roles-out-of-order"),
        ({"conversations": [{"from": "human"}]}, "row-unreadable"),
    ],
)
def test_a_conversation(folder, record, code):
    source = write_jsonl(folder / "rows.jsonl", [record])
    found = checked(source, format="llava")
    assert codes(found) == ({code: 1} if code else {}), json.dumps(record)


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_a_table_without_an_answer(folder, answer):
    source = write_jsonl(folder / "rows.jsonl", [{"image": "a.png", "text": answer}])
    columns = {"image": "image", "answer": "text"}
    found = checked(source, format="table", columns=columns, prompt="What?")
    assert codes(found) == {"empty-answer": 1}


def test_boxes_keep_their_faults_on_the_way(folder):
    rows = [{"image": "a.png", "box": box} for box in ([50, 10, 60, 20], [90, 10, 200, 20])]
    source = write_jsonl(folder / "rows.jsonl", rows)
    columns = {"image": "image", "box": "box"}
    found = checked(source, format="table", columns=columns, prompt="Where?")
    assert codes(found) == {"box-outside": 1}
    assert found.findings[0].where == f"{source}:2"
    assert found.findings[0].shown[0].boxes == ((90, 10, 200, 20),)
