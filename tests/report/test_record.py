"""Run folders as they are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import MadeRun, answer_line, step_line

from finesight.errors import UserError
from finesight.report.record import read_record
from finesight.report.run_page import run_page


def test_a_whole_run(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.trained()
    run.finished()
    for name in ("step-100", "after", "step-20", "before", "other"):
        run.answered(name, [answer_line("a", "", "", 1.0)])
    run.lines("dropped.jsonl", [{"id": "x", "reason": "over 10 tokens"}])
    record = read_record(run.folder)
    assert [line["step"] for line in record.steps] == [*range(1, 61)]
    assert [line["step"] for line in record.measured] == [0, 60]
    assert [line["device"] for line in record.starts] == ["NVIDIA H200"]
    assert [path.stem for path in record.answers] == ["before", "step-20", "step-100", "after"]
    assert list(record.weights) == ["adapter/adapter_model.safetensors"]
    assert record.dropped == [{"id": "x", "reason": "over 10 tokens"}]
    assert record.recipe["eval"] == {"metric": "latex"}
    assert record.unreadable == []


def test_a_manifest_is_enough(tmp_path: Path) -> None:
    record = read_record(MadeRun(tmp_path / "run").folder)
    assert (record.steps, record.measured, record.moved, record.result) == ([], [], None, None)
    assert (record.weights, record.identity, record.answers) == ({}, {}, [])


def test_without_one_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the folder of a run[\s\S]*manifest\.json"):
        read_record(tmp_path)


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    run.trained(steps=3)
    for name in ("moved.json", "result.json", "recipe.yaml"):
        run.write(name, "{")
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    record = read_record(run.folder)
    assert sorted(record.unreadable) == ["moved.json", "recipe.yaml", "result.json"]
    assert (record.moved, record.result, record.recipe) == (None, None, {})
    assert len(record.steps) == 3


def test_files_of_the_wrong_kind_are_empty(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    for name in ("moved.json", "result.json", "adapter/sha256.json"):
        run.write(name, "7")
    run.write("metrics.jsonl", "7\n")
    run.write("manifest.json", "[]")
    record = read_record(run.folder)
    assert (record.moved, record.result, record.steps, record.manifest) == (None, None, [], {})


def test_fingerprints_come_from_the_newest_checkpoint(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run")
    for step, name in ((9, "old"), (10, "new")):
        state = f'{{"identity": {{"data.train": "{name}"}}}}'
        run.write(f"checkpoints/step-{step}/state.json", state)
    (run.folder / "checkpoints" / ".step-11.partial").mkdir()
    assert read_record(run.folder).identity == {"data.train": "new"}


def test_a_damaged_line_is_left_out_and_named(tmp_path: Path) -> None:
    """What comes after it counts: the run did not end there."""
    run = MadeRun(tmp_path / "run")
    run.trained(steps=9)
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged, named in (("{\n", "line 5 of"), ("[" * 99999 + "\n", "2 lines from line 5 of")):
        at = 4 if damaged == "{\n" else 6
        path.write_text("".join([*lines[:at], damaged, *lines[at + 1 :]]))
        lines[at] = damaged
        record = read_record(run.folder)
        assert record.steps[-1]["step"] == 9
        assert record.unreadable == [f"{named} metrics.jsonl"]


@pytest.mark.parametrize("value", ["x", [1, 2], {"a": 1}, 10**400, float("inf")])
def test_values_of_another_kind_are_taken_for_missing(tmp_path: Path, value: object) -> None:
    run = MadeRun(tmp_path / "run")
    lines = [step_line(step) for step in range(1, 5)]
    lines[1] |= {"loss": value, "memory_gb": value, "skipped": value, "utilisation": value}
    lines[2] |= {"seconds": value}
    lines[3] |= {"step": value}
    run.lines("metrics.jsonl", lines)
    record = read_record(run.folder)
    assert [line["step"] for line in record.steps] == [1, 2]
    assert record.steps[1]["loss"] is None
    run_page(run.folder)
