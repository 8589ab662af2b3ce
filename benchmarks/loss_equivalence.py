"""Compare the losses of optimized training to an unoptimized reference.

    python benchmarks/loss_equivalence.py DATA --out FILE [--model finesight-tiny] [--steps 50]
        [SETTING=VALUE ...]

DATA is a samples file with real images. The `reference` variant runs one kernel after another with
fp32 sums. All variants use the same seed and samples, LoRA on the decoder in bf16, one GPU, each in
its own process. Dropout is disabled because kernels use different random numbers. `fp32` reduces
rounding, and `other packs` changes the summation order of `reference`; their difference is the
reference for the other variants. `losses` are means over ten steps, `differences` are relative to
`reference`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from peer_metrics import report_header

STEPS_PER_MEAN = 10
VARIANTS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "reference": (True, ()),
    "fp32": (True, ("train.precision=fp32",)),
    "other packs": (True, ("train.pack_tokens=1024",)),
    "optimized": (False, ()),
    "optimized, vision cache": (False, ("train.vision_cache=memory",)),
    "optimized, checkpointing": (False, ("train.activation_checkpointing=true",)),
}
"""Whether optimizations are disabled, and the overrides of a variant."""


def train_variant(overrides: list[str], output: Path, *, is_unoptimized: bool) -> list[float]:
    """Train one variant in this process and return the losses."""
    from ladder import OPTIMIZATIONS, disable_optimizations

    from finesight.settings.recipe import load_recipe
    from finesight.train.training_run import train

    recipe = output.with_suffix(".yaml")
    recipe.write_text("{}\n", encoding="utf-8")
    with disable_optimizations(*(OPTIMIZATIONS if is_unoptimized else ())):
        train(load_recipe(recipe, [*overrides, f"output_dir={output}"]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Run the benchmark and write the results."""
    if sys.argv[1:2] == ["--train"]:
        mode, output, *words = sys.argv[2:]
        print(json.dumps(train_variant(words, Path(output), is_unoptimized=mode == "unoptimized")))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="finesight-tiny")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_intermixed_args()
    report: dict[str, Any] = report_header("loss_equivalence.py", args.data) | {"variants": {}}
    words = [
        f"model={args.model}",
        f"data.train={args.data.resolve()}",
        "tune.lora={rank: 16, alpha: 32, dropout: 0.0}",
        f"train.steps={args.steps}",
        "train.precision=bf16",
        "train.vision_cache=never",
        *args.settings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, (is_unoptimized, settings) in VARIANTS.items():
            mode = "unoptimized" if is_unoptimized else "optimized"
            start = [sys.executable, __file__, "--train", mode, f"{folder}/{name}"]
            command = [*start, *words, *settings]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            losses = json.loads(done.stdout.splitlines()[-1])
            means = [
                fmean(losses[at : at + STEPS_PER_MEAN])
                for at in range(0, len(losses), STEPS_PER_MEAN)
            ]
            baseline = report["variants"].get("reference", {}).get("losses", means)
            off = [round(own / other - 1, 5) for own, other in zip(means, baseline, strict=True)]
            report["variants"][name] = {"losses": means, "differences": off}
            print(name, [round(mean, 4) for mean in means], off, flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
