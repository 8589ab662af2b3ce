"""Compare the quickstart on a CPU with 4-bit and 16-bit frozen weights.

    python benchmarks/qlora_quickstart.py --out benchmarks/results/qlora_quickstart_cpu.json
        [--seed 0] [--threads 2]

All variants use the same tickets and seed, each in its own process. `frozen_bytes` is the memory of
the frozen weights.
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

NF4_OVERRIDE = "tune.quantize.nf4=[vision, merger, language]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "nf4": (NF4_OVERRIDE,),
    "nf4, 8-bit moments": (NF4_OVERRIDE, "train.optimizer=adamw_8bit"),
}


def prepare_quickstart(folder: Path, seed: int) -> Path:
    """Generate and import the tickets of the quickstart. Returns the recipe."""
    from finesight.ingest.import_source import ImportOptions
    from finesight.ingest.importer import import_dataset
    from finesight.ingest.init_operation import PROMPT, QuickstartSettings, write_recipe
    from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets

    plan = QuickstartSettings(seed=seed)
    recipe = write_recipe(folder, plan)
    write_tickets(folder / "tickets", plan.num_images, seed)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    request = ImportOptions(columns=columns, prompt=PROMPT, eval_last=plan.num_eval_rows)
    import_dataset(folder / "tickets" / TABLE_FILE, folder / "data", request)
    return recipe


def train_variant(recipe: Path, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one variant in this process and return its results."""
    import torch

    from finesight.model.weights_io import load_model
    from finesight.model_folder import locate_model
    from finesight.settings.recipe import load_recipe
    from finesight.train.training_run import train

    settings = load_recipe(recipe, [*overrides, f"output_dir={output}"])
    result = train(settings)
    assert result.after is not None, "a run without validation data"
    model = load_model(
        locate_model(settings.model),
        torch.bfloat16,
        torch.device("cpu"),
        settings.tune.quantize.nf4 or (),
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "f1": result.after.scores["f1"],
        "f1_interval": result.after.intervals["f1"],
        "exact": result.after.scores["exact"],
        "validation_loss": result.after.validation_loss,
        "seconds_of_steps": round(sum(line["step_s"] for line in lines if "loss" in line), 1),
        "frozen_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
    }


def main() -> None:
    """Run the benchmark and write the results."""
    if sys.argv[1:2] == ["--train"]:
        written, output, *given = sys.argv[2:]
        print(json.dumps(train_variant(Path(written), Path(output), given)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    from finesight.train.logging import get_device_name
    from finesight.train.setup import library_versions

    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {
        "command": f"python benchmarks/qlora_quickstart.py --out {args.out} --seed {args.seed}"
        f" --threads {args.threads}",
        "machine": get_device_name(torch.device("cpu")),
        "versions": library_versions(),
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare_quickstart(Path(folder) / "quickstart", args.seed)
        for number, (name, changes) in enumerate(VARIANTS.items()):
            words = [sys.executable, __file__, "--train", str(recipe), f"{folder}/{number}"]
            environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(
                [*words, *changes], check=True, stdout=subprocess.PIPE, env=environment
            )
            figures["variants"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, figures["variants"][name], flush=True)
            args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
