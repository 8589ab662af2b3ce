"""Estimate with `finesight plan` which model fits on which GPU.

    python benchmarks/gpu_recommendation.py [MODEL]... --work DIR [--out FILE] [--gpus T4,L4,H200]
        [--counts 2,4,8] [--only all]

MODEL is a hub name or a folder of configuration and tokenizer files. The default is three published
models; no weights are downloaded. Samples are generated: one image of a fixed size, a question and
an answer of 20 words. All results are estimates of `finesight plan RECIPE --gpu GPU`, for the given
numbers of GPUs. --only names the tuning methods.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from finesight import __version__
from finesight.model_folder import locate_model
from finesight.plan.plan_format import plan_to_dict
from finesight.plan.run_plan import RunPlan, plan_run
from finesight.progress import ProgressConsole
from finesight.settings.config import Recipe
from finesight.settings.recipe import load_recipe

MODELS = (
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)
GPUS = (
    *("RTX 4060", "RTX 3060", "T4", "RTX 4080", "RTX 4090", "V100-32GB"),
    *("A100-40GB", "L40S", "A100-80GB", "H200"),
)
IMAGE_SIDES = (280, 1008)
NUM_SAMPLES = 64
ANSWER_TEXT = (
    "a red bus stands before the old station while people wait for its doors to open again"
)

FULL_TUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")
LORA_TUNE = {"language": "lora"}


@dataclass(frozen=True)
class TuningMethod:
    """A tuning method: name and settings."""

    name: str
    tune_settings: dict[str, Any]
    optimizer: str


MEMORY_OPTIONS = (
    (),
    ("train.pack_tokens=2048",),
    ("train.activation_checkpointing=0.5",),
    ("train.activation_checkpointing=true",),
    ("tune.lora.rank=16",),
    ("tune.quantize.nf4=[language]",),
    ("tune.quantize.nf4=[language,vision,merger]",),
    ("image.height=672", "image.width=672"),
)
"""Memory options, applied one by one to LoRA of the last model with large images."""

TUNING_METHODS = (
    TuningMethod("LoRA", LORA_TUNE, "adamw"),
    TuningMethod("all", FULL_TUNE, "adamw"),
    TuningMethod("all, 8-bit moments", FULL_TUNE, "adamw_8bit"),
)


def write_dataset(folder: Path, image_side: int) -> Path:
    """Write a file of samples with images of `image_side` x `image_side` pixels."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(NUM_SAMPLES):
        image_name = f"images/{image_side}-{number}.png"
        Image.new("RGB", (image_side, image_side), (number, image_side % 256, 90)).save(
            folder / image_name
        )
        question = [
            {"type": "image", "image": image_name},
            {"type": "text", "text": "What is here?"},
        ]
        answer = [
            {"type": "text", "text": " ".join((ANSWER_TEXT + " " + ANSWER_TEXT).split()[:20])}
        ]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": str(number), "messages": turns}) + "\n")
    path = folder / f"{image_side}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_recipe(
    model: str, data: Path, image_side: int, method: TuningMethod, overrides: tuple[str, ...] = ()
) -> Recipe:
    """Write a recipe with defaults and the compared settings."""
    written = {
        "model": model,
        "data": {"train": str(data)},
        "image": {"height": image_side, "width": image_side},
        "tune": method.tune_settings,
        "train": {"epochs": 1, "batch_size": 16, "optimizer": method.optimizer},
        "output_dir": "runs/planned",
    }
    path = data.with_name("recipe.yaml")
    path.write_text(json.dumps(written), encoding="utf-8")
    return load_recipe(path, overrides)


def run_memory_options(
    folder: str, work: Path, gpu: str, screen: ProgressConsole
) -> list[dict[str, Any]]:
    """Estimate a run with each of MEMORY_OPTIONS."""
    rows = []
    for changes in MEMORY_OPTIONS:
        recipe = make_recipe(
            folder,
            write_dataset(work, IMAGE_SIDES[-1]),
            IMAGE_SIDES[-1],
            TUNING_METHODS[0],
            changes,
        )
        written = plan_to_dict(plan_run(recipe, gpu, screen))["recipe"]
        rows.append(
            {
                "measure": " ".join(changes) or "nothing",
                "card": gpu,
                "memory_gb": round(written["total_bytes"] / 1e9, 1),
                "samples_per_s": float(f"{written['samples_per_s']:.3g}"),
            }
        )
    return rows


