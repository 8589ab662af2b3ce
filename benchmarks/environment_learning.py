"""Measure GRPO with tools after supervised fine-tuning on demonstrations of their calls.

    OMP_NUM_THREADS=2 python benchmarks/environment_learning.py --work DIR --out FILE
        [--tasks words gui] [--seeds 0 1 2] [--device cpu] [--grpo_steps N] ...

Each seed generates images of a task, and trains finesight-tiny:

- `words`: a small word in a large image, which is unreadable at `max_pixels`, with the tool
  `image_zoom_in_tool` and the reward `exact`.
- `gui`: tasks in a synthetic window, with the tools and the reward of the environment `gui`.

The stages of a seed are:

- `single`, for `words`: supervised fine-tuning on the questions and answers, without the tool.
- `sft`: supervised fine-tuning on demonstrations of the calls. Embeddings are trained, too: the
  pretraining of finesight-tiny has no tool calls, so that many of their tokens are new.
- `grpo`: LoRA on `sft`, with rewards on other samples.

`score` is the share of successful episodes on the same validation samples, with greedy decoding.
`score` has an exact 95 % interval, and `gain` (`grpo` minus `sft`) Tango's paired interval. The
items of `pooled` are those of all seeds together; samples of different seeds differ. The file is
written after each stage. For a smoke test, `--limit` is the number of steps and of validation
samples.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from finesight.environment_components import EpisodeSettings
from finesight.evaluate.bootstrap import clopper_pearson_interval, tango_interval
from finesight.evaluate.environment import Environment
from finesight.evaluate.eval_case import get_reference_answer
from finesight.evaluate.generation_eval import predict_answers
from finesight.infer.model_loader import load_inference_model, select_cpu_precision
from finesight.samples.sample import LocatedSample, read_samples
from finesight.settings.config import Device
from finesight.settings.recipe import recipe_from_dict
from finesight.synth.demonstrations import write_demonstrations
from finesight.synth.gui_tasks import write_gui_tasks
from finesight.synth.small_words import write_small_words
from finesight.synth.tool_task import ToolTask
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions
from finesight.train.training_run import train

BASE_MODEL = "finesight-tiny"
BATCH_SIZE = 64
TOOL_SECONDS = 60.0


@dataclass(frozen=True)
class TrainingSettings:
    """Number of samples of each split, and settings of the training runs."""

    demonstrations: int = 600
    rewarded: int = 400
    validation: int = 200
    max_pixels: int = 50_176
    sft_steps: int = 400
    sft_batch_size: int = 16
    sft_learning_rate: float = 5e-4
    grpo_steps: int = 40
    grpo_batch_size: int = 8
    grpo_learning_rate: float = 5e-4
    rank: int = 32
    num_generations: int = 8
    max_completion_length: int = 256
    max_iterations: int = 2


@dataclass(frozen=True)
class Task:
    """Generator of a task, its environment, and the reward of GRPO."""

    write: Callable[[Path, int, int], list[ToolTask]]
    environment: str
    reward: str
    settings: TrainingSettings
    has_single_turn: bool


TASKS = {
    "words": Task(
        write=write_small_words,
        environment="image_zoom_in_tool",
        reward="exact",
        settings=TrainingSettings(),
        has_single_turn=True,
    ),
    "gui": Task(
        write=write_gui_tasks,
        environment="gui",
        reward="environment",
        settings=TrainingSettings(max_pixels=200_704, max_completion_length=768, max_iterations=5),
        has_single_turn=False,
    ),
}

SPLIT_SEEDS = {"demonstrations": 0, "rewarded": 1, "validation": 2}
"""Offset of the seed of each split; three follow each other for each seed of the training."""


def write_splits(folder: Path, task: Task, settings: TrainingSettings, seed: int) -> None:
    """Write the samples of all splits, and the demonstrations of the first one."""
    folder.mkdir(parents=True)
    for split, offset in SPLIT_SEEDS.items():
        count = getattr(settings, split)
        tasks = task.write(folder / split, count, len(SPLIT_SEEDS) * seed + offset)
        if split == "demonstrations":
            with Environment(task.environment, folder, TOOL_SECONDS) as environment:
                write_demonstrations(folder / split, tasks, environment)


def get_sft_sections(settings: TrainingSettings) -> dict[str, Any]:
    """Return model, `tune` and `train` of supervised fine-tuning."""
    train_section = {
        "steps": settings.sft_steps,
        "batch_size": settings.sft_batch_size,
        "learning_rate": settings.sft_learning_rate,
    }
    return {
        "model": BASE_MODEL,
        "tune": {"language": "full", "embeddings": "full"},
        "train": train_section,
    }


def get_grpo_sections(settings: TrainingSettings, task: Task, model: Path) -> dict[str, Any]:
    """Return model, `tune`, `train` and `rewards` of GRPO."""
    lora = {"rank": settings.rank, "alpha": settings.rank, "dropout": 0.0}
    train_section = {
        "objective": "grpo",
        "steps": settings.grpo_steps,
        "batch_size": settings.grpo_batch_size,
        "learning_rate": settings.grpo_learning_rate,
        "grpo": {
            "num_generations": settings.num_generations,
            "max_completion_length": settings.max_completion_length,
            "environment": task.environment,
            "max_tool_calling_iterations": settings.max_iterations,
            "tool_timeout": TOOL_SECONDS,
        },
    }
    return {
        "model": str(model),
        "tune": {"language": "lora", "lora": lora},
        "train": train_section,
        "rewards": [task.reward],
    }


def run_episodes(
    run: Path,
    data: Path,
    task: Task,
    settings: TrainingSettings,
    *,
    uses_tools: bool,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Run an episode for each validation sample, and return their successes and means."""
    loaded = load_inference_model(str(run), device)
    samples = [LocatedSample(one, data.parent) for one in read_samples(data)]
    episode_settings = None
    if uses_tools:
        episode_settings = EpisodeSettings(
            environment=task.environment,
            max_tool_calling_iterations=settings.max_iterations,
            tool_timeout=TOOL_SECONDS,
            max_tokens=settings.max_completion_length,
        )
    predictions = predict_answers(
        loaded.model,
        loaded.renderer,
        samples,
        max_new_tokens=settings.max_completion_length,
        batch_size=BATCH_SIZE,
        episodes=episode_settings,
        run_dir=run,
    )
    successes = []
    episodes = []
    for sample, prediction in zip(samples, predictions, strict=True):
        episode = prediction.episode
        if episode is not None:
            episodes.append(episode)
        if task.reward == "environment":
            successes.append(episode is not None and episode.reward == 1.0)
        else:
            successes.append(prediction.answer in get_reference_answer(sample.sample)[0])
    num_turns = sum(turn.role == "tool" for one in episodes for turn in one.turns)
    return {
        "successes": successes,
        "tool_turns": num_turns / len(samples),
        "errors": sum(bool(one.error) for one in episodes) / len(samples),
    }


