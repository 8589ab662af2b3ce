"""Distributed runs, started as users start them or in forked processes."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import constants
from tiny_task import TinyTask, write_recipe

from finesight.cli.app import run_command
from finesight.storage import remove_folder

# Without dropout, whose masks depend on the rank.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
# The fork server imports these once; each rank would take two seconds of CPU time for them.
PRELOADED = ("multi_process_run", "finesight.train.training_run", "finesight.train.parallel.fsdp")


def _write_recipe(task: TinyTask, name: str, tune: dict[str, Any], train: dict[str, Any]) -> Path:
    output = {"output_dir": str(task.folder / name), "tune": tune}
    settings = {"learning_rate": 1e-3} | train
    return write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)


def start_run(
    task: TinyTask, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> subprocess.Popen[str]:
    """Start a run by torchrun."""
    recipe = _write_recipe(task, name, tune, train)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "finesight", "train", str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RUN_OF_TEST": str(task.folder / name)},
    )


def run_to_completion(
    task: TinyTask, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> Path:
    """Train in this number of forked processes, without the launcher and its imports."""
    recipe = _write_recipe(task, name, tune, train)
    # As under torchrun, the launcher has the store: it lives until the last rank ends.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    ranks = []
    for rank in range(count):
        environment = dict(os.environ)
        if count > 1:
            environment |= rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = task.folder / f"{name}.rank{rank}.txt"
        arguments = ["train", str(recipe), *words]
        ranks.append(context.Process(target=_run_rank, args=(arguments, environment, output)))
        ranks[-1].start()
    for process in ranks:
        process.join(300)
    for process in ranks:
        process.kill()  # a hanging rank
    outputs = [(task.folder / f"{name}.rank{rank}.txt").read_text() for rank in range(count)]
    assert [process.exitcode for process in ranks] == [0] * count, "\n".join(outputs)
    return task.folder / name


def _run_rank(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """Run a command in this process, with its output in a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    # The fork server has read this variable of an earlier test.
    constants.HF_ASSETS_CACHE = environment["HF_ASSETS_CACHE"]
    torch.set_num_threads(1)
    sys.exit(run_command(arguments))


def rewind_to_checkpoint(folder: Path) -> Path:
    """Restore the run to the checkpoint of its fourth step."""
    (folder / "result.json").unlink()
    remove_folder(folder / "checkpoints" / "step-6")
    return folder
