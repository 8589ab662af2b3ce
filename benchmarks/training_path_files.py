"""Count the source files that a training step, and an image on its way to the loss, pass through.

A file counts if a function of it runs on the path, in a training run on the CPU without worker
processes:

    python benchmarks/training_path_files.py quickstart/recipe.yaml train.steps=2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType

from rich.console import Console

import finesight
from finesight.settings.recipe import load_recipe
from finesight.train.device_loader import DeviceLoader
from finesight.train.objectives.objective import fused_linear_cross_entropy
from finesight.train.step_dataset import StepDataset
from finesight.train.trainer import Trainer
from finesight.train.training_run import train

PACKAGE = f"{Path(finesight.__file__).parent}/"
OVERRIDES = ("train.device=cpu", "train.num_workers=0", "train.vision_cache=never")


class PathProfiler:
    """Profile function that records the files of the package whose functions run on a path.

    Attributes:
        step_files: Files between the start and the end of `Trainer.run_step`.
        image_files: Files that read, encode and pack a step, and those from its transfer to the
            device to the loss.
    """

    def __init__(self) -> None:
        self.step_files: set[str] = set()
        self.image_files: set[str] = set()
        self._in_step = self._in_load = self._in_forward = False

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call":
            self._enter(code)
        elif event == "return":
            self._leave(code)

    def _enter(self, code: CodeType) -> None:
        self._in_step |= code is Trainer.run_step.__code__
        self._in_load |= code is StepDataset.load_step.__code__
        self._in_forward |= self._in_step and code is DeviceLoader.load.__code__
        name = code.co_filename.removeprefix(PACKAGE)
        if name == code.co_filename:
            return
        if self._in_step:
            self.step_files.add(name)
        if self._in_load or self._in_forward:
            self.image_files.add(name)

    def _leave(self, code: CodeType) -> None:
        self._in_step &= code is not Trainer.run_step.__code__
        self._in_load &= code is not StepDataset.load_step.__code__
        self._in_forward &= code is not fused_linear_cross_entropy.__code__


def count_path_files(recipe: Path, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """Train a recipe and return the sorted files of each path, relative to the package."""
    profiler = PathProfiler()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_recipe(recipe, [*overrides, *OVERRIDES, f"output_dir={folder}/run"])
        sys.setprofile(profiler)
        try:
            train(settings, console=Console(stderr=True))
        finally:
            sys.setprofile(None)
    return {"step": sorted(profiler.step_files), "image to loss": sorted(profiler.image_files)}


def main() -> None:
    """Print the number and the names of the files of each path as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings as NAME=VALUE")
    args = parser.parse_args()
    paths = count_path_files(args.recipe, args.overrides)
    counts = {name: {"count": len(files), "files": files} for name, files in paths.items()}
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
