"""The quickstart at a size that takes seconds: every stage, the printed commands, going on."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from finesight.cli.app import run
from finesight.errors import UserError
from finesight.hub import TINY
from finesight.model.tiny import make_tiny
from finesight.quickstart import SHOWN, Plan, quickstart


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A plan of two steps with random weights."""
    model = make_tiny(tmp_path_factory.mktemp("models") / "tiny")
    return Plan(pictures=20, held_out=4, steps=2, model=str(model))


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """Folder (of a name that needs quoting), result and what was printed of a small quickstart."""
    out = tmp_path_factory.mktemp("quick") / "a start: #1"
    console = Console(file=io.StringIO(), width=200)
    result = quickstart(out, console, small)
    return out, result, console.file.getvalue()


def test_every_stage_leaves_its_files(done):
    out, _, _ = done
    names = {path.name for path in out.iterdir()}
    assert names == {"recipe.yaml", "tickets", "data", "run"}
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 16
    assert (out / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert (out / "run" / "report.html").exists()


def test_result_is_measured_before_and_after_on_all_held_out_pictures(done):
    out, result, _ = done
    assert (result.result.before.step, result.result.after.step) == (0, 2)
    assert result.result.after.headline == "f1"
    for name in ("before", "after"):
        assert len((out / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()) == 4
    assert {part.part for part in result.result.moved if part.trained} == {
        "vision",
        "merger",
        "language",
    }


def test_answers_stand_beside_what_the_tickets_say(done):
    out, result, printed = done
    with (out / "tickets" / "tickets.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert len(result.answers) == SHOWN
    for answer, row in zip(result.answers, rows[-4:], strict=True):
        assert {"picture": f"pictures/{answer.picture.name}", **json.loads(answer.truth)} == row
        assert answer.picture.samefile(out / "tickets" / row["picture"])
        assert f"{answer.picture.name}  says    {answer.truth}" in printed


def test_what_the_check_says_is_printed(done):
    out, _, printed = done
    assert f"{out / 'data' / 'train.jsonl'}: 16 rows, 16 samples" in printed
    assert "no faults found" in printed


def _commands(printed: str) -> list[list[str]]:
    lines = [line.strip() for line in printed.splitlines()]
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ finesight")]


def test_printed_commands_do_what_was_done(done, tmp_path, capsys, monkeypatch):
    out, _, printed = done
    first, *others = _commands(printed)
    assert first[:2] == ["data", "import"]
    first[3] = str(tmp_path / "again")
    assert run(first) == 0
    answers = [
        [json.loads(line)["messages"][-1] for line in file.read_text().splitlines()]
        for file in (out / "data" / "eval.jsonl", tmp_path / "again" / "eval.jsonl")
    ]
    assert answers[0] == answers[1]
    names = [command[0] for command in others]
    assert names == ["data", "train", "data", "predict", "eval", "chat", "merge", "data"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    for command in others:
        if command[0] == "train":
            command.append("--resume")
        if command[0] == "merge":
            command[2] = str(tmp_path / "merged")
        capsys.readouterr()
        assert run(command) == 0, command
        shown = capsys.readouterr()
        assert shown.out or command[0] == "train", command


def test_a_second_time_nothing_is_done_again(small, done):
    out, first, _ = done
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = quickstart(out, Console(file=io.StringIO()), small)
    assert second.result == first.result
    assert second.answers == first.answers
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        quickstart(tmp_path, Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "change", [{"pictures": 21}, {"held_out": 5}, {"steps": 3}, {"seed": 1}, {"model": TINY}]
)
def test_another_plan_is_refused_too(small, done, change):
    with pytest.raises(UserError, match="holds something else"):
        quickstart(done[0], Console(file=io.StringIO()), replace(small, **change))


def test_another_seed_draws_other_tickets(small, done, tmp_path):
    out = done[0]
    other = quickstart(tmp_path / "other", Console(file=io.StringIO()), replace(small, seed=1))
    assert other.answers[0].truth != done[1].answers[0].truth
    tables = [(folder / "tickets" / "tickets.csv") for folder in (out, tmp_path / "other")]
    assert tables[0].read_bytes() != tables[1].read_bytes()


def test_json_is_data(done):
    record = json.loads(json.dumps(done[1].as_json()))
    assert set(record) == {"result", "answers", "seconds"}
    assert set(record["answers"][0]) == {"picture", "truth", "before", "after"}