def describe_score(successes: Sequence[bool]) -> dict[str, Any]:
    """Return the share of successes with its exact interval."""
    low, high = clopper_pearson_interval(sum(successes), len(successes))
    return {
        "score": round(sum(successes) / len(successes), 4),
        "interval": [round(low, 4), round(high, 4)],
        "num_samples": len(successes),
    }


def describe_gain(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """Return the difference of two shares of successes on the same samples, with its interval."""
    num_gained = sum(new and not old for old, new in zip(before, after, strict=True))
    num_lost = sum(old and not new for old, new in zip(before, after, strict=True))
    low, high = tango_interval(num_gained, num_lost, len(before))
    return {
        "gain": round((num_gained - num_lost) / len(before), 4),
        "gain_interval": [round(low, 4), round(high, 4)],
    }


def measure_seed(
    folder: Path, task: Task, settings: TrainingSettings, seed: int, device: Device
) -> Iterator[tuple[str, list[bool], dict[str, Any]]]:
    """Run all stages with a seed, and yield name, successes and figures of each."""
    write_splits(folder, task, settings, seed)
    validation = folder / "validation" / "data.jsonl"

    precision = "auto"
    if device == "cpu":
        precision = select_cpu_precision()

    def measure(
        name: str, data: Path, sections: dict[str, Any], *, uses_tools: bool = True
    ) -> tuple[list[bool], dict[str, Any]]:
        recipe = {
            **sections,
            "data": {"train": str(data)},
            "image": {"max_pixels": settings.max_pixels},
            "output_dir": str(folder / name),
        }
        recipe["train"] |= {"seed": seed, "device": device, "precision": precision}
        start = time.monotonic()
        train(recipe_from_dict(recipe, {}))
        seconds = round(time.monotonic() - start, 1)
        found = run_episodes(
            folder / name, validation, task, settings, uses_tools=uses_tools, device=device
        )
        successes = found.pop("successes")
        return successes, {"seconds": seconds, **describe_score(successes), **found}

    data = folder / "demonstrations"
    if task.has_single_turn:
        sections = get_sft_sections(settings)
        yield "single", *measure("single", data / "data.jsonl", sections, uses_tools=False)
    before, found = measure("sft", data / "demonstrations.jsonl", get_sft_sections(settings))
    yield "sft", before, found
    sections = get_grpo_sections(settings, task, folder / "sft")
    after, found = measure("grpo", folder / "rewarded" / "data.jsonl", sections)
    found |= describe_gain(before, after)
    yield "grpo", after, {**found, "rewards": read_rewards(folder / "grpo")}


def read_rewards(run: Path) -> list[float]:
    """Return the mean reward of each step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [round(line["reward"], 3) for line in lines if "reward" in line]


def pool(successes: dict[str, list[bool]]) -> dict[str, Any]:
    """Return the scores of all seeds together, and the gain of GRPO."""
    pooled = {stage: describe_score(found) for stage, found in successes.items()}
    if len(successes.get("grpo", ())) == len(successes.get("sft", ())) > 0:
        pooled["grpo"] |= describe_gain(successes["sft"], successes["grpo"])
    return pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=[*TASKS])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=int)
    for setting in fields(TrainingSettings):
        parser.add_argument(f"--{setting.name}", type=type(setting.default))
    args = parser.parse_args()
    changes = {}
    for setting in fields(TrainingSettings):
        value = getattr(args, setting.name)
        if value is not None:
            changes[setting.name] = value
    if args.limit:
        for name in ("sft_steps", "grpo_steps", "validation"):
            changes[name] = args.limit
    figures: dict[str, Any] = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": get_device_name(torch.device(args.device)),
        "cores": len(os.sched_getaffinity(0)),
        "versions": library_versions(),
        "settings": {},
        "results": [],
        "pooled": {},
    }
    for name in args.tasks:
        task = TASKS[name]
        settings = replace(task.settings, **changes)
        figures["settings"][name] = asdict(settings)
        successes: dict[str, list[bool]] = {}
        for seed in args.seeds:
            folder = args.work / f"{name}-{seed}"
            for stage, own, found in measure_seed(folder, task, settings, seed, args.device):
                successes[stage] = [*successes.get(stage, []), *own]
                result = {"task": name, "seed": seed, "stage": stage, **found}
                print(json.dumps(result), flush=True)
                figures["results"].append(result)
                figures["pooled"][name] = pool(successes)
                args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
