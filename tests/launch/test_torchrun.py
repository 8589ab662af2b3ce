"""Stops of runs under torchrun: exit codes, and no traceback for a stop on request."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_task import TinyTask, read_losses, write_recipe

OPTIONS = ("--standalone", "--nproc-per-node=2", "-m", "finesight", "train")
LAUNCHERS = {"torchrun": "torch.distributed.run", "finesight": "finesight.launch.torchrun"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    task = TinyTask(tmp_path)
    recipe = task.recipe | {"output_dir": str(tmp_path / "run")}
    return write_recipe(tmp_path / "recipe.yaml", recipe, epochs=200)


@contextmanager
def start(launcher: str, recipe: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start two ranks in a session of their own, as a terminal does."""
    command = [sys.executable, "-m", LAUNCHERS[launcher], *OPTIONS, str(recipe), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def list_children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_planned_stop_is_no_failure(launcher: str, recipe: Path) -> None:
    run = recipe.parent / "run"
    for words, step in ((("--stop-after", "3"), 3), (("--resume", "--stop-after", "5"), 5)):
        with start(launcher, recipe, *words) as process:
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "Traceback" not in output
        assert output.count(f"step {step} is reached") == 1
        assert (run / "checkpoints" / f"step-{step}").is_dir()
        assert not (run / "result.json").exists(), "scripts tell a stop from the end by this file"


def test_planned_stop_of_one_process_has_its_exit_code(recipe: Path) -> None:
    command = [sys.executable, "-m", "finesight", "train", str(recipe), "--stop-after", "2"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 75


@pytest.mark.parametrize(
    ("signal_name", "receiver"),
    [("SIGTERM", "torchrun"), ("SIGHUP", "torchrun"), ("SIGINT", "all"), ("SIGTERM", "rank")],
)
def test_signal_ends_with_a_checkpoint(signal_name: str, receiver: str, recipe: Path) -> None:
    run = recipe.parent / "run"
    with start("finesight", recipe) as process:
        deadline = time.monotonic() + 100
        while len(read_losses(run)) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        number = signal.Signals[signal_name]
        if receiver == "all":
            os.killpg(process.pid, number)
        else:
            ranks = list_children(process.pid)
            os.kill(process.pid if receiver == "torchrun" else ranks[0], number)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert output.count(f"stopped by {signal_name}, checkpoint of step") == 1
    last = read_losses(run)[-1][0]
    assert (run / "checkpoints" / f"step-{last}").is_dir()


def test_exit_code_before_a_restart_does_not_count(recipe: Path) -> None:
    """A process that was started again, and killed, has written no checkpoint."""
    (recipe.parent / "0").write_text("75")
    command = [sys.executable, "-m", "finesight", "train", str(recipe)]
    environment = os.environ | {"FINESIGHT_EXIT_CODES": str(recipe.parent), "RANK": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100
        while not read_losses(recipe.parent / "run") and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
    assert (recipe.parent / "0").read_text() == ""


def test_failure_is_reported(recipe: Path) -> None:
    (recipe.parent / "train.jsonl").unlink()
    with start("finesight", recipe) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "train.jsonl" in output
    assert "exitcode" in output, "which rank has failed"
