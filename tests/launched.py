"""Runs of several processes, started as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from small_run import Task, write_recipe

from finesight.storage import remove_folder

# Drop-outs are a function of the process, too.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


def start(
    task: Task, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> subprocess.Popen[str]:
    output = {"output": str(task.folder / name), "tune": tune}
    settings = {"learning_rate": 1e-3} | train
    recipe = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launcher if count > 1 else []), "-m", "finesight", "train"]
    return subprocess.Popen(
        [*command, str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RUN_OF_TEST": output["output"]},
    )


def run(
    task: Task, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> Path:
    process = start(task, count, name, *words, tune=tune, **train)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return task.folder / name


def unfinished(folder: Path) -> Path:
    """The run as it was after its fourth step."""
    (folder / "result.json").unlink()
    remove_folder(folder / "checkpoints" / "step-6")
    return folder
