"""The quickstart's task on a CPU with frozen weights in four bits, beside those of 16.

    python benchmarks/qlora_quickstart.py --out benchmarks/results/qlora_quickstart_cpu.json
        [--seed 0] [--threads 2]

Every variant learns the same tickets from the same seed in a process of its own. `frozen_bytes` are
what the weights that stay frozen take in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOUR = "tune.nf4=[vision, merger, language]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "nf4": (FOUR,),
    "nf4, 8-bit moments": (FOUR, "train.optimizer=adamw8bit"),
}


def prepare(folder: Path, seed: int) -> Path:
    """Tickets drawn and imported as the quickstart does; gives its recipe."""
    from finesight.data.importing import import_file
    from finesight.data.opening import Request
    from finesight.quickstart import PROMPT, Plan, write_recipe
    from finesight.synth.tickets import FIELDS, TABLE, draw_tickets

    plan = Plan(seed=seed)
    recipe = write_recipe(folder, plan)
    draw_tickets(folder / "tickets", plan.pictures, seed)
    columns = {"image": "picture", "fields": ",".join(FIELDS)}
    request = Request(columns=columns, prompt=PROMPT, eval_last=plan.held_out)
    import_file(folder / "tickets" / TABLE, folder / "data", request)
    return recipe


def train_one(recipe: Path, output: Path, changes: list[str]) -> dict[str, Any]:
    """Train in this process; gives its figures."""
    import torch

    from finesight.hub import locate
    from finesight.model.weights import load_model
    from finesight.recipe import load_recipe
    from finesight.train.loop import train

    settings = load_recipe(recipe, [*changes, f"output={output}"])
    result = train(settings)
    assert result.after is not None, "a run without held-out data"
    model = load_model(
        locate(settings.model), torch.bfloat16, torch.device("cpu"), settings.tune.nf4 or ()
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "f1": result.after.scores["f1"],
        "f1_interval": result.after.intervals["f1"],
        "exact": result.after.scores["exact"],
        "held_out_loss": result.after.held_out_loss,
        "seconds_of_steps": round(sum(line["seconds"] for line in lines if "loss" in line), 1),
        "frozen_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
    }


def main() -> None:
    """Measure and write."""
    if sys.argv[1:2] == ["--train"]:
        written, output, *given = sys.argv[2:]
        print(json.dumps(train_one(Path(written), Path(output), given)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    import torch

    from finesight.train.prepare import versions
    from finesight.train.report import device_name

    torch.set_num_threads(asked.threads)
    figures: dict[str, Any] = {
        "command": f"python benchmarks/qlora_quickstart.py --out {asked.out} --seed {asked.seed}"
        f" --threads {asked.threads}",
        "machine": device_name(torch.device("cpu")),
        "versions": versions(),
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder) / "quickstart", asked.seed)
        for number, (name, changes) in enumerate(VARIANTS.items()):
            words = [sys.executable, __file__, "--train", str(recipe), f"{folder}/{number}"]
            environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads)}
            done = subprocess.run(
                [*words, *changes], check=True, stdout=subprocess.PIPE, env=environment
            )
            figures["variants"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, figures["variants"][name], flush=True)
            asked.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
