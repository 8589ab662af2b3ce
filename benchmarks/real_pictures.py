"""What pretraining is worth on real pictures: formulas and words of photographs, learned from
finesight-tiny and, beside it, from random weights of the same geometry.

    python benchmarks/real_pictures.py LATEX ICDAR --out benchmarks/results/real_pictures_h200.json

LATEX and ICDAR are folders with `latex_ocr.jsonl` (rows with image and latex) and `icdar.jsonl`
(rows with image, question, answer and bbox_xyxy). All parts are trained, with the same settings
from both beginnings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finesight.hub import TINY, locate
from finesight.model.tiny import spread
from finesight.model.weights import random_model, save_model
from finesight.storage import write_folder
from finesight.train.prepare import versions
from finesight.train.report import device_name

FULL = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
TRAIN = {
    "batch": 32,
    "learning_rate": 5e-4,
    "betas": [0.9, 0.95],
    "weight_decay": 0.05,
    "warmup": 50,
    "pack_tokens": 16384,
    "save_every": 0.9,
}


@dataclass(frozen=True)
class Task:
    """A file of rows, how it is brought in, and how it is learned and measured."""

    file: str
    mapping: tuple[str, ...]
    held_out: int
    steps: int
    evaluation: dict[str, Any]
    picture: dict[str, int] | None = None


TASKS = {
    "formulas": Task(
        "latex_ocr.jsonl",
        (
            "--map",
            "image=image",
            "--map",
            "answer=latex",
            "--prompt",
            "Write the formula in LaTeX.",
        ),
        100,
        900,
        {"metric": "latex", "max_new_tokens": 256, "batch": 100},
        # Half of these pictures have 240 x 40 pixels at most: small print, enlarged.
        {"min_pixels": 30_000, "max_pixels": 200_704},
    ),
    "words in photographs": Task(
        "icdar.jsonl",
        tuple(
            word
            for pair in ("image=image", "question=question", "label=answer", "box=bbox_xyxy")
            for word in ("--map", pair)
        ),
        63,
        300,
        {"metric": "grounding", "max_new_tokens": 48, "batch": 63},
        {"longest_side": 616},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("latex", type=Path)
    parser.add_argument("icdar", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="fewer, to try it out")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        beginnings = {"pretrained": TINY, "random": str(random_weights(work / "random"))}
        for (name, task), rows in zip(TASKS.items(), (asked.latex, asked.icdar), strict=True):
            data = work / name.replace(" ", "-")
            finesight(
                "data",
                "import",
                rows / task.file,
                data,
                *task.mapping,
                "--eval-last",
                task.held_out,
            )
            found[name] = {
                beginning: learned(task, data, model, data / beginning, asked.steps or task.steps)
                for beginning, model in beginnings.items()
            }
            print(name, json.dumps(found[name], indent=1), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {
        "command": f"python benchmarks/real_pictures.py LATEX ICDAR --out {asked.out}"
        + (f" --steps {asked.steps}" if asked.steps else ""),
        "machine": device_name(device),
        "versions": versions(),
        "tasks": found,
    }
    asked.out.write_text(json.dumps(figures, indent=1) + "\n")


def random_weights(target: Path) -> Path:
    """finesight-tiny before it learned anything, its linear layers as wide as it began with."""
    folder = locate(TINY)
    model = random_model(folder.config, 0, torch.float32, torch.device("cpu"))
    spread(model)
    with write_folder(target) as written:
        save_model(model, folder, written, torch.float32)
    return target


def learned(task: Task, data: Path, model: str, run: Path, steps: int) -> dict[str, Any]:
    """Held-out figures of a run from `model`, before and after."""
    recipe = data / "recipe.yaml"
    content = {
        "model": model,
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")},
        "tune": FULL,
        "train": TRAIN | {"steps": steps},
        "eval": task.evaluation,
        "output": str(run),
    }
    if task.picture:
        content["picture"] = task.picture
    # JSON is YAML.
    recipe.write_text(json.dumps(content))
    start = time.monotonic()
    finesight("train", recipe)
    result = json.loads((run / "result.json").read_text())
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
        "before": result["before"],
        "after": result["after"],
    }


def finesight(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "finesight", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
