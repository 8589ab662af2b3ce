"""Mappings from chosen roles: valid files that read the records they were chosen for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.ingest.data_operations import import_data
from finesight.ingest.role_choices import build_mapping, format_mapping
from finesight.samples.sample import join_text, read_samples


def import_records(
    folder: Path, records: list[dict[str, Any]], roles: dict[str, str], **options: Any
) -> list[list[str]]:
    """Import records by the mapping of chosen roles, and return the texts of each sample."""
    write_gray_image(folder / "a.png", 40, 20)
    (folder / "rows.json").write_text(json.dumps(records))
    (folder / "m.yaml").write_text(format_mapping(build_mapping(roles, records)))
    import_data(folder / "rows.json", folder / "out", mapping=folder / "m.yaml", **options)
    samples = read_samples(folder / "out" / "data.jsonl")
    return [[join_text(message.content) for message in sample.messages] for sample in samples]


def test_nested_values(tmp_path):
    records = [
        {"file": "a.png", "ask": {"text": "How many?"}, "out": {"n": 2}, "by": "Ann"},
        {"file": "a.png", "ask": {"text": "Which?"}, "out": {"n": 3}, "by": None},
    ]
    roles = {"file": "images", "ask.text": "question", "out.n": "answer", "by": "meta"}
    assert build_mapping(roles, records)["meta"] == ["by?"]
    assert import_records(tmp_path, records, roles) == [["How many?", "2"], ["Which?", "3"]]


def test_items_of_a_list_with_question_and_answer_are_samples(tmp_path):
    turns = [{"q": "How many?", "a": "Two."}, {"q": "Which?", "a": "Blue."}]
    records = [{"file": "a.png", "license": "CC0", "height": 20, "qa": turns}]
    roles = {"file": "images", "license": "meta", "height": "ignore"}
    roles |= {"qa.*.q": "question", "qa.*.a": "answer"}
    assert import_records(tmp_path, records, roles) == [["How many?", "Two."], ["Which?", "Blue."]]


def test_fields_and_several_parts_of_a_question(tmp_path):
    records = [{"file": "a.png", "q": "Read.", "hint": "Top left.", "x": {"a": 1}, "b": "two"}]
    roles = {"file": "images", "q": "question", "hint": "question", "x.a": "fields", "b": "fields"}
    ((question, answer),) = import_records(tmp_path, records, roles)
    assert question == "Read.\nTop left."
    assert json.loads(answer) == {"a": 1, "b": "two"}


def test_items_of_a_list_are_several_answers(tmp_path):
    records = [{"file": "a.png", "q": "Which?", "answers": ["red", "crimson"]}]
    roles = {"file": "images", "q": "question", "answers.*": "answer"}
    found = import_records(tmp_path, records, roles)
    assert found == [["Which?", "red"], ["Which?", "crimson"]]


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ({"file": "images", "a": "answer", "b": "answer"}, "2 keys have the same role: a, b"),
        ({"file": "images", "a": "question"}, "answer"),
    ],
)
def test_roles_without_a_mapping(roles, what):
    with pytest.raises(UserError, match=what):
        build_mapping(roles, [{"file": "a.png", "a": "x", "b": "y"}])


def test_file_keeps_names_of_any_language():
    text = format_mapping(
        build_mapping({"图": "images", "答案": "answer"}, [{"图": "a", "答案": "b"}])
    )
    assert "答案" in text
    assert yaml.safe_load(text)["answer"] == "答案"
