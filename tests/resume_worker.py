"""Train a recipe in several folders, each run stopped at another point, in its own process.

Usage: python resume_worker.py RECIPE OUTPUT term|kill NAME:POINT...

Each run is in OUTPUT/NAME and resumes if it exists. SIGTERM arrives during model call POINT, or a
child is killed before file operation POINT; point 0 is never reached. Prints the name, the end
status and the number of model calls of each run.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from crash_disk import run_in_crashing_child
from rich.console import Console
from torch.nn.modules.module import register_module_forward_pre_hook

from finesight.errors import TrainingInterrupted
from finesight.model.vlm import VisionLanguageModel
from finesight.settings.recipe import load_recipe
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


def main(recipe: str, output: str, how: str, *points: str) -> None:
    torch.set_num_threads(1)
    alarm = SignalAtCall()
    for pair in points:
        name, _, point = pair.partition(":")
        alarm.calls, alarm.signal_at = 0, int(point) if how == "term" else 0
        folder = Path(output) / name
        if how == "kill":
            train_there = partial(run_training, Path(recipe))
            is_complete = run_in_crashing_child(int(point), train_there, folder)
            ending = "exit-0" if is_complete else "killed"
        else:
            ending = run_training(Path(recipe), folder)
        print(f"{name} {ending} {alarm.calls}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
