"""Data sets of dataset_info.json: the printed import reads their keys and roles."""

import json
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from convert_fixtures import LLAMA_FACTORY_SETTINGS, convert_settings, notes_by_setting
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.ingest.data_operations import import_data
from finesight.samples.sample import join_text, read_samples

CASES = load_cases("registered_data")


def convert(folder: Path, entry: dict[str, Any], records: list[Any], **settings: object) -> Any:
    """Register records as a data set, and convert a run on it."""
    (folder / "data").mkdir(exist_ok=True)
    write_gray_image(folder / "data" / "a.png", 40, 20)
    info = {"tickets": {"file_name": "rows.json", **entry}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "data" / "rows.json").write_text(json.dumps(records))
    return convert_settings(folder, LLAMA_FACTORY_SETTINGS | settings)


@pytest.mark.parametrize("name", CASES["read"])
def test_printed_import_reads_registered_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CASES["read"][name]
    done = convert(tmp_path, case["entry"], case["records"], stage=case.get("stage", "sft"))
    (arguments,) = done.imports
    assert ("mapping" in arguments, "columns" in arguments) == (
        case["by"] == "mapping",
        case["by"] == "columns",
    )
    import_data(**arguments)
    samples = read_samples(Path("samples/tickets/data.jsonl"))
    assert len(samples) == len(case["records"])
    sample = samples[0]
    turns = [[message.role, join_text(message.content)] for message in sample.messages]
    assert turns == case["turns"]
    assert [part.type for part in sample.messages[-2].content].count("image") == 1
    assert join_text(sample.rejected) == case.get("rejected", "")
    assert sample.label == case.get("label")


@pytest.mark.parametrize("name", CASES["noted"])
def test_names_that_a_mapping_cannot_state_are_noted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CASES["noted"][name]
    done = convert(tmp_path, case["entry"], case["records"])
    assert case["note"] in notes_by_setting(done, "differs")["tickets: columns"]


def test_mapping_files_are_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CASES["read"]["sharegpt"]
    own = tmp_path / "recipe-tickets.mapping.yaml"
    own.write_text("mine")
    done = convert(tmp_path, case["entry"], case["records"])
    assert own.read_text() == "mine"
    assert done.imports[0]["mapping"] == str(tmp_path / "recipe-tickets-2.mapping.yaml")


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_ranking_is_for_preference_learning(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = convert(tmp_path, {"ranking": True, "formatting": "sharegpt"}, [], stage=stage)
    assert done.imports[0]["source"] == "data/rows.json"
    with pytest.raises(UserError, match="preference learning") as caught:
        convert(tmp_path, {"ranking": True}, [], stage="sft")
    assert "set the `stage` for it" in str(caught.value.remedy)