def make_row(plan: RunPlan, method: TuningMethod) -> dict[str, Any]:
    """Return the chosen settings for one GPU, model and method."""
    record = plan_to_dict(plan)
    chosen = record["chosen"]
    num_gpus = plan.target.num_gpus
    return {
        "way": method.name,
        "card": plan.target.name if num_gpus == 1 else f"{num_gpus} x {plan.target.name}",
        "num_gpus": num_gpus,
        "parallel": chosen["parallel"] if num_gpus > 1 else "",
        "host_memory_gb": round(chosen["host_bytes"] / 1e9),
        "card_gb": plan.target.memory_bytes / 1e9,
        "tokens_of_a_sample": plan.token_stats.median_tokens,
        "precision": plan.target.precision,
        "fits_as_written": record["recipe"]["fits"],
        "fits": chosen["fits"],
        "pack_tokens": chosen["pack_tokens"],
        "activation_checkpointing": chosen["activation_checkpointing"],
        "nf4_parts": list(chosen["nf4_parts"]),
        "memory_gb": round(chosen["total_bytes"] / 1e9, 1),
        "samples_per_s": float(f"{chosen['samples_per_s']:.3g}"),
        "words": list(plan.overrides),
    }


def format_cell(rows: list[dict[str, Any]]) -> str:
    """Format the first method that fits: name, memory, speed; "no" if none fits."""
    row = next((row for row in rows if row["fits"]), None)
    if row is None:
        return "no"
    way = "Q-LoRA" if row["nf4_parts"] else row["way"]
    again = (
        f", {row['activation_checkpointing']:.0%} checkpointed"
        if row["activation_checkpointing"]
        else ""
    )
    mode = f", `{row['parallel']}`" if row["parallel"] else ""
    return f"{way}{mode}{again}: {row['memory_gb']:g} GB, {row['samples_per_s']:g}/s"


def format_table(
    rows: list[dict[str, Any]], image_side: int, methods: tuple[str, ...]
) -> list[str]:
    """Format a Markdown table: one line per GPU, one column per model."""
    here = [row for row in rows if row["side"] == image_side and row["way"] in methods]
    models = list(dict.fromkeys(row["model"] for row in here))
    lines = [f"| card | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for card in dict.fromkeys(row["card"] for row in here):
        of_card = [row for row in here if row["card"] == card]
        cells = [format_cell([row for row in of_card if row["model"] == m]) for m in models]
        lines.append(f"| {card}, {of_card[0]['card_gb']:g} GB | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--work", type=Path, required=True, help="folder for generated images")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--gpus", default=",".join(GPUS), help="cards by name")
    parser.add_argument("--counts", default="1", help="numbers of GPUs")
    parser.add_argument("--sides", default=",".join(map(str, IMAGE_SIDES)), help="pixels")
    parser.add_argument("--only", default=",".join(method.name for method in TUNING_METHODS))
    parser.add_argument("--measured-on", default="H100", help="the card of single measures")
    args = parser.parse_args()
    screen = ProgressConsole(Console(stderr=True, quiet=True))
    rows = []
    sides = [int(side) for side in args.sides.split(",")]
    for model in args.models:
        folder = str(locate_model(model).path)
        for side in sides:
            data = write_dataset(args.work, side)
            for way in (method for method in TUNING_METHODS if method.name in args.only.split(",")):
                recipe = make_recipe(folder, data, side, way)
                for card, count in product(args.gpus.split(","), args.counts.split(",")):
                    row = make_row(plan_run(recipe, card, screen, int(count)), way)
                    rows.append({"model": Path(model).name, "side": side, **row})
    measured = []
    if args.counts == "1":
        measured = run_memory_options(folder, args.work, args.measured_on, screen)
    for side in sides:
        print(f"\nimages of {side} x {side} pixels, LoRA on the language model")
        print("\n".join(format_table(rows, side, ("LoRA",))))
        print(f"\nimages of {side} x {side} pixels, all parameters")
        print("\n".join(format_table(rows, side, ("all", "all, 8-bit moments"))))
    print(f"\none measure alone, on {args.measured_on}: GB, samples/s")
    for row in measured:
        print(f"| `{row['measure']}` | {row['memory_gb']} | {row['samples_per_s']:g} |")
    if args.out is not None:
        hidden = {str(args.work): "DIR", str(args.out): "FILE"}
        words = [Path(hidden.get(word, word)).name for word in sys.argv[1:]]
        report = {
            "command": f"python benchmarks/gpu_recommendation.py {shlex.join(words)}",
            "versions": {
                "finesight": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "rows": rows,
            "measures": {"model": Path(args.models[-1]).name, "rows": measured},
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
