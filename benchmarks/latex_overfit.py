"""Check training and inference end to end by overfitting a small random model.

    python benchmarks/latex_overfit.py --data DIR --work DIR --out FILE [--samples 256]

Creates a small random Qwen2-VL, imports the first formulas of latex_ocr.jsonl, trains all parts to
near-zero loss, runs `finesight predict` on each image and counts answers that equal the label,
including the stop token.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

RECIPE = """\
model: {model}
data:
  train: {data}
tune: {{vision: full, merger: full, language: full, embeddings: full}}
train:
  steps: {steps}
  batch_size: 32
  pack_tokens: 32768
  learning_rate: 1.0e-3
  warmup: 0.05
  device: {device}
output_dir: {run}
"""


def run_finesight(*args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "finesight", *args], capture_output=True, text=True
    )
    if result.returncode != 0:
        raise SystemExit(
            f"finesight {' '.join(args)}: {result.returncode}\n{result.stderr[-4000:]}"
        )
    return result.stdout


def reference_answer(line: str) -> str:
    """Return the text of the last message of a sample."""
    return "".join(part["text"] for part in json.loads(line)["messages"][-1]["content"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with latex_ocr.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--family", default="qwen2_vl")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))
    import torch
    from tiny_model import create_tiny_model

    work, start = options.work, time.time()
    work.mkdir(parents=True)
    create_tiny_model(work / "model", options.family, seed=0, preset="small")
    source = str(options.data / "latex_ocr.jsonl")
    fields = ("--map", "image=image", "--map", "answer=latex", "--prompt", "Read the formula.")
    run_finesight("import", source, str(work / "data"), *fields, "--limit", str(options.samples))
    data, run = work / "data" / "data.jsonl", work / "run"
    recipe = work / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=work / "model", data=data, run=run, steps=options.steps, device=options.device
        )
    )
    run_finesight("train", str(recipe))
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained_s = time.time() - start
    output = run_finesight(
        "predict", str(run), "--data", str(data), "--json", "--max-new-tokens", "1024"
    )
    answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    labels = [reference_answer(line) for line in data.read_text().splitlines()]
    exact = sum(a["answer"] == label for a, label in zip(answers, labels, strict=True))
    stopped = sum(a["raw_text"].endswith("<|im_end|>") for a in answers)
    report = {
        "command": " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "samples": len(labels),
        "last_loss": [record["loss"] for record in losses if "loss" in record][-1],
        "exact": exact,
        "stopped_by_end_token": stopped,
        "seconds_to_trained": round(trained_s, 1),
        "seconds_in_all": round(time.time() - start, 1),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
