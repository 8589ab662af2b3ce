"""The quickstart at a size that takes seconds: every stage, the printed commands, going on."""

from __future__ import annotations

import io
import json
import shlex

import pytest
from rich.console import Console

from finesight.cli.app import run
from finesight.errors import UserError
from finesight.model.tiny import SIZES
from finesight.quickstart import Plan, quickstart

SMALL = Plan(pictures=20, held_out=4, steps=2, size=SIZES["test"])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Folder (of a name that needs quoting), result and what was printed of a small quickstart."""
    out = tmp_path_factory.mktemp("quick") / "a start: #1"
    console = Console(file=io.StringIO(), width=200)
    result = quickstart(out, console, SMALL)
    return out, result, console.file.getvalue()


def test_every_stage_leaves_its_files(done):
    out, _, _ = done
    names = {path.name for path in out.iterdir()}
    assert names == {"recipe.yaml", "shapes", "data", "model", "run", "drawn"}
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 16
    assert (out / "run" / "model" / "model.safetensors").exists()


def test_result_is_measured_before_and_after_on_all_held_out_pictures(done):
    out, result, _ = done
    assert (result.result.before.step, result.result.after.step) == (0, 2)
    for name in ("before", "after"):
        assert len((out / "run" / "predictions" / f"{name}.jsonl").read_text().splitlines()) == 4
    assert {part.part for part in result.result.moved if part.trained} == {
        "vision",
        "merger",
        "language",
        "embeddings",
    }


def test_answers_stand_beside_what_is_there(done):
    out, result, printed = done
    rows = [json.loads(line) for line in (out / "shapes" / "labels.jsonl").read_text().splitlines()]
    assert len(result.answers) == 4
    for answer, row in zip(result.answers, rows[-4:], strict=True):
        assert answer.truth.startswith(row["shapes"][0])
        assert answer.truth in printed
        assert (out / "drawn" / answer.picture.name).exists()


def _commands(printed: str) -> list[list[str]]:
    lines = [line.strip() for line in printed.splitlines()]
    return [shlex.split(line[2:])[1:] for line in lines if line.startswith("$ finesight")]


def test_printed_commands_do_what_was_done(done, tmp_path, capsys):
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
    assert [command[0] for command in others] == ["train", "data", "predict", "eval", "data"]
    for command in others[1:]:
        capsys.readouterr()
        assert run(command) == 0, command
        assert capsys.readouterr().out, command


def test_a_second_time_nothing_is_done_again(done):
    out, first, _ = done
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    second = quickstart(out, Console(file=io.StringIO()), SMALL)
    assert second.result == first.result
    assert second.answers == first.answers
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        quickstart(tmp_path, Console(file=io.StringIO()), SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_another_plan_is_refused_too(done):
    with pytest.raises(UserError, match="holds something else"):
        quickstart(done[0], Console(file=io.StringIO()), Plan(steps=3))


def test_json_is_data(done):
    record = json.loads(json.dumps(done[1].as_json()))
    assert set(record) == {"result", "answers", "seconds"}
    assert set(record["answers"][0]) == {"picture", "truth", "before", "after"}
