"""Train two runs on real images and write their reports: formulas, and box grounding.

    python benchmarks/report_examples.py --data DIR --work DIR --out FILE [--steps 3000]

--data contains latex_ocr/ and grounding/, each with a JSONL table and images. A small random model
with 5 million parameters trains all parts on nine tenths of the samples, with an evaluation before
the first step, after each quarter and at the end. The metrics are low; the purpose is example
reports of real data.
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
image: {image}
tune: {{vision: full, merger: full, language: full, embeddings: full}}
train:
  steps: {steps}
  batch_size: 32
  pack_tokens: 32768
  learning_rate: 1.0e-3
  keep_checkpoints: 1
eval: {{metric: {name}, every: 0.25, max_new_tokens: 200, batch_size: 64}}
output_dir: {run}
"""


@dataclass(frozen=True)
class ReportTask:
    """A metric with its dataset and image settings."""

    name: str
    family: str
    dataset: str
    column_mapping: tuple[str, ...]
    image_settings: str


REPORT_TASKS = (
    ReportTask(
        "latex",
        "qwen2_vl",
        "latex_ocr/latex_ocr.jsonl",
        ("image=image", "answer=latex"),
        "{height: 112, width: 504}",
    ),
    ReportTask(
        "grounding",
        "qwen2_5_vl",
        "grounding/grounding.jsonl",
        ("image=image", "question=question", "box=bbox_xyxy", "label=answer"),
        "{longest_side: 336}",
    ),
)


def run_finesight(*args: str) -> None:
    command = [sys.executable, "-m", "finesight", *args]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(
            f"finesight {' '.join(args)}: {result.returncode}\n{result.stderr[-4000:]}"
        )


def run_task(task: ReportTask, options: argparse.Namespace) -> dict[str, Any]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))
    from tiny_model import create_tiny_model

    work, start = options.work / task.name, time.time()
    work.mkdir(parents=True)
    create_tiny_model(work / "model", task.family, seed=0, preset="small")
    fields = [word for field in task.column_mapping for word in ("--map", field)]
    prompt = () if task.name == "grounding" else ("--prompt", "Read the formula.")
    source = str(options.data / task.dataset)
    run_finesight("import", source, str(work / "data"), *fields, *prompt, "--train-fraction", "0.9")
    recipe, run = work / "recipe.yaml", work / "run"
    recipe.write_text(
        RECIPE.format(
            **{"model": work / "model", "data": work / "data", "run": run, "name": task.name},
            **{"image": task.image_settings, "steps": options.steps},
        )
    )
    run_finesight("train", str(recipe))
    result = json.loads((run / "result.json").read_text())
    page = run / "report.html"
    return {
        "task": task.name,
        "metric_differences": result["metric_differences"],
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
        results = list(both.map(lambda task: run_task(task, options), REPORT_TASKS))
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
