"""Compare the loss of a run with FP8 matrix products to the same run in bf16.

    python benchmarks/fp8_loss.py --out benchmarks/results/fp8_loss_cpu.json
        [--recipe RECIPE] [--only "bf16,fp32,other packs,fp8"] [--threads 2] [SETTING=VALUE ...]

The default task is the quickstart: finesight-tiny on generated train tickets. A recipe selects
other data and another model. All variants use the same seed and samples, each in its own process.
`other packs` changes the summation order of `bf16`, and `fp32` reduces rounding; their differences
are the reference for the difference of `fp8`. `language` and `vision` use FP8 in one part. `losses`
are means over 20 steps, `differences` are relative to `bf16`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp32": ("train.precision=fp32",),
    "other packs": ("train.pack_tokens=2048",),
    "fp8": ("tune.quantize.fp8=[language, vision]",),
    "language": ("tune.quantize.fp8=[language]",),
    "vision": ("tune.quantize.fp8=[vision]",),
}
DEFAULT_VARIANTS = "bf16,fp32,other packs,fp8"
STEPS_PER_MEAN = 20
"""Steps per mean of the loss."""

REPORTED_SECTIONS = ("image", "tune", "train", "eval")
"""Sections of the recipe in the report, besides the model."""


def train_variant(recipe: Path, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one variant in this process and return its results."""
    from finesight.settings.recipe import load_recipe
    from finesight.train.training_run import train

    result = train(load_recipe(recipe, [*overrides, f"output_dir={output}"]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "losses": [
            fmean(losses[at : at + STEPS_PER_MEAN]) for at in range(0, len(losses), STEPS_PER_MEAN)
        ],
        "after": _eval_summary(result.after),
        "seconds_of_steps": round(sum(line["step_s"] for line in lines if "loss" in line), 1),
    }


def _eval_summary(result: Any) -> dict[str, Any] | None:
    if result is None:
        return None
    fields = ("validation_loss", "scores", "intervals")
    return {key: value for key, value in result.as_json().items() if key in fields}


def add_loss_differences(figures: dict[str, Any]) -> None:
    """Add the relative loss differences to `bf16` to each variant."""
    baseline = figures["variants"]["bf16"]
    for found in figures["variants"].values():
        pairs = list(zip(found["losses"], baseline["losses"], strict=True))
        found["differences"] = [round(own / other - 1, 5) for own, other in pairs]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--only", default=DEFAULT_VARIANTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and write the results."""
    if sys.argv[1:2] == ["--train"]:
        written, output, *given = sys.argv[2:]
        print(json.dumps(train_variant(Path(written), Path(output), given)))
        return
    args = parse_args()
    import torch
    from qlora_quickstart import prepare_quickstart

    from finesight.infer.model_loader import resolve_device
    from finesight.settings.recipe import load_recipe
    from finesight.train.logging import get_device_name
    from finesight.train.setup import library_versions

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = args.recipe or prepare_quickstart(Path(folder) / "quickstart", 0)
        settings = load_recipe(recipe, args.settings)
        written = yaml.safe_load(recipe.read_text())
        figures: dict[str, Any] = {
            "command": f"python benchmarks/fp8_loss.py --out {args.out} --only '{args.only}'"
            f" --threads {args.threads}" + (f" --recipe {args.recipe.name}" if args.recipe else ""),
            "machine": get_device_name(resolve_device(settings.train.device)),
            "versions": library_versions(),
            "model": settings.model,
            "recipe": {key: value for key, value in written.items() if key in REPORTED_SECTIONS},
            "settings": args.settings,
            "variants": {},
        }
        for name in args.only.split(","):
            words = [sys.executable, __file__, "--train", str(recipe), f"{folder}/{name}"]
            done = subprocess.run(
                [*words, *args.settings, *VARIANTS[name]],
                check=True,
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            )
            figures["variants"][name] = json.loads(done.stdout.splitlines()[-1])
            add_loss_differences(figures)
            print(name, figures["variants"][name], flush=True)
            args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
