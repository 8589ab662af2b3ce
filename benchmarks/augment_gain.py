"""Measure the gain of `data.augment` with few samples, on validation samples.

    python benchmarks/augment_gain.py --out FILE [--seeds 0 1 2] [--workers 16] [--steps 200]
        [--tasks boxes words] [--presets strong] [--samples 300] [--real grounding.jsonl]
        [--device cpu]

Each seed generates 100 training and `--samples` validation samples of each task, and trains
finesight-tiny with LoRA on all parts, without and with augmentation, for the same number of steps:

- `boxes`: the box of the shape that occurs once (mean IoU).
- `words`: a word in a font that the pretraining did not use, under strong camera noise (share of
  words that are read without an error).
- `kinds`: the most frequent kind of shape, named in words (accuracy).
- `photos`, with `--real`: a word or a field in a photo, which is cut out (share of texts that are
  read without an error). Rows of the file have `image`, `answer` and `bbox_xyxy` in pixels.

`gain` is the mean difference to the run without augmentation on the same validation samples, with
a 95 % interval of a paired bootstrap over the samples of all seeds. `cost` is the time to load an
augmented image, and that of the same image without augmentation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "pretraining"))

from preference_and_reward_gain import generate_most, generate_odd
from synthetic_tasks.camera_noise import apply_camera_noise
from synthetic_tasks.text_images import generate_word
from teacher_labels import crop_word

from finesight.api import evaluate
from finesight.encode.renderer_builder import build_renderer
from finesight.infer.model_loader import select_cpu_precision
from finesight.model_folder import locate_model
from finesight.samples.augmentation import Augmenter
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    write_samples,
)
from finesight.settings.config import DataSettings
from finesight.settings.recipe import recipe_from_dict
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions
from finesight.train.training_run import train

NUM_TRAIN, NUM_RESAMPLES = 100, 2000
BASE_MODEL = "finesight-tiny"
NO_PRESET = "none"

Generator = Callable[[random.Random], tuple[Image.Image, str, tuple[ContentPart, ...]]]


def generate_noisy_word(rng: random.Random) -> tuple[Image.Image, str, tuple[ContentPart, ...]]:
    """Generate a word in an unseen font under strong camera noise; the answer is its text."""
    while True:
        found = generate_word(rng, "unseen")
        if isinstance(found.answer[0], str) and all(isinstance(one, str) for one in found.question):
            image = apply_camera_noise(found.image, rng, strength=3.0)
            return image, "Read the word.", (TextPart(text=found.answer[0]),)


@dataclass(frozen=True)
class Task:
    """A generated task, and the score of an answer, as `metric.score`."""

    generate: Generator
    score: str


TASKS = {
    "boxes": Task(generate_odd, "grounding.iou"),
    "words": Task(generate_noisy_word, "ocr.exact"),
    "kinds": Task(generate_most, "classification.accuracy"),
}


@dataclass(frozen=True)
class Job:
    """One run: a task with a preset of `data.augment` and a seed."""

    task: str
    preset: str
    seed: int
    steps: int
    num_validation: int
    real: str | None
    device: str


def write_split(folder: Path, job: Job, split: str, count: int) -> None:
    """Write the images and samples of a split, the same for all presets."""
    generate, rows = TASKS[job.task].generate if job.task in TASKS else None, []
    if generate is None:
        assert job.real is not None, "no file of photos"
        path = Path(job.real)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        random.Random(f"photos {job.seed}").shuffle(rows)
        rows = rows[:count] if split == "train" else rows[-count:]
        assert len(rows) == count, f"only {len(rows)} rows"
    samples = []
    for index in range(count):
        if generate is None:
            image = crop_word(rows[index], path.parent)
            question, answer = "Read the word.", (TextPart(text=rows[index]["answer"]),)
        else:
            rng = random.Random(f"{job.task} {job.seed} {split} {index}")
            image, question, answer = generate(rng)
        name = f"{split}-{index:04}"
        image.save(folder / f"{name}.png")
        content = (ImagePart(image=f"{name}.png"), TextPart(text=question))
        turns = Message(role="user", content=content), Message(role="assistant", content=answer)
        samples.append(Sample(id=name, messages=turns))
    write_samples(folder / f"{split}.jsonl", samples)


def measure_job(job: Job) -> dict[str, Any]:
    """Train one run, and return its scores by validation sample."""
    torch.set_num_threads(1)
    name = TASKS[job.task].score if job.task in TASKS else "ocr.exact"
    metric, _, score = name.partition(".")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_split(folder, job, "train", NUM_TRAIN)
        write_split(folder, job, "validation", job.num_validation)
        augment = {} if job.preset == NO_PRESET else {"augment": job.preset}
        recipe = {
            "model": BASE_MODEL,
            "data": {"train": str(folder / "train.jsonl"), **augment},
            "image": {"max_pixels": 100_000},
            "tune": {
                **dict.fromkeys(("vision", "merger", "language"), "lora"),
                "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
            },
            "train": {
                **{"steps": job.steps, "batch_size": 16, "learning_rate": 1e-3},
                **{"seed": job.seed, "num_workers": 0, "device": job.device},
                **({"precision": select_cpu_precision()} if job.device == "cpu" else {}),
            },
            "output_dir": str(folder / "run"),
        }
        # The metric tells augmentation whether texts are read.
        recipe["eval"] = {"metric": metric, "every": 0, "limit": 1, "max_new_tokens": 1}
        recipe["data"]["eval"] = [{"path": str(folder / "validation.jsonl"), "limit": 1}]
        start = time.monotonic()
        train(recipe_from_dict(recipe, {}))
        seconds = time.monotonic() - start
        out = folder / "predictions.jsonl"
        result = evaluate(
            str(folder / "run"),
            data=folder / "validation.jsonl",
            metric=metric,
            limit=job.num_validation,
            batch_size=64,
            max_new_tokens=48,
            out=out,
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    scores = {line["id"]: float(line["scores"][score]) for line in lines}
    found = {"task": job.task, "preset": job.preset, "seed": job.seed, "seconds": round(seconds)}
    print(json.dumps(found | {"all": result.scores}), file=sys.stderr, flush=True)
    return found | {"scores": scores}


def compare_presets(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compute the mean score of each task and preset, and its gain with an interval."""
    by_run = {(one["task"], one["preset"], one["seed"]): one["scores"] for one in results}
    means = defaultdict(list)
    for (task, preset, seed), scores in by_run.items():
        plain = by_run[task, NO_PRESET, seed]
        means[task, preset] += [(scores[name], scores[name] - plain[name]) for name in plain]
    rows = []
    for (task, preset), pairs in means.items():
        values = np.array(pairs)
        picks = np.random.default_rng(0).integers(len(values), size=(NUM_RESAMPLES, len(values)))
        low, high = np.percentile(values[picks, 1].mean(1), [2.5, 97.5])
        row = {"task": task, "preset": preset, "score": values[:, 0].mean()}
        row |= {"gain": values[:, 1].mean(), "low": low, "high": high}
        rows.append({k: v if isinstance(v, str) else round(float(v), 4) for k, v in row.items()})
    return rows


