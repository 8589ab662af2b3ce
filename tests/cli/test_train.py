"""The command `finesight train` itself: exit codes, signals, and what stays on disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from small_run import final_files, losses, make_task, write_recipe

from finesight import digests
from finesight.cli.app import run

COMMAND = [sys.executable, "-c", "from finesight.cli.app import main; main()", "train"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def as_many_threads_as_the_other_process() -> Iterator[None]:
    """On some processors two threads add up in another order than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", make_task(tmp_path / "task"))


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
    wait_for_lines(stopped / "metrics.jsonl", 7, process)
    os.killpg(process.pid, number)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert f"stopped by {number.name}" in said
    assert "--resume" in said
    finished = len(losses(stopped))
    assert 4 <= finished < 165
    digests.verify_folder(stopped / "checkpoints" / f"step-{finished}")
    texts = []
    for output, more in ((stopped, ["--resume"]), (whole, [])):
        command = [*COMMAND, *settings, f"output={output}", *more]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stderr)
    assert f"going on after step {finished} of 165" in texts[0]
    assert final_files(stopped) == final_files(whole)
    assert losses(stopped) == losses(whole)


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


def test_readers_that_are_killed_again_and_again_leave_a_checkpoint(
    recipe: Path, tmp_path: Path
) -> None:
    """The deaths show between two steps: what is finished is saved, and the run goes on."""
    settings = [str(recipe), "train.epochs=60", "train.workers=2", "train.save_every=0"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [*COMMAND, *settings, "data.eval=[]", f"output={killed}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_lines(killed / "metrics.jsonl", 5, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert "error: train.workers: a process that reads data died" in said
    assert "Traceback" not in said
    finished = len(losses(killed))
    assert finished < 165
    digests.verify_folder(killed / "checkpoints" / f"step-{finished}")
    for output, more in ((killed, ["--resume"]), (whole, [])):
        assert run(["train", *settings, "data.eval=[]", f"output={output}", *more]) == 0
    assert final_files(killed) == final_files(whole)
