"""Measure the cost of the live report for training steps.

    python benchmarks/live_report_cost.py [--steps 10000] [--examples 200] [--seconds 150]

A generated run folder contains the given number of steps. The process multiplies small matrices,
like steps with short kernels, while the report thread writes pages. Steps wait for a page after an
evaluation: `first_evaluation_s` includes thumbnails, `later_evaluation_s` has new answers. For
other pages, `computed_s` is the CPU time of the report thread and `took_s` its wall time, an upper
bound of the delay of a step. Both are also reported as fractions of the total time. Prints one JSON
object.
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
from report_speed import make_box_examples
from rich.console import Console

from finesight.manifest import PREDICTIONS_FOLDER
from finesight.progress import ProgressConsole
from finesight.train import finalize
from finesight.train.checkpoint import TrainProgress
from finesight.train.oom import MemoryBudget
from finesight.train.run_dir import RunDir

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from run_dir_fixtures import START_RECORD, FakeRunDir, make_evaluation_line, make_step_line


class TimedLivePage(finalize.LiveReport):
    """Live page that records CPU time and wall time of each write."""

    def __init__(self, run: RunDir, screen: ProgressConsole) -> None:
        super().__init__(run, screen)
        self.compute_s: list[float] = []
        self.write_s: list[float] = []

    def write(self) -> None:
        """Write the page and record its time."""
        start, computed = time.perf_counter(), time.thread_time()
        super().write()
        self.compute_s.append(time.thread_time() - computed)
        self.write_s.append(time.perf_counter() - start)


def run_matmuls(seconds: float) -> None:
    """Multiply small matrices one after another."""
    a = torch.randn(64, 64)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a = torch.nn.functional.normalize(a @ a)


def make_run(folder: Path, num_steps: int, num_examples: int) -> RunDir:
    """Write a run folder with the given number of steps."""
    run = FakeRunDir(folder / "run", metric="grounding")
    lines = [START_RECORD | {"steps": 2 * num_steps}, make_evaluation_line(0, 0.2)]
    lines += [make_step_line(step) for step in range(1, num_steps + 1)]
    run.write_lines("metrics.jsonl", [*lines, make_evaluation_line(num_steps, 0.9)])
    before, after = make_box_examples(folder, num_examples)
    run.write_predictions("before", before)
    run.write_predictions(f"step-{num_steps}", after)
    return RunDir(run.folder)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=150.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temp_dir:
        run = make_run(Path(temp_dir), args.steps, args.examples)
        page = TimedLivePage(run, ProgressConsole(Console(file=io.StringIO())))
        # Evaluations create the thumbnails that later pages contain.
        page.write()
        for answers in (run.path / PREDICTIONS_FOLDER).iterdir():
            os.utime(answers)
        page.write()
        budget = MemoryBudget(pack_tokens=8192, activation_checkpointing=0.0)
        progress = TrainProgress(budget=budget, step=0, last_eval_step=-1, best=None)
        with page.run_in_background(progress):
            run_matmuls(args.seconds)
    result = {
        "command": " ".join(["benchmarks/live_report_cost.py", *sys.argv[1:]]),
        "first_evaluation_s": round(page.write_s[0], 3),
        "later_evaluation_s": round(page.write_s[1], 3),
        "computed_s": [round(seconds, 3) for seconds in page.compute_s[2:]],
        "took_s": [round(seconds, 3) for seconds in page.write_s[2:]],
        "computed_share": round(sum(page.compute_s[2:]) / args.seconds, 5),
        "took_share": round(sum(page.write_s[2:]) / args.seconds, 5),
        "next_page_after_s": round(page.interval_s, 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
