"""Small quickstart: every stage, the printed commands, and resuming."""

import contextlib
import csv
import io
import json
import shlex
import sys
from dataclasses import replace

import pytest
from tiny_model import create_tiny_model

from finesight.cli.app import run_command
from finesight.errors import UserError
from finesight.ingest.init_operation import NUM_SHOWN_PREDICTIONS, QuickstartSettings, quickstart
from finesight.model_folder import TINY_MODEL


@pytest.fixture(scope="module")
def small_settings(tmp_path_factory):
    """A plan of two steps with random weights."""
    model = create_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return QuickstartSettings(num_images=20, num_eval_rows=4, steps=2, model=str(model))


@pytest.fixture(scope="module")
def finished_quickstart(small_settings, tmp_path_factory):
    """Folder (of a name that needs quoting), outcome and messages of a small quickstart."""
    out = tmp_path_factory.mktemp("quick") / "a start: #1"
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        outcome = quickstart(out, small_settings)
    return out, outcome, printed.getvalue()


def test_every_stage_writes_its_files(finished_quickstart):
    out, outcome, printed = finished_quickstart
    result = outcome.value
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "tickets", "data", "run"}
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 16
    assert (out / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert (out / "run" / "report.html").exists()
    assert f"{out / 'data' / 'train.jsonl'}: 16 rows, 16 samples" in printed
    assert "no issues found" in printed
    assert (result.before.step, result.after.step) == (0, 2)
    assert result.after.primary_metric == "f1"
    for name in ("before", "after"):
        assert len((out / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()) == 4
    trained = {part.part for part in result.param_changes if part.is_trained}
    assert trained == {"vision", "merger", "language"}
    assert json.loads(json.dumps(outcome.data))["steps"] == 2


def test_predictions_are_shown_with_references(finished_quickstart):
    out, outcome, _ = finished_quickstart
    with (out / "tickets" / "tickets.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))[-4:]
    shown = [line.split("label") for line in outcome.lines if "  label  " in line]
    assert len(shown) == NUM_SHOWN_PREDICTIONS
    for (name, reference), row in zip(shown, rows, strict=True):
        assert {"image": f"images/{name.strip()}", **json.loads(reference)} == row


def _commands(printed: str) -> list[list[str]]:
    lines = [line.strip() for line in printed.splitlines()]
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ finesight")]


def no_plan(recipe: object, **options: object) -> None:
    """Fail as the plan of a model that cannot be downloaded."""
    raise UserError("no connection")


def test_printed_commands_reproduce_the_result(finished_quickstart, tmp_path, capsys, monkeypatch):
    out, outcome, printed = finished_quickstart
    first, *others = _commands(printed)
    assert first[0] == "import"
    first[2] = str(tmp_path / "again")
    assert run_command(first) == 0
    answers = [
        [json.loads(line)["messages"][-1] for line in file.read_text().splitlines()]
        for file in (out / "data" / "eval.jsonl", tmp_path / "again" / "eval.jsonl")
    ]
    assert answers[0] == answers[1]
    assert [command[0] for command in others] == ["check", "train"]
    others += [shlex.split(str(step))[1:] for step in outcome.next_steps]
    names = [step.operation for step in outcome.next_steps]
    assert names == ["show", "predict", "eval", "chat", "merge", "init"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    monkeypatch.setattr("finesight.ingest.init_operation.plan", no_plan)
    for command in others:
        if command[0] == "train":
            command.append("--resume")
        if command[0] == "merge":
            command[2] = str(tmp_path / "merged")
        if command[0] == "init":
            command += [str(out / "tickets" / "tickets.csv"), "--task", "json"]
            command += ["--out", str(tmp_path / "own")]
        capsys.readouterr()
        assert run_command(command) == 0, command
        shown = capsys.readouterr()
        assert shown.out or command[0] == "train", command


def test_finished_quickstart_is_not_repeated(small_settings, finished_quickstart):
    out, first, _ = finished_quickstart
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = quickstart(out, small_settings)
    assert (second.value, second.lines[:-1]) == (first.value, first.lines[:-1])
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_folder_of_other_settings_is_rejected(small_settings, finished_quickstart, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    changes = [{"num_images": 21}, {"num_eval_rows": 5}, {"steps": 3}, {"seed": 1}]
    settings = [replace(small_settings, **change) for change in [*changes, {"model": TINY_MODEL}]]
    folders = [(finished_quickstart[0], one) for one in settings] + [(tmp_path, small_settings)]
    for folder, one in folders:
        with pytest.raises(UserError, match="not from a quickstart of this version"):
            quickstart(folder, one)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
