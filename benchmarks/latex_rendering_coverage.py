"""Measure coverage and speed of ziamath for the metric `latex`.

    python benchmarks/latex_rendering_coverage.py FORMULAS.jsonl

Each line of FORMULAS.jsonl has a formula under `latex`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib import metadata
from pathlib import Path

from finesight.evaluate.metrics.latex.score import MAX_RENDER_PROCESSES, render_digests


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formulas", type=Path)
    lines = parser.parse_args().formulas.read_text(encoding="utf-8").splitlines()
    formulas = [json.loads(line)["latex"] for line in lines]
    start, before = time.perf_counter(), os.times()
    digests = render_digests(formulas)
    after = os.times()
    # CPU time of the child processes, independent of other programs.
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    result = {
        "formulas": len(digests),
        "drawn": sum(digest is not None for digest in digests.values()),
        "different_drawings": len(set(digests.values())),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_ms_a_formula": round(1000 * spent / len(digests), 1),
        "processes": min(MAX_RENDER_PROCESSES, os.cpu_count() or 1),
        "versions": {name: metadata.version(name) for name in ("ziamath", "latex2mathml")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
