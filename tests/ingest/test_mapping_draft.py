"""Drafts of mappings: the paths of all keys, for files and folders."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_fixtures import write_gray_image, write_jsonl

from finesight.errors import UserError
from finesight.ingest.formats.table import UnknownRolesError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.mapping_draft import detect_roles, list_examples
from finesight.ingest.source_fetch import fetch_source

SPOT = {"x": 1, "note": "wet"}


@pytest.mark.parametrize(
    ("records", "paths"),
    [
        ([{"spots": {"k1": SPOT, "k2": SPOT}}], ["spots.*.x", "spots.*.note"]),
        ([{"spots": {"k1": SPOT}}, {"spots": {"k2": SPOT}}], ["spots.*.x", "spots.*.note"]),
        # Keys of all records are names, and so are those of a single object.
        ([{"a": {"n": SPOT}}, {"a": {"n": SPOT}}], ["a.n.x", "a.n.note"]),
        ([{"a": {"n": SPOT}}], ["a.n.x", "a.n.note"]),
        ([{"a": {"p": {"x": 1}, "q": {"y": 2}}}], ["a.p.x", "a.q.y"]),
        ([{"a": {"asks": {"t": "?"}, "says": {"t": "."}}}], ["a.asks.t", "a.says.t"]),
        ([{"a": [{"k1": {"c": [SPOT]}}, {"k2": {"c": []}}]}], ["a.*.*.c.*.x", "a.*.*.c.*.note"]),
        ([{"i": {"bytes": b"x", "path": "a.png"}}, {"j": None}], ["i", "j"]),
    ],
)
def test_identifiers_are_each_item(records: list[dict[str, Any]], paths: list[str]) -> None:
    assert [*list_examples(records)] == paths


def test_folder_with_a_single_table_has_a_draft(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "data" / "shots" / "a.png")
    row = {"shot": "shots/a.png", "score": 3, "told": [{"by": "R1", "text": "A wet road."}]}
    write_jsonl(tmp_path / "data" / "rows.jsonl", [row, row])
    with pytest.raises(UnknownRolesError) as caught:
        detect_roles(tmp_path / "data", ImportOptions(), tmp_path / "out")
    assert "score" not in str(caught.value)
    draft = tmp_path / "out-mapping.yaml"
    assert f"--mapping {draft}" in str(caught.value.remedy)
    assert 'told.*.text: "A wet road."' in draft.read_text()


def test_remedy_of_an_unknown_table_names_the_columns_that_it_leaves_out(tmp_path: Path) -> None:
    row = {"video": "walk", "question": "Why?", "answer": 1, "a0": "rain", "a1": "snow", "qid": 7}
    write_jsonl(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(UnknownRolesError, match="cannot be detected") as caught:
        detect_roles(tmp_path / "rows.jsonl", ImportOptions(), tmp_path / "out")
    assert "--map video=video, which leaves out a0, a1" in str(caught.value.remedy)


def test_folder_with_a_single_table_is_read_by_its_preset(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "data" / "a.png", 400, 200)
    objects = [{"label": "pan", "coordinates": {"x": 9, "y": 9, "width": 4, "height": 6}}]
    table = tmp_path / "data" / "_annotations.createml.json"
    table.write_text(json.dumps([{"image": "a.png", "annotations": objects}]), encoding="utf-8")
    detected = detect_roles(tmp_path / "data", ImportOptions(), tmp_path / "out")
    assert detected.path == table
    assert detected.options.mapping is not None
    assert detected.options.mapping.name == "createml"


@pytest.mark.parametrize("with_texts", [True, False])
def test_draft_of_a_table_in_a_subfolder_begins_paths_there(
    tmp_path: Path, with_texts: bool
) -> None:
    folder = tmp_path / "data" / "tags"
    write_gray_image(folder / "17.png")
    row: dict[str, Any] = {"plate": 17, "told": [{"by": "R1", "text": "A wet road."}]}
    if with_texts:
        row = {"plate": 17, "question": "Which?", "answer": "A wet road."}
    write_jsonl(folder / "rows.jsonl", [row])
    with pytest.raises(UserError) as caught:
        detect_roles(tmp_path / "data", ImportOptions(), tmp_path / "out")
    draft = tmp_path / "out-mapping.yaml"
    assert f"--mapping {draft}" in str(caught.value.remedy)
    content = yaml.safe_load(draft.read_text())
    assert content["images"] == {"template": "{plate}.png"}


def test_json_lines_of_a_table_have_any_suffix(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Which?", "answer": "Two."}
    detected = detect_roles(
        write_jsonl(tmp_path / "rows.dat", [row]), ImportOptions(), tmp_path / "out"
    )
    assert dict(detected.options.columns) == {
        "image": "image",
        "question": "question",
        "answer": "answer",
    }


def test_error_of_an_archive_names_it_and_no_folder_of_its_own(tmp_path: Path) -> None:
    archive = tmp_path / "data.tar"
    with tarfile.open(archive, "w") as tar:
        content = b'{"shot": "missing.png", "told": "A wet road.", "score": 3}'
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    with (
        pytest.raises(UserError) as caught,
        fetch_source(str(archive), out, ImportOptions()) as fetched,
    ):
        raise UserError("no roles", where=f"{fetched.path}, line 1", remedy="name them")
    assert str(caught.value.where) == f"{archive}/rows.jsonl, line 1"
