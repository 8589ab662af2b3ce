"""Does the path learn and speak? A small random model learns real formulas by heart and says them.

    python benchmarks/memorise_latex.py --data DIR --work DIR --out FILE [--samples 256]

Makes a small random Qwen2-VL, imports the first formulas of latex_ocr.jsonl, trains all parts to
near-zero loss, asks `finesight predict` for each picture and counts the answers that are the label
character by character, stop token included.
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
  batch: 32
  pack_tokens: 32768
  learning_rate: 1.0e-3
  warmup: 0.05
  device: {device}
output: {run}
"""


def call(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "finesight", *words], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"finesight {' '.join(words)}: {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def gold(line: str) -> str:
    """The text of the last turn of a sample."""
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
    import torch

    from finesight.model.tiny import make_tiny

    work, start = options.work, time.time()
    work.mkdir(parents=True)
    make_tiny(work / "model", options.family, seed=0, size="small")
    source = str(options.data / "latex_ocr.jsonl")
    fields = ("--map", "image=image", "--map", "answer=latex", "--prompt", "Read the formula.")
    call("data", "import", source, str(work / "data"), *fields, "--limit", str(options.samples))
    data, run = work / "data" / "data.jsonl", work / "run"
    recipe = work / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=work / "model", data=data, run=run, steps=options.steps, device=options.device
        )
    )
    call("train", str(recipe))
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained_s = time.time() - start
    said = call("predict", str(run), "--data", str(data), "--json", "--max-new-tokens", "1024")
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    labels = [gold(line) for line in data.read_text().splitlines()]
    exact = sum(a["answer"] == label for a, label in zip(answers, labels, strict=True))
    stopped = sum(a["raw"].endswith("<|im_end|>") for a in answers)
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
