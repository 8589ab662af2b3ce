"""Measure the cost of the live report for training steps.

    python benchmarks/live_report_cost.py [--steps 10000] [--examples 200]

A generated run folder contains the given number of steps. Steps wait for a page:
`first_evaluation_s` includes thumbnails, `later_evaluation_s` has new answers, and `took_s` is the
duration of a page between evaluations. The next one follows after `next_page_after_s`. Prints one
JSON object.
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

from finesight.progress import ProgressConsole
from finesight.settings.manifest import PREDICTIONS_FOLDER
from finesight.train.run_dir import RunDir
from finesight.train.run_report import MIN_IDLE_RATIO, REPORT_INTERVAL_S, RunReport

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from run_dir_fixtures import START_RECORD, FakeRunDir, make_evaluation_line, make_step_line


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
    args = parser.parse_args()
    torch.set_num_threads(1)
    durations = []
    with tempfile.TemporaryDirectory() as temp_dir:
        run = make_run(Path(temp_dir), args.steps, args.examples)
        page = RunReport(run, ProgressConsole(Console(file=io.StringIO())), 0.0)
        for has_new_answers in (True, True, False):
            for answers in (run.path / PREDICTIONS_FOLDER).iterdir() if has_new_answers else ():
                os.utime(answers)
            start = time.perf_counter()
            page.write(is_live=True)
            durations.append(round(time.perf_counter() - start, 3))
    result = {
        "command": " ".join(["benchmarks/live_report_cost.py", *sys.argv[1:]]),
        "first_evaluation_s": durations[0],
        "later_evaluation_s": durations[1],
        "took_s": durations[2],
        "next_page_after_s": round(max(REPORT_INTERVAL_S, MIN_IDLE_RATIO * durations[2]), 1),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
