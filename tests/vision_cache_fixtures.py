"""Train states of the tiny task for the vision cache tests."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import make_task, write_recipe
from torch import Tensor

from finesight.recipe import load_recipe
from finesight.train.console import TrainingConsole
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_train_state
from finesight.train.trainer import TrainState
from finesight.train.training_run import StopRequest
from finesight.train.vision_cache import VisionCache
from finesight.train.vision_cache_builder import VisionCacheResult, open_vision_cache

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
CONSOLE = TrainingConsole(Console(file=sys.stderr))


def make_train_state(
    folder: Path,
    tune: dict[str, Any] = LORA,
    mixed: bool = False,
    family: TinyFamily = "qwen2_vl",
    **train: Any,
) -> TrainState:
    """Create the train state of a new or existing task."""
    if not folder.exists():
        made = make_task(folder) | {"output_dir": str(folder / "run"), "tune": tune}
        if mixed:
            edit_images(folder / "train.jsonl")
        if family != "qwen2_vl":
            create_tiny_model(folder / family, family)
            made["model"] = str(folder / family)
        if family == "qwen":
            # It requires a single image size.
            del made["image"]
        (folder / "task.json").write_text(json.dumps(made))
    recipe = json.loads((folder / "task.json").read_text())
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    return build_train_state(load_recipe(path), RunDir(folder / "run"), CONSOLE, resume=False)


def edit_images(data: Path) -> None:
    """Remove the images of samples 1 and 6, and add one to sample 2."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number in (1, 6):
        del samples[number]["messages"][0]["content"][0]
    samples[2]["messages"][0]["content"].insert(0, {"type": "image", "image": "train0.png"})
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def decide_vision_cache(
    session: TrainState, screen: TrainingConsole = CONSOLE, stop: StopRequest | None = None
) -> VisionCacheResult:
    """Return the result of `open_vision_cache`; files are not evicted in tests."""
    with ExitStack() as stack:
        return stack.enter_context(open_vision_cache(session, screen, stop or StopRequest()))


def build_vision_cache(session: TrainState) -> VisionCache:
    """Return the vision cache of a train state."""
    seen = decide_vision_cache(session).cache
    assert seen is not None
    return seen


def read_all_features(session: TrainState, seen: VisionCache) -> Tensor:
    """Return the features of all images, sample by sample."""
    slots = session.train_data.stats.sample_indices
    dtype, shape = seen.reader.tensor_spec(slots)
    buffer = torch.empty(shape, dtype=dtype)
    seen.reader.write_to(slots, buffer)
    return seen.load_features(buffer)
