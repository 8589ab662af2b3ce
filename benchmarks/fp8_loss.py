"""What products in FP8 change of a run: its loss beside that of the same run in bf16.

    python benchmarks/fp8_loss.py --out benchmarks/results/fp8_loss_cpu.json
        [--recipe RECIPE] [--only "bf16,fp32,other packs,fp8"] [--threads 2] [SETTING=VALUE ...]

Without a recipe, finesight-tiny learns to read generated train tickets, as the quickstart has it; a
recipe brings other pictures and another model. Every variant takes the same seed and samples, in a
process of its own. `other packs` adds up in another order what `bf16` adds up, and `fp32`
rounds less: how far these two differ is what a difference of `fp8` is to be seen beside. `language`
and `vision` have FP8 in that part alone. `losses` are means over 20 steps each, `differences` are
relative to those of `bf16`.
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
    "fp8": ("tune.fp8=[language, vision]",),
    "language": ("tune.fp8=[language]",),
    "vision": ("tune.fp8=[vision]",),
}
USUAL = "bf16,fp32,other packs,fp8"
STEPS = 20
"""Of a mean."""

SHOWN = ("picture", "tune", "train", "eval")
"""Of a recipe, beside the model: what computing hangs on."""


def train_one(recipe: Path, output: Path, changes: list[str]) -> dict[str, Any]:
    """Train in this process; gives its figures."""
    from finesight.recipe import load_recipe
    from finesight.train.loop import train

    result = train(load_recipe(recipe, [*changes, f"output={output}"]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return {
        "losses": [fmean(losses[at : at + STEPS]) for at in range(0, len(losses), STEPS)],
        "after": _measured(result.after),
        "seconds_of_steps": round(sum(line["seconds"] for line in lines if "loss" in line), 1),
    }


def _measured(after: Any) -> dict[str, Any] | None:
    if after is None:
        return None
    kept = ("held_out_loss", "scores", "intervals")
    return {key: value for key, value in after.as_json().items() if key in kept}


def compare(figures: dict[str, Any]) -> None:
    """Add to each variant how its losses differ from those of `bf16`."""
    plain = figures["variants"]["bf16"]
    for found in figures["variants"].values():
        pairs = list(zip(found["losses"], plain["losses"], strict=True))
        found["differences"] = [round(own / other - 1, 5) for own, other in pairs]


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--only", default=USUAL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*")
    return parser.parse_args()


def main() -> None:
    """Measure and write."""
    if sys.argv[1:2] == ["--train"]:
        written, output, *given = sys.argv[2:]
        print(json.dumps(train_one(Path(written), Path(output), given)))
        return
    asked = parsed()
    import torch
    from qlora_quickstart import prepare

    from finesight.infer.load import resolve_device
    from finesight.recipe import load_recipe
    from finesight.train.prepare import versions
    from finesight.train.report import device_name

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        recipe = asked.recipe or prepare(Path(folder) / "quickstart", 0)
        settings = load_recipe(recipe, asked.settings)
        written = yaml.safe_load(recipe.read_text())
        figures: dict[str, Any] = {
            "command": f"python benchmarks/fp8_loss.py --out {asked.out} --only '{asked.only}'"
            f" --threads {asked.threads}"
            + (f" --recipe {asked.recipe.name}" if asked.recipe else ""),
            "machine": device_name(resolve_device(settings.train.device)),
            "versions": versions(),
            "model": settings.model,
            "recipe": {key: value for key, value in written.items() if key in SHOWN},
            "settings": asked.settings,
            "variants": {},
        }
        for name in asked.only.split(","):
            words = [sys.executable, __file__, "--train", str(recipe), f"{folder}/{name}"]
            done = subprocess.run(
                [*words, *asked.settings, *VARIANTS[name]],
                check=True,
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": str(asked.threads)},
            )
            figures["variants"][name] = json.loads(done.stdout.splitlines()[-1])
            compare(figures)
            print(name, figures["variants"][name], flush=True)
            asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
