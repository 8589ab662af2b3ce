"""Distributed runs, started as users start them or in forked processes."""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import constants
from tiny_task import TinyTask, write_recipe
from tiny_task import rewind_to_checkpoint as rewind_to_checkpoint

from finesight.cli.app import run_command

# Without dropout, whose masks depend on the rank.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
# The fork server imports these once; each rank would take two seconds of CPU time for them.
PRELOADED = ("multi_process_run", "finesight.train.training_run", "finesight.train.parallel.fsdp")


def _write_recipe(task: TinyTask, name: str, tune: dict[str, Any] = TUNE, **train: Any) -> Path:
    output = {"output_dir": str(task.folder / name), "tune": tune}
    settings = {"learning_rate": 1e-3} | train
    return write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)


def start_run(
    task: TinyTask, count: int, name: str, *words: str, **settings: Any
) -> subprocess.Popen[str]:
    """Start a run by torchrun, with training settings and optionally `tune`."""
    recipe = _write_recipe(task, name, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "finesight", "train", str(recipe), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RUN_OF_TEST": str(task.folder / name)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def run_to_completion(task: TinyTask, count: int, name: str, *words: str, **settings: Any) -> Path:
    """Train in this number of forked processes, without the launcher and its imports."""
    with run_in_ranks(task, count, name, *words, **settings) as ranks:
        pass
    texts = [(task.folder / f"{name}.rank{rank}.txt").read_text() for rank in range(count)]
    assert [process.exitcode for process in ranks] == [0] * count, "\n".join(texts)
    return task.folder / name


@contextmanager
def run_in_ranks(
    task: TinyTask, count: int, name: str, *words: str, **settings: Any
) -> Iterator[list[ForkServerProcess]]:
    """Train in forked processes within the context, which waits for their end."""
    # As under torchrun, the launcher has the store: it lives until the last rank ends.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    recipe = _write_recipe(task, name, **settings)
    outputs = [task.folder / f"{name}.rank{rank}.txt" for rank in range(count)]
    ranks = fork_ranks(store.port, outputs, run_command, ["train", str(recipe), *words])
    try:
        yield ranks
        for process in ranks:
            process.join(300)
    finally:
        for process in ranks:
            process.kill()  # a hanging rank
            process.join()


def fork_ranks(
    port: int,
    outputs: list[Path],
    target: Callable[..., int | None],
    *arguments: Any,
    has_agent_store: bool = True,
) -> list[ForkServerProcess]:
    """Call a function that returns its exit code in one forked rank per output file.

    With `has_agent_store`, this process has the store, as torchrun has, instead of rank 0.
    """
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rendezvous |= {"TORCHELASTIC_USE_AGENT_STORE": str(has_agent_store)}
    rendezvous |= {"TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(len(outputs))}
    ranks = []
    for rank, output in enumerate(outputs):
        own = rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = os.environ | (own if len(outputs) > 1 else {})
        ranks.append(fork_process(output, target, *arguments, environment=environment))
    return ranks


def fork_process(
    output: Path,
    target: Callable[..., int | None],
    *arguments: Any,
    environment: Mapping[str, str] = os.environ,
    errors: Path | None = None,
) -> ForkServerProcess:
    """Call a function that returns its exit code in a process forked after all imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    process = context.Process(
        target=_run_forked, args=(output, errors, dict(environment), target, arguments)
    )
    process.start()
    return process


def _run_forked(
    output: Path,
    errors: Path | None,
    environment: dict[str, str],
    target: Callable[..., int | None],
    arguments: tuple[Any, ...],
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if errors is not None:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    # The fork server has read this variable of an earlier test.
    constants.HF_ASSETS_CACHE = environment["HF_ASSETS_CACHE"]
    torch.set_num_threads(1)
    gc.freeze()  # a collection would copy the memory that is shared with the fork server
    sys.exit(target(*arguments))
