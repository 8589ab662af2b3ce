"""Measure from how many uses of an image the vision cache saves time.

    python benchmarks/vision_cache_gain.py RECIPE --work DIR --out FILE [--rounds 3] [KEY=VALUE]...

The recipe must have a frozen vision encoder. Its images are encoded as in steps without the cache,
and the cache of the same images is built: tokenization, hashes, features and files. The ratio of
both times is the number of uses from which the cache saves time. Loading cached features in a step
takes far less. On a CPU, the times are processor times, which other processes change little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from finesight.progress import ProgressConsole
from finesight.settings.recipe import load_recipe
from finesight.train.logging import get_device_name
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_state, library_versions
from finesight.train.state import TrainState
from finesight.train.vision_cache import vision_cache_root
from finesight.train.vision_cache_builder import VisionCacheBuilder
from finesight.vision.image_processing import concat_patches


def measure_seconds(state: TrainState) -> float:
    """Return processor time on a CPU, and the time of day on a GPU after its work is done."""
    if state.run.hardware.device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def encode_images(state: TrainState) -> int:
    """Decode and encode the images of all samples, in batches of a step; return their number."""
    data, renderer, num_images = state.data.train, state.data.renderer, 0
    batch_size, indices = state.run.recipe.train.batch_size, data.stats.sample_indices
    for start in range(0, len(indices), batch_size):
        batch = [renderer.encode(data.corpus[n]) for n in indices[start : start + batch_size]]
        patches = [one.patches_ND for one in batch]
        joined_ND = concat_patches(patches)
        grids = tuple(span.grid_thw for one in batch for span in one.tokenized.spans)
        with torch.no_grad():
            device_ND = torch.from_numpy(joined_ND).to(state.run.hardware.device)
            state.engine.model.encode_images(device_ND, grids)
        num_images += len(grids)
    return num_images


def tokenize(state: TrainState) -> None:
    """Tokenize all samples, which steps do with and without the cache."""
    for index in state.data.train.stats.sample_indices:
        state.data.renderer.tokenize(state.data.train.corpus[index])


def main() -> None:
    """Run the benchmark, write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_intermixed_args()
    os.environ["HF_ASSETS_CACHE"] = str(options.work)
    fixed = ["train.num_workers=0", "train.epochs=4", f"output_dir={options.work / 'run'}"]
    recipe = load_recipe(options.recipe, [*options.overrides, *fixed])
    state = build_state(recipe, RunDir(recipe.output_dir), ProgressConsole(), False)
    assert vision_cache_root().is_relative_to(options.work), "another cache would be removed"
    seconds: dict[str, list[float]] = {"encode": [], "tokenize": [], "build": []}
    num_images = encode_images(state)  # also the warm-up
    for _ in range(options.rounds):
        shutil.rmtree(vision_cache_root(), ignore_errors=True)
        starts = [measure_seconds(state)]
        encode_images(state)
        starts.append(measure_seconds(state))
        tokenize(state)
        starts.append(measure_seconds(state))
        VisionCacheBuilder(state).build()
        starts.append(measure_seconds(state))
        for name, (start, end) in zip(seconds, pairwise(starts), strict=True):
            seconds[name].append(end - start)
    medians = {name: median(values) for name, values in seconds.items()}
    report = {
        "command": f"python benchmarks/vision_cache_gain.py {' '.join(sys.argv[1:])}",
        "machine": get_device_name(state.run.hardware.device),
        "versions": library_versions(),
        "images": num_images,
        "milliseconds_per_image": {
            name: round(1e3 * value / num_images, 2) for name, value in medians.items()
        },
        "break_even_uses": round(medians["build"] / (medians["encode"] - medians["tokenize"]), 2),
    }
    print(json.dumps(report, indent=1))
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
