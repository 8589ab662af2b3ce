"""Tests of the run directory reader."""

from itertools import count
from pathlib import Path

import pytest
from run_dir_fixtures import FakeRunDir, make_step_line

from finesight.report.run_page import render_run_page
from finesight.report.run_reader import read_run


def test_damaged_files_are_listed(tmp_path: Path) -> None:
    run = FakeRunDir(tmp_path / "run")
    run.write_metrics(steps=3)
    names = ["guard.json", "param_audit.json", "recipe.yaml", "result.json"]
    for name in names:
        run.write(name, "{")
    with (run.folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    record = read_run(run.folder)
    assert sorted(record.unreadable_files) == names
    assert (record.param_changes, record.result, record.recipe) == (None, None, {})
    assert len(record.steps) == 3


def test_fingerprints_of_newest_checkpoint(tmp_path: Path) -> None:
    run = FakeRunDir(tmp_path / "run")
    for step, name in ((9, "old"), (10, "new")):
        state = f'{{"identity": {{"data.train": "{name}"}}}}'
        run.write(f"checkpoints/step-{step}/state.json", state)
    (run.folder / "checkpoints" / ".step-11.partial").mkdir()
    assert read_run(run.folder).checkpoint_identity == {"data.train": "new"}


def test_damaged_line_is_skipped_and_listed(tmp_path: Path) -> None:
    """Lines after the damaged one are read."""
    run = FakeRunDir(tmp_path / "run")
    run.write_metrics(steps=9)
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged, named in (("{\n", "line 5 of"), ("[" * 99999 + "\n", "2 lines from line 5 of")):
        at = 4 if damaged == "{\n" else 6
        path.write_text("".join([*lines[:at], damaged, *lines[at + 1 :]]))
        lines[at] = damaged
        record = read_run(run.folder)
        assert record.steps[-1]["step"] == 9
        assert record.unreadable_files == [f"{named} metrics.jsonl"]


@pytest.mark.parametrize("value", ["x", [1, 2], {"a": 1}, 10**400, float("inf")], ids=count())
def test_invalid_values_count_as_missing(tmp_path: Path, value: object) -> None:
    run = FakeRunDir(tmp_path / "run")
    lines = [make_step_line(step) for step in range(1, 5)]
    lines[1] |= {"loss": value, "peak_memory_gb": value, "skipped_steps": value, "mfu": value}
    lines[2] |= {"step_s": value}
    lines[3] |= {"step": value}
    run.write_lines("metrics.jsonl", lines)
    record = read_run(run.folder)
    assert [line["step"] for line in record.steps] == [1, 2]
    assert record.steps[1]["loss"] is None
    render_run_page(run.folder)


@pytest.mark.parametrize("max_bytes", [5000, 20_000, None])
def test_middle_of_a_large_file_is_left_out(tmp_path: Path, max_bytes: int | None) -> None:
    run = FakeRunDir(tmp_path / "run")
    run.write_metrics(steps=100)
    record = read_run(run.folder, max_bytes=max_bytes)
    steps = [line["step"] for line in record.steps]
    assert (steps[0], steps[-1]) == (1, 100)
    is_whole = (run.folder / "metrics.jsonl").stat().st_size <= (max_bytes or 1e9)
    assert (len(steps) == 100) == is_whole
    assert steps == sorted(set(steps))
    assert record.unreadable_files == ([] if is_whole else ["the middle of metrics.jsonl"])
    assert "the middle of" in render_run_page(run.folder, max_bytes=5000)


def test_sparse_files_of_a_run_are_read_in_part(tmp_path: Path) -> None:
    run = FakeRunDir(tmp_path / "run")
    run.write_metrics(steps=3)
    for name in ("metrics.jsonl", "result.json", "recipe.yaml", "responses.jsonl"):
        with (run.folder / name).open("ab") as file:
            file.truncate(300 << 30)
    record = read_run(run.folder, max_bytes=5000)
    assert [line["step"] for line in record.steps] == [1, 2, 3]
    assert {"result.json", "recipe.yaml"} <= {*record.unreadable_files}
    assert "run" in render_run_page(run.folder, max_bytes=5000)
