"""Data loader workers, ranks and runs that die, hang, are stopped or are restarted."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from attack_client import is_running, list_process_tree, list_running
from launch_fixtures import TUNE, build_file, make_job, run_job_script, wait_for_steps
from multi_process_run import fork_ranks
from nonfinite_step import SHORT_TIMEOUT, before_steps, train_with_short_timeout
from tiny_task import TinyTask, assert_same_run, read_losses, write_recipe

from finesight.cli.app import run_command
from finesight.files.storage import verify_folder
from finesight.train.run_dir import RunDir


def test_killed_data_worker_is_restarted(task: TinyTask, caplog: pytest.LogCaptureFixture) -> None:
    """Kill the data loader worker repeatedly; the run is bit-identical."""
    settings = ("train.num_workers=1", "train.epochs=4", "train.save_every=30")
    task.run(*settings, name="whole")

    def kill_worker() -> None:
        (reader,) = multiprocessing.active_children()
        reader.kill()
        reader.join()

    with before_steps([2, 6], kill_worker):
        task.run(*settings)
    assert sum("is restarted" in message for message in caplog.messages) == 2
    assert_same_run(task.folder / "run", task.folder / "whole")


@pytest.mark.parametrize("lost", [signal.SIGSTOP, signal.SIGKILL], ids=["hung", "killed"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_lost_rank_is_named(task: TinyTask, lost: signal.Signals, world_size: int) -> None:
    """Stop or kill the last rank in a step; rank 0 saves a checkpoint and names it, all end."""
    recipe = task.recipe | {"output_dir": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, epochs=500)
    outputs = [task.folder / f"rank{rank}.txt" for rank in range(world_size)]
    # Without a launcher, which would end the other ranks.
    arguments = free_port(), outputs, train_with_short_timeout, str(path)
    ranks = fork_ranks(*arguments, has_agent_store=False)
    first, *others = ranks
    try:
        while len(read_losses(task.folder / "run")) <= 2:
            assert first.is_alive(), outputs[0].read_text()
            time.sleep(0.05)
        os.kill(others[-1].pid, lost)
        first.join(120)
        for survivor in others[:-1]:
            survivor.join(60)
            assert survivor.exitcode, "did not end, or without an error"
    finally:
        for process in ranks:
            process.kill()
            process.join()
    output = outputs[0].read_text()
    assert first.exitcode == 2, output
    name = f"rank {world_size - 1} of {world_size}"
    assert f"{name} did not respond within {SHORT_TIMEOUT}" in output
    last = max(step for step, _ in read_losses(task.folder / "run"))
    verify_folder(task.folder / "run" / "checkpoints" / f"step-{last}")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_stop_signal_saves_a_checkpoint(task, capsys, name):
    """Breaks: a job's time is over. Survive: a checkpoint of the last step, and exit code 75."""
    run = task.folder / name
    path = write_recipe(task.folder / "recipe.yaml", task.recipe | {"output_dir": str(run)})
    with before_steps([3], lambda: signal.raise_signal(signal.Signals[name])):
        assert run_command(["train", str(path)]) == 75
    last = max(step for step, _ in read_losses(run))
    assert f"stopped by {name}, checkpoint of step {last} written" in capsys.readouterr().err
    verify_folder(run / "checkpoints" / f"step-{last}")


GUARD = 120.0
"""Seconds after which a test fails instead of hanging."""


def start(recipe: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start the command, with its output in a file next to the recipe."""
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *options]
    with recipe.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def wait_for_further_steps(recipe: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has noted `count` further steps."""
    run, end = recipe.parent / "run", time.monotonic() + GUARD
    fewest = last = len(read_losses(run))
    while last < fewest + count:
        output = recipe.with_suffix(".log").read_text()
        assert process.poll() is None, output
        assert time.monotonic() < end, output
        time.sleep(0.02)
        last = len(read_losses(run))
        # A resumed run cuts off the steps after its checkpoint.
        fewest = min(fewest, last)


@pytest.fixture
def recipe(task: TinyTask) -> Path:
    """A long run with two data loader workers, a tracker, and a validation after each step."""
    output = {"output_dir": str(task.folder / "run"), "track": [{"kind": "tensorboard"}]}
    settings = {"num_workers": 2, "epochs": 2000, "save_every": 1}
    return write_recipe(task.folder / "recipe.yaml", task.recipe | output, **settings)


def test_run_is_unlocked_when_its_process_is_killed(recipe: Path) -> None:
    """Kill only the training process; the lock is released, and no worker remains."""
    process = start(recipe)
    wait_for_further_steps(recipe, 2, process)
    _, *started = [one.pid for one in list_process_tree(process.pid)]
    process.kill()
    process.wait()
    try:
        with RunDir(recipe.parent / "run").lock():
            pass
        assert not list_running(started, GUARD)
    finally:
        for pid in filter(is_running, started):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.fuzz
def test_supervisor_restarts_a_killed_run_twenty_times(recipe: Path) -> None:
    """Breaks: the training process, twenty times. Survives: every restart with `--resume`."""
    for kills in range(20):
        process = start(recipe, *(["--resume"] if kills else []))
        wait_for_further_steps(recipe, 2, process)
        process.kill()
        process.wait()
        with RunDir(recipe.parent / "run").lock():
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_scales_up_and_restarts_dead_rank(tmp_path: Path, every_point: bool) -> None:
    """A second machine joins, then a rank is killed; the result equals that of a single process."""
    if not every_point:
        pytest.skip("half a minute of starting processes: --every-fault")
    task = TinyTask(tmp_path / "task")
    text = build_file("torchrun", make_job(task, "run", 1, epochs=40, save_every=10))
    # Half a minute for more machines to come, else.
    text = text.replace("=c10d", "=c10d --rdzv-conf=last_call_timeout=1")
    text = text.replace("29400", str(free_port()))
    folder = task.folder / "run"
    first = run_job_script(tmp_path, text, 1)
    wait_for_steps(folder, 4, first)
    second = run_job_script(tmp_path, text, 1)
    wait_for_processes(folder, [1, 2], first)
    os.kill(rank_of(second.pid), signal.SIGKILL)
    for process in (first, second):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert world_sizes(folder) == [1, 2, 2]
    assert json.loads((folder / "result.json").read_text())["steps"] == 110
    alone = task.run("train.epochs=40", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 110
    # Rounding grows from step to step.
    expected = dict(read_losses(task.folder / "alone"))
    assert dict(read_losses(folder)) == pytest.approx(expected, rel=1e-3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def world_sizes(folder: Path) -> list[int]:
    """Return the world size of each start of the run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["world_size"] for line in lines if "world_size" in line]


def wait_for_processes(folder: Path, counts: list[int], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while world_sizes(folder) != counts:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rank_of(launcher: int) -> int:
    """The process that a launcher has started."""
    found = []
    for process in psutil.Process(launcher).children():
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * any("finesight" in word for word in process.cmdline())
    return found[-1]
