"""Trains a recipe in several folders, each run stopped at another point; a process of its own.

Usage: python stopping.py RECIPE OUTPUT term|kill NAME:POINT...

Each run goes to OUTPUT/NAME, and goes on where one is there already. With `term` a point is a
number of calls of the model (training or measuring): SIGTERM arrives during that call. With `kill`
it is a number of file operations, before which SIGKILL strikes a child. Point 0 is never reached.
Prints for each: name, how it ended, and how often the model was called.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from dying_disk import DyingDisk
from rich.console import Console
from torch.nn.modules.module import register_module_forward_pre_hook

from finesight import storage
from finesight.errors import Interrupted
from finesight.model.network import VisionLanguageModel
from finesight.recipe import load_recipe
from finesight.train.loop import train


class Alarm:
    """Sends SIGTERM to its own process during a chosen call of the model."""

    def __init__(self) -> None:
        self.calls = self.point = 0
        register_module_forward_pre_hook(self.count)

    def count(self, module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, VisionLanguageModel):
            self.calls += 1
            if self.calls == self.point:
                os.kill(os.getpid(), signal.SIGTERM)


def run(recipe: Path, output: Path) -> str:
    """How the run ended."""
    settings = load_recipe(recipe, [f"output={output}"])
    try:
        train(settings, resume=True, console=Console(file=sys.stderr))
    except Interrupted:
        return "stopped"
    return "done"


def run_and_die(recipe: Path, output: Path, operations: int) -> str:
    """How a child ended that dies before a number of file operations."""
    child = os.fork()
    if child == 0:
        with storage.using(DyingDisk(operations)):
            run(recipe, output)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else f"exit-{os.WEXITSTATUS(status)}"


def main() -> None:
    torch.set_num_threads(1)
    recipe, output, how, *points = sys.argv[1:]
    alarm = Alarm()
    for pair in points:
        name, _, point = pair.partition(":")
        alarm.calls, alarm.point = 0, int(point) if how == "term" else 0
        folder = Path(output) / name
        if how == "kill":
            ending = run_and_die(Path(recipe), folder, int(point))
        else:
            ending = run(Path(recipe), folder)
        print(f"{name} {ending} {alarm.calls}", flush=True)


main()
