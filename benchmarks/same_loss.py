"""Does what makes a step quick change what is learned? The losses of a run with all of it, beside
those of the same run without, one kernel after the other with sums in fp32.

    python benchmarks/same_loss.py DATA --out FILE [--model finesight-tiny] [--steps 50]
        [SETTING=VALUE ...]

DATA is a table of finesight's with real pictures. Every variant takes the same seed and samples, by
LoRA on the language model in bf16 on one GPU, in a process of its own; drop-out draws other numbers
in each kind of kernel and is left out. `fp32` rounds less, and `other packs` adds up in another
order what `plain` adds up: how far these two differ is what the rest is to be seen beside.
`losses` are means over ten steps each, `differences` are relative to those of `plain`.
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

from peer_figures import head

TOGETHER = 10
VARIANTS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "plain": (True, ()),
    "fp32": (True, ("train.precision=fp32",)),
    "other packs": (True, ("train.pack_tokens=1024",)),
    "quick": (False, ()),
    "quick, features kept": (False, ("train.cache=memory",)),
    "quick, recomputed": (False, ("train.recompute=true",)),
}
"""Whether it goes one step after the other, and its settings."""


def train_one(words: list[str], output: Path, *, plainly: bool) -> list[float]:
    """Train in this process; the losses of its steps."""
    from ladder import ALL, without

    from finesight.recipe import load_recipe
    from finesight.train.loop import train

    recipe = output.with_suffix(".yaml")
    recipe.write_text("{}\n", encoding="utf-8")
    with without(*(ALL if plainly else ())):
        train(load_recipe(recipe, [*words, f"output={output}"]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Measure and write."""
    if sys.argv[1:2] == ["--train"]:
        plainly, output, *words = sys.argv[2:]
        print(json.dumps(train_one(words, Path(output), plainly=plainly == "plainly")))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="finesight-tiny")
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_intermixed_args()
    report: dict[str, Any] = head("same_loss.py", asked.data) | {"variants": {}}
    words = [
        f"model={asked.model}",
        f"data.train={asked.data.resolve()}",
        "tune.lora={rank: 16, alpha: 32, dropout: 0.0}",
        f"train.steps={asked.steps}",
        "train.precision=bf16",
        "train.cache=never",
        *asked.settings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, (plainly, settings) in VARIANTS.items():
            how = "plainly" if plainly else "quickly"
            start = [sys.executable, __file__, "--train", how, f"{folder}/{name}"]
            command = [*start, *words, *settings]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            losses = json.loads(done.stdout.splitlines()[-1])
            means = [fmean(losses[at : at + TOGETHER]) for at in range(0, len(losses), TOGETHER)]
            plain = report["variants"].get("plain", {}).get("losses", means)
            off = [round(own / other - 1, 5) for own, other in zip(means, plain, strict=True)]
            report["variants"][name] = {"losses": means, "differences": off}
            print(name, [round(mean, 4) for mean in means], off, flush=True)
            asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
