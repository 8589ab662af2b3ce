"""The command `finesight train` itself: exit codes, signals, and what stays on disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import final_files, losses, make_task, write_recipe

from finesight import storage
from finesight.cli.app import run

COMMAND = [sys.executable, "-c", "from finesight.cli.app import main; main()", "train"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", make_task(tmp_path / "task"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command said about bad input."""
    assert run(["train", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "expected: " in said
    assert "remedy: " in said
    return said


def test_result_as_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", str(recipe), f"output={tmp_path / 'run'}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 6
    assert result["after"]["held_out_loss"] < result["before"]["held_out_loss"]
    assert {row["part"] for row in result["moved"] if row["trained"]} == {"merger", "language"}


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_a_checkpoint_and_exit_code_75(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The whole group gets the signal, as from a terminal; then the run goes on to the same end."""
    settings = [str(recipe), "train.epochs=60", "train.workers=2", "train.save_every=50"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        [*COMMAND, *settings, f"output={stopped}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(stopped / "metrics.jsonl", 5, process)
    os.killpg(process.pid, number)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert f"stopped by {number.name}" in said
    assert "--resume" in said
    finished = len(losses(stopped))
    assert 4 <= finished < 165
    storage.verify_folder(stopped / "checkpoints" / f"step-{finished}")
    texts = []
    for output, more in ((stopped, ["--resume"]), (whole, [])):
        command = [*COMMAND, *settings, f"output={output}", *more]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stderr)
    assert f"going on after step {finished} of 165" in texts[0]
    assert final_files(stopped) == final_files(whole)
    assert losses(stopped) == losses(whole)


def test_folder_with_another_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path / 'run'}"
    assert run(["train", str(recipe), output]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    said = error_of(capsys, recipe, output)
    assert "holds another run" in said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("spoiled", ["a flipped bit", "a missing file"])
def test_damaged_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoiled: str
) -> None:
    output = f"output={tmp_path / 'run'}"
    assert run(["train", str(recipe), output]) == 0
    (tmp_path / "run" / "result.json").unlink()
    file = tmp_path / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    data = file.read_bytes()
    file.unlink()
    if spoiled == "a flipped bit":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    capsys.readouterr()
    assert run(["train", str(recipe), output, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "optimizer.safetensors" in said
    assert f"delete {file.parent} to resume from step 4" in said
    assert "Traceback" not in said
    storage.remove_folder(file.parent)
    assert run(["train", str(recipe), output, "--resume"]) == 0


def test_bad_recipes_and_bad_data_write_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path / 'run'}"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    broken = tmp_path / "broken.jsonl"
    broken.write_text((tmp_path / "task" / "train.jsonl").read_text() + '{"id": \n')
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    cases: dict[str, tuple[str, ...]] = {
        "train.bach=2": ("train.batch",),
        "train.batch=many": ("many", "a whole number"),
        f"data.train={tmp_path / 'none.jsonl'}": ("none.jsonl", "no such file"),
        f"data.train={empty}": ("empty.jsonl", "no samples"),
        f"data.train={broken}": ("broken.jsonl:12", "JSON"),
        f"model={tmp_path / 'hollow'}": ("hollow",),
        f"model={tmp_path / 'absent'}": ("absent",),
        "data.max_length=3": ("none of 11 samples",),
        "train.warmup=50": ("warm-up",),
    }
    for override, words in cases.items():
        said = error_of(capsys, recipe, output, override)
        assert all(word in said for word in words), said
        assert not (tmp_path / "run").exists(), override


def test_full_disk(recipe: Path, tmp_path: Path) -> None:
    """Files may grow to 100 KB, less than a checkpoint: a refusal of the system itself."""
    output = tmp_path / "run"
    done = subprocess.run(
        [*COMMAND, str(recipe), f"output={output}", "train.workers=0"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: file too large" in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == []
    done = subprocess.run(
        [*COMMAND, str(recipe), f"output={output}", "--resume"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in losses(output)] == [1, 2, 3, 4, 5, 6]
