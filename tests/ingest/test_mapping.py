"""Mapping files: paths, values, lists, the account of keys, and errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from case_files import load_cases
from image_fixtures import write_gray_image
from mapping_fixtures import build_context, read_record, summarize_example

from finesight.errors import UserError
from finesight.ingest.field_path import join_location, parse_path
from finesight.ingest.mapped_rows import parse_mapped_row
from finesight.ingest.mapping import RecordMapping, load_mapping, parse_mapping, write_schema
from finesight.ingest.mapping_format import list_columns
from finesight.ingest.row_reader import SourceRow

CASES = load_cases("mapping")
PAIR = {"question": "c", "answer": "d"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 400 x 200 pixels and b.png of 1000 x 500."""
    write_gray_image(tmp_path / "a.png", 400, 200)
    write_gray_image(tmp_path / "b.png", 1000, 500)
    return tmp_path


def build_mapping(roles: dict[str, Any]) -> RecordMapping:
    """Build a mapping from roles, as a file with them."""
    return parse_mapping({"version": 1, **roles}, "m.yaml")


@pytest.mark.parametrize("case", CASES["records"], ids=lambda case: case["name"])
def test_records_become_samples(case: dict[str, Any], folder: Path) -> None:
    mapping = build_mapping(case["mapping"])
    found = read_record(case["record"], mapping, folder)
    assert [summarize_example(one) for one in found.examples] == case["samples"]
    assert [one.location for one in found.unused] == case.get("unused", [])


@pytest.mark.parametrize("case", CASES["invalid_records"], ids=lambda case: case["what"])
def test_records_that_do_not_fit_are_errors(case: dict[str, Any], folder: Path) -> None:
    row = SourceRow(number=3, location="line 3", record=case["record"], stem="rows")
    mapping = build_mapping(case["mapping"])
    with pytest.raises(UserError, match=case["what"]) as caught:
        parse_mapped_row(row, build_context(folder), mapping)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("case", CASES["invalid_mappings"], ids=lambda case: case["what"])
def test_invalid_mappings_are_errors(case: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=case["what"]) as caught:
        parse_mapping(yaml.safe_load(case["mapping"]), "m.yaml")
    assert caught.value.where.startswith("m.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty key at character 1"),
        ("a..b", "empty key at character 3"),
        ("a.", "empty key at character 3"),
        ('"a"b', "no dot at character 4"),
        ("?", "an empty key"),
        ("$", "the complete record"),
        (".".join("a" * 33), "more than 32 keys"),
    ],
)
def test_malformed_paths_are_errors(text: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        parse_path(text)


@pytest.mark.parametrize("key", ["a", "a.b", "a b", '"', "*", "?", "$", " a", "数", "a?", "0"])
def test_locations_are_paths_to_their_value(key: str, folder: Path) -> None:
    record = {"image": "a.png", "answer": "x", key: {"inner": 1}}
    mapping = build_mapping({"images": "image", "answer": "answer"})
    (unused,) = read_record(record, mapping, folder, "").unused
    again = build_mapping(
        {"images": "image", "answer": "answer", "meta": {"found": unused.location}}
    )
    (example,) = read_record(record, again, folder, "").examples
    assert example.meta == {"found": 1}
    assert join_location("", key) == unused.location.rpartition(".inner")[0]


@pytest.mark.parametrize("case", CASES["records"], ids=lambda case: case["name"])
def test_schema_accepts_valid_mappings(case: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="the extra `schema` is not installed")
    jsonschema.validate({"version": 1, **case["mapping"]}, json.loads(write_schema()))


@pytest.mark.parametrize(
    ("roles", "columns"),
    [
        ({"images": "a.id", "answer": "$.b?", "meta": ["c.0.id"]}, {"a", "b", "c"}),
        ({"answer": {"template": "{a.id} {b}"}, "ignore": ["*"]}, {"a", "b"}),
        ({"sample": "a", "question": "id", "answer": "$.b", "split": "c"}, {"a", "b", "c"}),
        ({"messages": {"each": "a.*", "question": "id", "answer": "$.b"}}, {"a", "b"}),
        ({"group": "a", "answer": "rows.0.b", "messages": {"each": "rows", **PAIR}}, {*"abcd"}),
        ({"answer": {"path": "a", "lookup": {"list": "b", "key": "id", "value": "x"}}}, {"a", "b"}),
        ({"tables": {"t": {"file": "t.json", "key": "id", "by": "a"}}, "answer": "t.x"}, {*"at"}),
    ],
)
def test_columns_are_the_keys_of_a_record(roles: dict[str, Any], columns: set[str]) -> None:
    assert list_columns(build_mapping(roles)) == columns


@pytest.mark.parametrize("role", ["images", "question", "answer"])
def test_number_of_a_column_needs_quotes(role: str) -> None:
    with pytest.raises(UserError, match="0 is neither a path nor an object") as caught:
        build_mapping({"images": "image", "question": "q", "answer": "a", role: 0})
    assert caught.value.remedy == 'write a column whose name is a number in quotes: "0"'


def test_missing_mapping_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_mapping(tmp_path / "m.yaml")


def test_remedy_for_lower_case_letters_translates_them(folder: Path) -> None:
    roles: dict[str, Any] = {"images": "i", "question": "q", "choices": "c", "answer": "a"}
    record = {"i": "a.png", "q": "Which?", "c": ["cup", "hat"], "a": "b"}
    row = SourceRow(number=1, location="line 1", record=record, stem="rows")
    with pytest.raises(UserError) as caught:
        parse_mapped_row(row, build_context(folder), build_mapping(roles))
    _, _, values = str(caught.value.remedy).partition("values: ")
    roles["answer"] = {"path": "a", "values": yaml.safe_load(values)}
    found = read_record(record, build_mapping(roles), folder)
    assert summarize_example(found.examples[0])["answers"] == [["B"]]
