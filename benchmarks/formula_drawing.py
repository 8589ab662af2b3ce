"""How many formulas ziamath draws for the metric `latex`, and how fast. Prints one JSON object.

    python benchmarks/formula_drawing.py FORMULAS.jsonl

FORMULAS.jsonl has a formula under `latex` in each line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib import metadata
from pathlib import Path

from finesight.evaluate.drawing import CHILDREN, drawings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formulas", type=Path)
    lines = parser.parse_args().formulas.read_text(encoding="utf-8").splitlines()
    formulas = [json.loads(line)["latex"] for line in lines]
    start, before = time.perf_counter(), os.times()
    looks = drawings(formulas)
    after = os.times()
    # The processor's time is that of the children, which other programs do not swell.
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    result = {
        "formulas": len(looks),
        "drawn": sum(digest is not None for digest in looks.values()),
        "different_drawings": len(set(looks.values())),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_ms_a_formula": round(1000 * spent / len(looks), 1),
        "processes": min(CHILDREN, os.cpu_count() or 1),
        "versions": {name: metadata.version(name) for name in ("ziamath", "latex2mathml")},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
