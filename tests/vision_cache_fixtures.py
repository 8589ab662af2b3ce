"""Train states of the tiny task for the vision cache tests."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_model import TinyFamily, create_tiny_model
from tiny_task import edit_samples, make_task, write_recipe
from torch import Tensor

from finesight.progress import ProgressConsole
from finesight.settings.recipe import load_recipe
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_state
from finesight.train.state import StopRequest, TrainState
from finesight.train.vision_cache import VisionCache
from finesight.train.vision_cache_builder import VisionCacheResult, VisionFeatures

LORA = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}


def make_train_state(
    folder: Path, tune: dict[str, Any] = LORA, family: TinyFamily = "qwen2_vl", **train: Any
) -> TrainState:
    """Create the train state of a new or existing task."""
    if not folder.exists():
        recipe = make_task(folder) | {"output_dir": str(folder / "run"), "tune": tune}
        if family != "qwen2_vl":
            recipe["model"] = str(create_tiny_model(folder / family, family))
        if family == "qwen":
            del recipe["image"]  # it requires a single image size
        (folder / "task.json").write_text(json.dumps(recipe))
    recipe = json.loads((folder / "task.json").read_text())
    path = write_recipe(folder / "recipe.yaml", recipe, **train)
    console = ProgressConsole(Console(file=io.StringIO()))
    return build_state(load_recipe(path), RunDir(folder / "run"), console, resume=False)


def mix_images(data: Path) -> None:
    """Remove the images of samples 1 and 6, and add one to sample 2."""
    with edit_samples(data) as samples:
        for number in (1, 6):
            del samples[number]["messages"][0]["content"][0]
        image = {"type": "image", "image": "train0.png"}
        samples[2]["messages"][0]["content"].insert(0, image)


def decide_vision_cache(
    state: TrainState, output: io.StringIO | None = None, stop: StopRequest | None = None
) -> VisionCacheResult:
    """Return the result of the vision cache; files are not evicted in tests."""
    console = ProgressConsole(Console(file=output or io.StringIO(), width=300))
    results: list[VisionCacheResult] = []
    run = replace(state.run, console=console, stop=stop or StopRequest())
    with VisionFeatures(replace(state, run=run)).open(lambda _, result: results.append(result)):
        return results[0]


def build_vision_cache(state: TrainState) -> VisionCache:
    cache = decide_vision_cache(state).cache
    assert cache is not None
    return cache


def read_all_features(state: TrainState, cache: VisionCache | None) -> Tensor:
    """Return the features of all images, sample by sample."""
    assert cache is not None
    indices = state.data.train.stats.sample_indices
    dtype, shape = cache.reader.tensor_spec(indices)
    buffer = torch.empty(shape, dtype=dtype)
    cache.reader.write_to(indices, buffer)
    return cache.load_features(buffer)


def assert_features_match(state: TrainState, cache: VisionCache) -> None:
    """Compare the cached features of each pack with those of the encoder."""
    cached_dataset = replace(state.engine.step_dataset, cache_reader=cache.reader)
    for number in range(len(state.data.sampler)):
        step, cached = state.engine.step_dataset.get_step(number), cached_dataset.get_step(number)
        for batch, other, inputs in zip(step.packs, cached.packs, cached.cache_inputs, strict=True):
            assert (other.grid_thw, len(other.patches_ND)) == ((), 0)
            assert torch.equal(batch.ids_T, other.ids_T)
            expected = state.engine.model.encode_images(batch.patches_ND, batch.grid_thw)
            torch.testing.assert_close(cache.load_features(inputs), expected)
