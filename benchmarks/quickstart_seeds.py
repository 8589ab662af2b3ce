"""Run the quickstart with several seeds: total and training time, metrics before and after.

    python benchmarks/quickstart_seeds.py --out benchmarks/results/quickstart_cpu.json

Each seed generates its own tickets and runs in its own process.
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

from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions

SEEDS = (0, 1, 2)

QUICKSTART_SCRIPT = """
import json, sys
from pathlib import Path
from finesight.ingest.init_operation import QuickstartSettings, quickstart
outcome = quickstart(Path(sys.argv[1]), QuickstartSettings(seed=int(sys.argv[2])))
print(json.dumps(outcome.data))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figures = {
        "command": f"python benchmarks/quickstart_seeds.py --out {args.out}",
        "machine": get_device_name(torch.device("cpu")),
        "versions": library_versions(),
        "seeds": [measure_seed(seed) for seed in SEEDS],
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


def measure_seed(seed: int) -> dict[str, Any]:
    """Run the quickstart with one seed in a new folder."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quickstart"
        words = [sys.executable, "-c", QUICKSTART_SCRIPT, str(out), str(seed)]
        result = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").open()]
    steps = sum(line["step_s"] for line in lines if "loss" in line)
    found = {
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "seconds_of_steps": round(steps, 1),
        "before": result["before"],
        "after": result["after"],
    }
    print(seed, found["seconds"], found["after"]["scores"], flush=True)
    return found


if __name__ == "__main__":
    main()
