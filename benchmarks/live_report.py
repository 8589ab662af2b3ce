"""What the page of a run that goes on costs its steps. Prints one JSON object.

    python benchmarks/live_report.py [--steps 10000] [--examples 200] [--seconds 150]

A made-up run of so many noted steps lies in a folder; this process multiplies small matrices, as
steps do whose kernels are short, for so many seconds with the pages and as long without. `pages`
says of each how long its thread computed, `share` is that over the time; `slower` is how many fewer
products there were, in which the noise of a machine that others use, too, is as large.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from report_speed import boxes
from rich.console import Console

from finesight.train import live
from finesight.train.budget import Budget
from finesight.train.checkpoint import Progress
from finesight.train.progress import Screen
from finesight.train.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from run_folders import START, MadeRun, measured_line, step_line


class Timed(live.LivePage):
    """Notes how long its thread computed."""

    def __init__(self, run: Run, screen: Screen) -> None:
        super().__init__(run, screen)
        self.took: list[float] = []

    def write(self) -> None:
        """As every page is written."""
        start = time.thread_time()
        super().write()
        self.took.append(time.thread_time() - start)


def products(seconds: float) -> int:
    """How many small products there are time for."""
    a = torch.randn(64, 64)
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        a = torch.nn.functional.normalize(a @ a)
        count += 1
    return count


def made(folder: Path, steps: int, examples: int) -> Run:
    """A run that has gone on for so many steps."""
    run = MadeRun(folder / "run", metric="grounding")
    lines = [START | {"steps": 2 * steps}, measured_line(0, 0.2)]
    lines += [step_line(step) for step in range(1, steps + 1)]
    run.lines("metrics.jsonl", [*lines, measured_line(steps, 0.9)])
    before, after = boxes(folder, examples)
    run.answered("before", before)
    run.answered(f"step-{steps}", after)
    return Run(run.folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=150.0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run = made(Path(place), chosen.steps, chosen.examples)
        page = Timed(run, Screen(Console(file=io.StringIO())))
        # As at the measurement, whose thumbnails the pages after it have.
        page.write()
        with page.going(Progress(Budget(pack_tokens=8192, recompute=0.0))):
            beside = products(chosen.seconds)
        alone = products(chosen.seconds)
    own = page.took[1:]
    result = {
        "command": " ".join(["benchmarks/live_report.py", *sys.argv[1:]]),
        "first_page_s": round(page.took[0], 3),
        "pages": [round(seconds, 3) for seconds in own],
        "share": round(sum(own) / chosen.seconds, 5),
        "slower": round(1 - beside / alone, 4),
        "next_page_after_s": round(page.again, 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
