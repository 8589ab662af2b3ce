"""Distributed runs, started as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_task import TinyTask, write_recipe

from finesight.storage import remove_folder

# Without dropout, whose masks depend on the rank.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


def start_run(
    task: TinyTask, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> subprocess.Popen[str]:
    output = {"output_dir": str(task.folder / name), "tune": tune}
    settings = {"learning_rate": 1e-3} | train
    recipe = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launcher if count > 1 else []), "-m", "finesight", "train"]
    return subprocess.Popen(
        [*command, str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RUN_OF_TEST": output["output_dir"]},
    )


def run_to_completion(
    task: TinyTask, count: int, name: str, *words: str, tune: dict[str, Any] = TUNE, **train: Any
) -> Path:
    process = start_run(task, count, name, *words, tune=tune, **train)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return task.folder / name


def rewind_to_checkpoint(folder: Path) -> Path:
    """Restore the run to the checkpoint of its fourth step."""
    (folder / "result.json").unlink()
    remove_folder(folder / "checkpoints" / "step-6")
    return folder
