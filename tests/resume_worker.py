"""Train a recipe in several folders, each run stopped at another point, in its own process.

Usage: python resume_worker.py RECIPE OUTPUT term|kill NAME:POINT...

Each run is in OUTPUT/NAME and resumes if it exists. With `term`, a point is a number of model
calls:
SIGTERM arrives during that call. With `kill`, it is a number of file operations: a child is killed
before that operation. Point 0 is never reached. Prints the name, the end status and the number of
model calls of each run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from crash_disk import CrashingDisk
from rich.console import Console
from torch.nn.modules.module import register_module_forward_pre_hook

from finesight import storage
from finesight.errors import TrainingInterrupted
from finesight.model.vlm import VisionLanguageModel
from finesight.recipe import load_recipe
from finesight.train.training_run import train


class SignalAtCall:
    """Send SIGTERM to this process during a selected model call."""

    def __init__(self) -> None:
        self.calls = self.signal_at = 0
        register_module_forward_pre_hook(self.count)

    def count(self, module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, VisionLanguageModel):
            self.calls += 1
            if self.calls == self.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)


def run_training(recipe: Path, output: Path) -> str:
    """Run or resume the training, and return its end status."""
    settings = load_recipe(recipe, [f"output_dir={output}"])
    try:
        train(settings, resume=True, console=Console(file=sys.stderr))
    except TrainingInterrupted:
        return "stopped"
    return "done"


def run_until_crash(recipe: Path, output: Path, operations: int) -> str:
    """Train in a child that crashes at a file operation, and return its end status."""
    child = os.fork()
    if child == 0:
        with storage.use_file_system(CrashingDisk(operations)):
            run_training(recipe, output)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit-{os.WEXITSTATUS(status)}"


def main(recipe: str, output: str, how: str, *points: str) -> None:
    torch.set_num_threads(1)
    alarm = SignalAtCall()
    for pair in points:
        name, _, point = pair.partition(":")
        alarm.calls, alarm.signal_at = 0, int(point) if how == "term" else 0
        folder = Path(output) / name
        if how == "kill":
            ending = run_until_crash(Path(recipe), folder, int(point))
        else:
            ending = run_training(Path(recipe), folder)
        print(f"{name} {ending} {alarm.calls}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
