"""Run the fault tests of distributed training with 2 and 4 gloo ranks, and write a table.

Each row contains the promised end of a run, whether the test observed it, and the seconds of the
test, which include the start of the processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
LOST_RANK_TEST = "tests/faults/test_process_failures.py::test_lost_rank_is_named"
PARALLEL_TESTS = "tests/train/parallel/test_distributed.py"
SIGNAL_TEST = f"{PARALLEL_TESTS}::test_stop_signal_on_one_rank_stops_all"
UNEQUAL_TEST = f"{PARALLEL_TESTS}::test_training_is_equal_for_any_world_size"
LOST_RANK_END = "rank 0 writes a checkpoint and names the lost rank; all ranks exit with an error"
SIGNAL_END = "all ranks stop with a checkpoint"
UNEQUAL_END = "the run ends with the losses and weights of one process, within 1e-6"


def list_cases() -> Iterator[tuple[str, str, str, str]]:
    """Yield the fault, processes, promised end and test id of each case."""
    for count in ("2", "4"):
        yield "killed rank", count, LOST_RANK_END, f"{LOST_RANK_TEST}[{count}-killed]"
        yield "hanging rank", count, LOST_RANK_END, f"{LOST_RANK_TEST}[{count}-hung]"
        for rank in ("0", "1" if count == "2" else "3"):
            test = f"{SIGNAL_TEST}[{count}-{rank}]"
            yield f"SIGTERM on rank {rank}", count, SIGNAL_END, test
    yield "unequal data per rank", "2, 4", UNEQUAL_END, UNEQUAL_TEST


def run_test(test: str) -> tuple[bool, float]:
    """Run one test; return whether it passed, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", test, f"--junit-xml={report}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        completed = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        case = ElementTree.parse(report).find(".//testcase")
    if case is None:
        raise LookupError(f"no test has the id {test}")
    passed = completed.returncode == 0 and case.find("skipped") is None
    return passed, float(case.get("time", "nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for fault, processes, promised, test in list_cases():
        passed, seconds = run_test(test)
        observed = "as promised" if passed else "failed"
        row = {"fault": fault, "processes": processes, "expected": promised}
        rows.append(row | {"observed": observed, "seconds": round(seconds, 1), "test": test})
        print(f"{fault}, {processes} processes: {observed}, {seconds:.1f} s", flush=True)
    result = {
        "command": "python benchmarks/gloo_faults.py --out FILE",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "backend": "gloo",
        "timeout_s": 3,
        "runs": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
