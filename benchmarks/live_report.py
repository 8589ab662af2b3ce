"""What the page of a run that goes on costs its steps. Prints one JSON object.

    python benchmarks/live_report.py [--steps 10000] [--examples 200] [--seconds 150]

A made-up run of so many noted steps lies in a folder; this process multiplies small matrices, as
steps do whose kernels are short, for so many seconds beside the pages. The steps wait for a page at
a measurement: `at_the_measurement_s` is the first one, which makes the pictures, `at_a_later_one_s`
one with new answers about them. `computed_s` says of each other page how long its thread computed,
`took_s` how long it took with its waits for the interpreter and the disk: more than that no step
can lose to it. Both are given as shares of the time, too.
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

from finesight.run_folder import PREDICTIONS
from finesight.train import live
from finesight.train.budget import Budget
from finesight.train.checkpoint import Progress
from finesight.train.progress import Screen
from finesight.train.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from run_folders import START, MadeRun, measured_line, step_line


class Timed(live.LivePage):
    """Notes how long its pages computed, and how long they took."""

    def __init__(self, run: Run, screen: Screen) -> None:
        super().__init__(run, screen)
        self.computed: list[float] = []
        self.took: list[float] = []

    def write(self) -> None:
        """As every page is written."""
        start, computed = time.perf_counter(), time.thread_time()
        super().write()
        self.computed.append(time.thread_time() - computed)
        self.took.append(time.perf_counter() - start)


def products(seconds: float) -> None:
    """Small products, one after the other."""
    a = torch.randn(64, 64)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a = torch.nn.functional.normalize(a @ a)


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
        # As at measurements, whose thumbnails the pages after them have.
        page.write()
        for answers in (run.folder / PREDICTIONS).iterdir():
            os.utime(answers)
        page.write()
        with page.going(Progress(Budget(pack_tokens=8192, recompute=0.0))):
            products(chosen.seconds)
    result = {
        "command": " ".join(["benchmarks/live_report.py", *sys.argv[1:]]),
        "at_the_measurement_s": round(page.took[0], 3),
        "at_a_later_one_s": round(page.took[1], 3),
        "computed_s": [round(seconds, 3) for seconds in page.computed[2:]],
        "took_s": [round(seconds, 3) for seconds in page.took[2:]],
        "computed_share": round(sum(page.computed[2:]) / chosen.seconds, 5),
        "took_share": round(sum(page.took[2:]) / chosen.seconds, 5),
        "next_page_after_s": round(page.again, 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
