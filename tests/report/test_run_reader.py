"""Tests of the run directory reader."""

from pathlib import Path

from each_value import each
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


@each("value", ["x", [1, 2], {"a": 1}, 10**400, float("inf")])
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
