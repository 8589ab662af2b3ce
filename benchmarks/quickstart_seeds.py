"""The quickstart from several seeds: seconds in all and of training, figures before and after.

    python benchmarks/quickstart_seeds.py --out benchmarks/results/quickstart_cpu.json

Each seed draws its own tickets and trains in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from finesight.train.prepare import versions
from finesight.train.report import device_name

SEEDS = (0, 1, 2)

ONE = """
import json, sys
from pathlib import Path
from rich.console import Console
from finesight.quickstart import Plan, quickstart
done = quickstart(Path(sys.argv[1]), Console(stderr=True), Plan(seed=int(sys.argv[2])))
print(json.dumps(done.as_json()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    figures = {
        "command": f"python benchmarks/quickstart_seeds.py --out {asked.out}",
        "machine": device_name(torch.device("cpu")),
        "versions": versions(),
        "seeds": [measured(seed) for seed in SEEDS],
    }
    asked.out.write_text(json.dumps(figures, indent=1) + "\n")


def measured(seed: int) -> dict[str, Any]:
    """Figures of one quickstart, in a new folder."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        words = [sys.executable, "-c", ONE, str(out), str(seed)]
        result = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").open()]
    steps = sum(line["seconds"] for line in lines if "loss" in line)
    found = {
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "seconds_of_steps": round(steps, 1),
        "before": result["result"]["before"],
        "after": result["result"]["after"],
    }
    print(seed, found["seconds"], found["after"]["scores"], flush=True)
    return found


if __name__ == "__main__":
    main()
