"""Two runs on real pictures with their reports: formulas, and boxes for questions.

    python benchmarks/report_runs.py --data DIR --work DIR --out FILE [--steps 3000]

--data holds latex_ocr/ and grounding/, a JSONL table with pictures each. A small model with random
weights learns each task with all its parts, nine tenths of the samples to train on, measured before
the first step, at each quarter and after the last. The figures are no feat, the model has 5 million
parameters and knows nothing; they make reports of real data to look at.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = """\
model: {model}
data:
  train: {data}/train.jsonl
  eval: {data}/eval.jsonl
picture: {picture}
tune: {{vision: full, merger: full, language: full, embeddings: full}}
train: {{steps: {steps}, batch: 32, pack_tokens: 32768, learning_rate: 1.0e-3, keep: 1}}
eval: {{metric: {name}, every: 0.25, max_new_tokens: 200, batch: 64}}
output: {run}
"""


@dataclass(frozen=True)
class Task:
    """A metric, and the data and pictures that go with it."""

    name: str
    family: str
    table: str
    fields: tuple[str, ...]
    picture: str


TASKS = (
    Task(
        "latex",
        "qwen2_vl",
        "latex_ocr/latex_ocr.jsonl",
        ("image=image", "answer=latex"),
        "{height: 112, width: 504}",
    ),
    Task(
        "grounding",
        "qwen2_5_vl",
        "grounding/grounding.jsonl",
        ("image=image", "question=question", "box=bbox_xyxy", "label=answer"),
        "{longest_side: 336}",
    ),
)


def call(*words: str) -> None:
    command = [sys.executable, "-m", "finesight", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"finesight {' '.join(words)}: {done.returncode}\n{done.stderr[-4000:]}")


def run_task(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    from finesight.model.tiny import make_tiny

    work, start = options.work / task.name, time.time()
    work.mkdir(parents=True)
    make_tiny(work / "model", task.family, seed=0, size="small")
    fields = [word for field in task.fields for word in ("--map", field)]
    prompt = () if task.name == "grounding" else ("--prompt", "Read the formula.")
    source = str(options.data / task.table)
    call("data", "import", source, str(work / "data"), *fields, *prompt, "--split", "0.9")
    recipe, run = work / "recipe.yaml", work / "run"
    recipe.write_text(
        RECIPE.format(
            **{"model": work / "model", "data": work / "data", "run": run, "name": task.name},
            **{"picture": task.picture, "steps": options.steps},
        )
    )
    call("train", str(recipe))
    result = json.loads((run / "result.json").read_text())
    page = run / "report.html"
    return {
        "task": task.name,
        "differences": result["differences"],
        "seconds": round(time.time() - start, 1),
        "page_mb": round(page.stat().st_size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    import torch

    with ThreadPoolExecutor() as both:
        results = list(both.map(lambda task: run_task(task, options), TASKS))
    report = {
        "command": " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "results": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