def measure_cost() -> dict[str, float]:
    """Measure the milliseconds to encode an image of 960 x 540 pixels, by preset."""
    renderer = build_renderer(locate_model(BASE_MODEL))
    rng, times = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as work:
        noise = Image.fromarray(rng.integers(0, 255, (68, 120, 3), np.uint8))
        noise.resize((960, 540), Image.Resampling.BICUBIC).save(Path(work) / "a.jpg", quality=85)
        content = (ImagePart(image="a.jpg"), TextPart(text="Where is it?"))
        box = BoxPart(label=None, xyxy=(300.0, 200.0, 500.0, 350.0))
        turns = Message(role="user", content=content), Message(role="assistant", content=(box,))
        sample = LocatedSample(Sample(id="a", messages=turns), Path(work))
        for preset in (NO_PRESET, "light", "strong"):
            augment = None if preset == NO_PRESET else preset
            data = DataSettings.model_validate({"train": "a.jsonl", "augment": augment})
            augmenter = data.augment and Augmenter(data.augment, 0, describes_scenes=True)
            start = time.perf_counter()
            for key in range(40):
                renderer.encode(augmenter.augment(sample, key) if augmenter else sample)
            times[preset] = round(1000 * (time.perf_counter() - start) / 40, 1)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tasks", choices=TASKS, nargs="*", default=["boxes", "words"])
    parser.add_argument("--presets", nargs="+", default=("strong",))
    parser.add_argument("--samples", type=int, default=300, help="validation samples of a seed")
    parser.add_argument("--real", help="JSONL file of boxes in photos")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    figures: dict[str, Any] = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": get_device_name(torch.device(args.device)),
        "versions": library_versions(),
        "milliseconds_per_image": measure_cost(),
    }
    print(figures["milliseconds_per_image"], flush=True)
    tasks = (*args.tasks, *(["photos"] if args.real else []))
    jobs = [
        Job(task, preset, seed, args.steps, args.samples, args.real, args.device)
        for seed in args.seeds
        for task in tasks
        for preset in (NO_PRESET, *args.presets)
    ]
    with multiprocessing.get_context("spawn").Pool(min(args.workers, len(jobs))) as pool:
        results = list(pool.imap_unordered(measure_job, jobs))
    figures["rows"] = compare_presets(sorted(results, key=lambda one: list(one.values())[:3]))
    for row in figures["rows"]:
        print(
            "{task:8} {preset:8} {score:.3f}  gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]".format(
                **row
            )
        )
    seconds = [{k: v for k, v in one.items() if k != "scores"} for one in results]
    args.out.write_text(json.dumps(figures | {"runs": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
