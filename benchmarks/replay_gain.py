"""Measure forgetting of finesight-tiny with and without replay of general data, on CPUs.

    python benchmarks/replay_gain.py --out FILE [--seeds 0 1 2] [--workers 6] [--steps 100]

Each run trains all weights on train tickets to be read as JSON, the task of the quickstart.
`replay` adds general samples, a tenth of the training data: reading, counting and boxes, drawn like
the questions of the built-in suite of `finesight guard`, but others. The table has, as means over
the seeds with 95 % intervals (Student's t):

- `task`: F1 of the fields on 64 validation tickets.
- a column for each group of the suite: the score of the tuned model minus that of the base model.

The last row is the paired difference of both variants. A run takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

NUM_TICKETS, NUM_VALIDATION = 600, 64
REPLAY_FRACTION = 0.1
REPLAYED = ("reading", "counting", "boxes")
T_QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Quantile 0.975 of Student's t by number of values."""


def run_variant(seed: int, variant: str, steps: int, num_tickets: int) -> dict[str, Any]:
    """Train one variant, and return its scores and differences."""
    import guard_suite
    import torch

    from finesight.api import guard, import_data, train
    from finesight.samples.sample import write_samples
    from finesight.synth.tickets import TICKET_FIELDS, write_tickets

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        table = write_tickets(work / "tickets", num_tickets, seed)
        columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
        options = {"prompt": "Read the ticket.", "eval_last": min(NUM_VALIDATION, num_tickets // 4)}
        import_data(table, work / "data", columns=columns, **options)
        files = [str(work / "data" / "train.jsonl")]
        count = math.ceil(REPLAY_FRACTION * num_tickets / len(REPLAYED))
        for group in REPLAYED if variant == "replay" else ():
            seeds = [f"replay {seed} {index}" for index in range(count)]
            write_samples(work / f"{group}.jsonl", guard_suite.draw_samples(work, group, seeds))
            files.append(str(work / f"{group}.jsonl"))
        recipe = {
            "model": "finesight-tiny",
            "data": {"train": files, "eval": str(work / "data" / "eval.jsonl")},
            "tune": dict.fromkeys(("vision", "merger", "language"), "full"),
            "train": {"steps": steps, "batch_size": 16, "learning_rate": 1e-3, "seed": seed},
            "eval": {"metric": "json", "every": 0, "max_new_tokens": 112},
            "output_dir": str(work / "run"),
        }
        recipe["train"] |= {"device": "cpu", "precision": "fp32", "save_every": 0}
        result = train(recipe)
        changes = {one.group: one.difference for one in guard(work / "run", device="cpu")}
    scores = {name: one.after - one.before for name, one in changes.items() if name in REPLAYED}
    return {"seed": seed, "variant": variant, "task": result.after.scores["f1"], **scores}


def format_mean(values: Sequence[float]) -> str:
    """Format the mean of a few values with its 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):+.3f}"
    margin = T_QUANTILES[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):+.3f} ± {margin:.3f}"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the means of both variants, and of their differences for the same seed."""
    names = ("task", *REPLAYED)
    lines = ["| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    by_variant = {
        variant: {row["seed"]: row for row in rows if row["variant"] == variant}
        for variant in ("plain", "replay")
    }
    for variant, found in by_variant.items():
        cells = [format_mean([row[name] for row in found.values()]) for name in names]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    plain, replay = by_variant.values()
    cells = [format_mean([replay[seed][n] - plain[seed][n] for seed in plain]) for n in names]
    return "\n".join([*lines, f"| difference | {' | '.join(cells)} |"])


def main() -> None:
    """Run all seeds and variants in parallel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tickets", type=int, default=NUM_TICKETS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    with ProcessPoolExecutor(options.workers) as pool:
        futures = [
            pool.submit(run_variant, seed, variant, options.steps, options.tickets)
            for seed, variant in product(options.seeds, ("plain", "replay"))
        ]
        rows = [future.result() for future in futures]
    command = "python " + " ".join(["benchmarks/replay_gain.py", *sys.argv[1:]])
    options.out.write_text(json.dumps({"command": command, "runs": rows}, indent=1) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
