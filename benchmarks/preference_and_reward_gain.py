"""Measure GRPO and DPO after supervised fine-tuning on 50 labelled samples, on two CPU cores.

    OMP_NUM_THREADS=2 taskset -c 0,1 python benchmarks/preference_and_reward_gain.py
        --work DIR --out FILE [--seeds 0 1 2] [--variant c] [--task destination] [--stages grpo dpo]
        [--limit N]

Each seed generates images with a question, and trains finesight-tiny with LoRA. The question is the
destination of a train ticket, whose reward is `exact`, or a box among shapes, whose reward is
`boxes`:

- `sft`: supervised fine-tuning on 50 labelled samples.
- `grpo`: the adapter of `sft`, continued with rewards on 500 samples. Their references are only
  used by the reward.
- `dpo`: the adapter of `sft`, continued on preference pairs of the same 500 samples. A pair is the
  reference and an incorrect response that was sampled from `sft`.
- `frame`, for the task `odd`: two steps of GRPO after fine-tuning on the labelled samples with
  boxes in pixels instead of thousandths of the image. `warning` is the line of the run that names
  the coordinate frame.

`score` is the accuracy on the same validation samples with its 95 % confidence interval, and
`seconds` the training time from the start to the saved adapter, of DPO with the sampling of the
pairs. `gain` is the difference to `sft`. For a smoke test, `--limit` is the number of steps
of GRPO, with a tenth of the samples of each split. The file is written after each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "pretraining"))

from synthetic_tasks import captions, scenes
from synthetic_tasks.camera_noise import apply_camera_noise

from finesight.api import evaluate
from finesight.evaluate.box_metrics import compute_box_scores
from finesight.evaluate.eval_case import get_reference_answer
from finesight.infer.engine import build_engine
from finesight.infer.model_loader import load_inference_model, select_cpu_precision
from finesight.infer.prediction import Prediction, build_prediction, iter_completions
from finesight.infer.request import GenerationRequest, SamplingParams
from finesight.samples.frames import FRAME_1000, ImageSize, rescale
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    read_samples,
    write_samples,
)
from finesight.settings.recipe import recipe_from_dict
from finesight.synth import tickets
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions
from finesight.train.training_run import train

BASE_MODEL = "finesight-tiny"
SPLITS = {"labelled": 50, "rewarded": 500, "validation": 400}
"""Number of samples of each split."""

MAX_TOKENS = 32
BATCH_SIZE = 128
NUM_SAMPLED = 4
"""Responses per prompt from which the rejected answer of a pair is chosen."""


class Task(NamedTuple):
    """Generator of image, question and answer, and score (`METRIC.SCORE`) and reward of it."""

    generate: Callable[[random.Random], tuple[Image.Image, str, tuple[ContentPart, ...]]]
    score: str
    reward: str


@dataclass(frozen=True)
class Variant:
    """Settings of the three training runs."""

    sft_steps: int = 60
    sft_learning_rate: float = 1e-3
    rank: int = 32
    grpo_steps: int = 100
    grpo_learning_rate: float = 5e-4
    num_prompts: int = 16
    num_generations: int = 8
    temperature: float = 1.0
    loss_type: str = "dapo"
    dpo_epochs: float = 4
    dpo_learning_rate: float = 2e-4
    dpo_losses: tuple[str, ...] = ("sigmoid",)


VARIANTS = {
    "a": Variant(),
    "b": Variant(grpo_learning_rate=1e-3, dpo_learning_rate=5e-4),
    "c": Variant(dpo_losses=("sigmoid", "sft")),
}
"""Settings by name. `b` has larger learning rates; without the SFT term of `c`, DPO loses score."""


# Tasks


def generate_odd(rng: random.Random) -> tuple[Image.Image, str, tuple[ContentPart, ...]]:
    """Generate shapes of two kinds, one of which occurs once; the answer is its box."""
    while True:
        scene = scenes.compose_scene(rng, crowded=True)
        counts = Counter(shape.kind for shape in scene.shapes)
        if len(scene.shapes) >= 4 and len(counts) == 2 and min(counts.values()) == 1:
            break
    box = next(shape.box for shape in scene.shapes if counts[shape.kind] == 1)
    x1, y1, x2, y2 = map(float, box)
    answer = BoxPart(label=None, xyxy=(x1, y1, x2, y2))
    return apply_camera_noise(scene.image, rng), "Locate the shape that occurs once.", (answer,)


def generate_most(rng: random.Random) -> tuple[Image.Image, str, tuple[ContentPart, ...]]:
    """Generate shapes of several kinds; the answer names the most frequent one."""
    while True:
        scene = scenes.compose_scene(rng, crowded=True)
        counts = Counter(shape.kind for shape in scene.shapes).most_common()
        if len(scene.shapes) >= 4 and len(counts) > 1 and counts[0][1] > counts[1][1]:
            break
    answer = TextPart(text=captions.describe_kind(counts[0][0], False))
    return apply_camera_noise(scene.image, rng), "Which shape is most frequent?", (answer,)


def generate_destination(rng: random.Random) -> tuple[Image.Image, str, tuple[ContentPart, ...]]:
    """Generate a train ticket; the answer is the city at the end of the journey."""
    fields = tickets.sample_ticket(rng)
    answer = TextPart(text=fields["to"])
    return tickets.draw_ticket(fields, rng), "Where does the journey end?", (answer,)


TASKS = {
    "destination": Task(generate_destination, "qa.exact", "exact"),
    "odd": Task(generate_odd, "grounding.accuracy_at_0.5", "boxes"),
    "most": Task(generate_most, "classification.accuracy", "exact"),
}


def write_task(folder: Path, name: str, seed: int, divisor: int) -> None:
    """Write images and samples of all splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        samples = []
        for index in range(count // divisor):
            rng = random.Random(f"{name} {seed} {split} {index}")
            image, question, answer = TASKS[name].generate(rng)
            file = f"{split}-{index:04}.png"
            image.save(folder / file)
            content = (ImagePart(image=file), TextPart(text=question))
            messages = (
                Message(role="user", content=content),
                Message(role="assistant", content=answer),
            )
            samples.append(Sample(id=f"{split}-{index:04}", messages=messages))
        write_samples(folder / f"{split}.jsonl", samples)


# Training


def build_recipe(
    folder: Path,
    data: str,
    variant: Variant,
    train_settings: dict[str, Any],
    name: str,
    adapter: str | None,
) -> dict[str, Any]:
    """Return the recipe of a run, which continues the adapter of another run or none."""
    return {
        "model": BASE_MODEL,
        **({"adapter": str(folder / adapter)} if adapter else {}),
        "data": {"train": str(folder / f"{data}.jsonl")},
        "tune": {
            "language": "lora",
            "lora": {"rank": variant.rank, "alpha": variant.rank, "dropout": 0.0},
        },
        "train": {
            "batch_size": 16,
            "precision": select_cpu_precision(),
            "device": "cpu",
            **train_settings,
        },
        "output_dir": str(folder / name),
    }


def get_grpo_settings(variant: Variant, steps: int) -> dict[str, Any]:
    """Return the section `train` of GRPO."""
    return {
        "objective": "grpo",
        "steps": steps,
        "batch_size": variant.num_prompts,
        "learning_rate": variant.grpo_learning_rate,
        "grpo": {
            "num_generations": variant.num_generations,
            "max_completion_length": MAX_TOKENS,
            "temperature": variant.temperature,
            "loss_type": variant.loss_type,
        },
    }


def get_dpo_settings(variant: Variant) -> dict[str, Any]:
    """Return the section `train` of DPO."""
    return {
        "objective": "dpo",
        "epochs": variant.dpo_epochs,
        "learning_rate": variant.dpo_learning_rate,
        "dpo": {"loss_type": list(variant.dpo_losses)},
    }


def write_pairs(folder: Path, run: Path, seed: int) -> int:
    """Write pairs of the reference and the first incorrect response sampled from a run.

    Samples without an incorrect response are left out. Returns the number of pairs.
    """
    loaded = load_inference_model(str(run), device="cpu", precision=select_cpu_precision())
    samples = [LocatedSample(one, folder) for one in read_samples(folder / "rewarded.jsonl")]
    renderer, count = loaded.renderer, len(samples)
    prompts = [renderer.encode_prompt(sample) for sample in samples]
    rejected: dict[int, tuple[int, tuple[ContentPart, ...]]] = {}
    total = NUM_SAMPLED * count
    lengths = [prompts[number % count].tokenized.num_tokens for number in range(total)]
    requests = (
        GenerationRequest(
            prompt=prompts[number % count],
            max_new_tokens=MAX_TOKENS,
            sampling_params=SamplingParams(temperature=1.0, seed=seed * total + number),
        )
        for number in range(total)
    )
    engine = build_engine(loaded.model, renderer.end_ids, lengths, MAX_TOKENS, BATCH_SIZE)
    for request, _, tokens in iter_completions(engine, enumerate(requests), BATCH_SIZE):
        number, index = divmod(request, count)
        sample = samples[index]
        ids = [token.id for token in tokens]
        found = build_prediction(renderer, sample, prompts[index].tokenized, ids)
        earliest = rejected.get(index, (NUM_SAMPLED, ()))[0]
        if number < earliest and not is_correct(found, sample.sample):
            rejected[index] = number, get_content(found, sample.sample)
    pairs = [
        samples[index].sample.model_copy(update={"rejected": content})
        for index, (_, content) in sorted(rejected.items())
    ]
    write_samples(folder / "pairs.jsonl", pairs)
    return len(pairs)


def is_correct(prediction: Prediction, sample: Sample) -> bool:
    """Return whether a response has the reference as text, or boxes with an IoU of 0.5."""
    texts, boxes = get_reference_answer(sample)
    if boxes:
        return compute_box_scores(prediction.boxes, boxes)["hit"] == 1.0
    return prediction.answer in texts


def get_content(prediction: Prediction, sample: Sample) -> tuple[ContentPart, ...]:
    """Return a response as parts of an answer."""
    _, boxes = get_reference_answer(sample)
    return prediction.boxes if boxes else (TextPart(text=prediction.answer or "-"),)


def write_pixel_boxes(folder: Path) -> None:
    """Write the labelled samples so that the numbers in answers are pixels, not thousandths."""
    samples = []
    for sample in read_samples(folder / "labelled.jsonl"):
        size = read_image_size(folder / f"{sample.id}.png")

        def scale(part: ContentPart, size: ImageSize = size) -> ContentPart:
            if not isinstance(part, BoxPart):
                return part
            corners = rescale(part.xyxy, FRAME_1000, size)
            return part.model_copy(update={"xyxy": corners})

        samples.append(sample.with_parts(scale))
    write_samples(folder / "pixels.jsonl", samples)


class _RecordingStream(io.StringIO):
    """Stream that records what it writes to another one."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        self.stream.flush()
        return super().write(text)


# Measurement


def score(folder: Path, name: str, task: Task) -> dict[str, Any]:
    """Evaluate a run on the validation samples."""
    result = evaluate(
        str(folder / name),
        data=folder / "validation.jsonl",
        metric=task.score.partition(".")[0],
        batch_size=64,
        max_new_tokens=MAX_TOKENS,
    )
    name = task.score.partition(".")[2]
    interval = result.intervals[name]
    return {
        "score": round(result.scores[name], 4),
        "interval": None if interval is None else [round(one, 4) for one in interval],
    }


def measure_seed(args: argparse.Namespace, seed: int, variant: Variant) -> Iterator[dict[str, Any]]:
    """Run all stages with one seed and yield their results."""
    task, folder = TASKS[args.task], args.work / f"{args.task}-{args.variant}-{seed}"
    write_task(folder, args.task, seed, 10 if args.limit else 1)
    common = {"task": args.task, "variant": args.variant, "seed": seed}
    sft_settings = {
        "steps": variant.sft_steps,
        "learning_rate": variant.sft_learning_rate,
    }

    def run(name: str, data: str, settings: dict[str, Any], adapter: str | None = None) -> str:
        recipe = build_recipe(folder, data, variant, {**settings, "seed": seed}, name, adapter)
        recipe |= {"rewards": [task.reward]} if "grpo" in settings else {}
        log = _RecordingStream(sys.stderr)
        with contextlib.redirect_stderr(log):
            train(recipe_from_dict(recipe, {}))
        return log.getvalue()

    start = time.monotonic()
    run("sft", "labelled", sft_settings)
    seconds = round(time.monotonic() - start, 1)
    sft = {"seconds": seconds, **score(folder, "sft", task)}
    yield {**common, "stage": "sft", **sft}
    grpo_settings = get_grpo_settings(variant, args.limit or variant.grpo_steps)
    for name in args.stages:
        found = {**common, "stage": name}
        start = time.monotonic()
        if name == "frame":
            write_pixel_boxes(folder)
            run("sft_pixels", "pixels", sft_settings)
            text = run("frame", "rewarded", {**grpo_settings, "steps": 2}, "sft_pixels")
            warnings = [line for line in text.splitlines() if "coordinate frame" in line]
            yield {**found, "warning": next(iter(warnings), None)}
            continue
        if name == "dpo":
            found["num_pairs"] = write_pairs(folder, folder / "sft", seed)
            found["seconds_of_pairs"] = round(time.monotonic() - start, 1)
            run(name, "pairs", get_dpo_settings(variant), "sft")
        else:
            run(name, "rewarded", grpo_settings, "sft")
        seconds = round(time.monotonic() - start, 1)
        found |= {"seconds": seconds, "seconds_with_sft": round(seconds + sft["seconds"], 1)}
        found |= score(folder, name, task)
        found["gain"] = round(found["score"] - sft["score"], 4)
        if name == "grpo":
            found["rewards"] = read_rewards(folder / name)
        yield found


def read_rewards(run: Path) -> list[float]:
    """Return the mean reward of every tenth step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rewards = [line["reward"] for line in lines if "reward" in line]
    return [round(reward, 3) for reward in rewards[::10]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--variant", choices=VARIANTS, default="c")
    parser.add_argument("--task", choices=TASKS, default="destination")
    parser.add_argument(
        "--stages", choices=("grpo", "dpo", "frame"), nargs="*", default=("grpo", "dpo")
    )
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    variant = VARIANTS[args.variant]
    figures: dict[str, Any] = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": get_device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "versions": library_versions(),
        "settings": {**variant.__dict__, **SPLITS},
        "results": [],
    }
    for seed in args.seeds:
        for found in measure_seed(args, seed, variant):
            print(json.dumps(found), flush=True)
            figures["results"].append(found)
            args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
