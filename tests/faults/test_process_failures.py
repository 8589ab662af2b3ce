"""Data loader workers, ranks and runs that die, hang or are stopped."""

import multiprocessing
import os
import signal
import socket
import time

import pytest
from each_value import each
from multi_process_run import fork_ranks
from nonfinite_step import before_steps, train_with_short_timeout
from tiny_task import TinyTask, assert_same_run, read_losses, write_recipe

from finesight.cli.app import run_command
from finesight.storage import verify_folder


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [task.folder / f"rank{rank}.txt" for rank in range(world_size)]
    # Without a launcher, which would end the other ranks.
    ranks = fork_ranks(port, outputs, train_with_short_timeout, path, has_agent_store=False)
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
    assert f"{name} did not respond within 0:00:03" in output
    last = max(step for step, _ in read_losses(task.folder / "run"))
    verify_folder(task.folder / "run" / "checkpoints" / f"step-{last}")


@each("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_stop_signal_saves_a_checkpoint(task, capsys, name):
    """Breaks: a job's time is over. Survive: a checkpoint of the last step, and exit code 75."""
    run = task.folder / name
    path = write_recipe(task.folder / "recipe.yaml", task.recipe | {"output_dir": str(run)})
    with before_steps([3], lambda: signal.raise_signal(signal.Signals[name])):
        assert run_command(["train", str(path)]) == 75
    last = max(step for step, _ in read_losses(run))
    assert f"stopped by {name}, checkpoint of step {last} written" in capsys.readouterr().err
    verify_folder(run / "checkpoints" / f"step-{last}")
