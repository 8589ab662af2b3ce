import json

import pytest

from finesight.app import answer_preview
from finesight.app.answer_preview import read_answer_preview


def write_lines(file, answers):
    lines = [{"id": "1", "image": f"a/{n}.png", "answer": one} for n, one in enumerate(answers)]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_preview_has_the_fields_of_answers(tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    write_lines(file, ['{"price": 3, "item": "=1"}', "none", *["x"] * 9])
    table = read_answer_preview(file)
    assert table.header == ["image", "price", "item"]
    assert table.rows[:2] == [["0.png", "3", "=1"], ["1.png", "", ""]]
    assert len(table.rows) == 5
    write_lines(file, ["x\u202e" * 900])
    table = read_answer_preview(file)
    assert table.header == ["image", "answer"]
    assert "\u202e" not in table.rows[0][1]
    monkeypatch.setattr(answer_preview, "MAX_PREVIEW_BYTES", 100)
    assert read_answer_preview(file) is None, "no whole line within the limit"


OTHERS = ("", "{", "[]\n", "1\n", "{}\n", '{"answer": 1, "id": 2}\n', "null\n")


@pytest.mark.parametrize("text", OTHERS)
def test_file_of_another_form_has_no_preview(tmp_path, text):
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    assert read_answer_preview(file) is None


def test_missing_and_special_files_have_no_preview(tmp_path):
    assert read_answer_preview(tmp_path / "gone") is None
    assert read_answer_preview(tmp_path) is None
