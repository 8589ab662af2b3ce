"""Measure the benefit of pretraining on real images: formulas, and words in photographs.

    python benchmarks/real_images.py LATEX ICDAR --out benchmarks/results/real_images_h200.json

LATEX and ICDAR are folders with `latex_ocr.jsonl` (rows with image and latex) and `icdar.jsonl`
(rows with image, question, answer and bbox_xyxy). The script trains all parts from finesight-tiny
and from random weights of the same architecture, with the same settings.
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

sys.path.append(str(Path(__file__).resolve().parents[1] / "pretraining"))

import torch
from random_model import init_random_model
from tiny_model import rescale_weights

from finesight.files.storage import write_folder
from finesight.model.weights_io import save_model
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions

FULL_TUNE = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
TRAIN_SETTINGS = {
    "batch_size": 32,
    "learning_rate": 5e-4,
    "betas": [0.9, 0.95],
    "weight_decay": 0.05,
    "warmup": 50,
    "pack_tokens": 16384,
    "save_every": 0.9,
}


@dataclass(frozen=True)
class RealImageTask:
    """A dataset with its import options, training and evaluation settings."""

    file: str
    import_args: tuple[str, ...]
    num_eval_rows: int
    num_steps: int
    eval_settings: dict[str, Any]
    image_settings: dict[str, int] | None = None


TASKS = {
    "formulas": RealImageTask(
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
        {"metric": "latex", "max_new_tokens": 256, "batch_size": 100},
        # Half of these images have at most 240 x 40 pixels: small print, upscaled.
        {"min_pixels": 30_000, "max_pixels": 200_704},
    ),
    "words in photographs": RealImageTask(
        "icdar.jsonl",
        tuple(
            word
            for pair in ("image=image", "question=question", "label=answer", "box=bbox_xyxy")
            for word in ("--map", pair)
        ),
        63,
        300,
        {"metric": "grounding", "max_new_tokens": 48, "batch_size": 63},
        {"longest_side": 616},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("latex", type=Path)
    parser.add_argument("icdar", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="fewer, to try it out")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        initial_models = {
            "pretrained": TINY_MODEL,
            "random": str(make_random_model(work / "random")),
        }
        for (name, task), rows in zip(TASKS.items(), (args.latex, args.icdar), strict=True):
            data = work / name.replace(" ", "-")
            run_finesight(
                "import",
                rows / task.file,
                data,
                *task.import_args,
                "--eval-last",
                task.num_eval_rows,
            )
            found[name] = {
                init_name: train_and_evaluate(
                    task, data, model, data / init_name, args.steps or task.num_steps
                )
                for init_name, model in initial_models.items()
            }
            print(name, json.dumps(found[name], indent=1), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {
        "command": f"python benchmarks/real_images.py LATEX ICDAR --out {args.out}"
        + (f" --steps {args.steps}" if args.steps else ""),
        "machine": get_device_name(device),
        "versions": library_versions(),
        "tasks": found,
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


def make_random_model(output_dir: Path) -> Path:
    """Create the architecture of finesight-tiny with its initial random weights."""
    folder = locate_model(TINY_MODEL)
    model = init_random_model(folder.config, 0, torch.float32, torch.device("cpu"))
    rescale_weights(model)
    with write_folder(output_dir) as written:
        save_model(model, folder, written, torch.float32)
    return output_dir


def train_and_evaluate(
    task: RealImageTask, data: Path, model: str, run_dir: Path, steps: int
) -> dict[str, Any]:
    """Train from `model` and return the validation metrics before and after."""
    recipe = data / "recipe.yaml"
    content = {
        "model": model,
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")},
        "tune": FULL_TUNE,
        "train": TRAIN_SETTINGS | {"steps": steps},
        "eval": task.eval_settings,
        "output_dir": str(run_dir),
    }
    if task.image_settings:
        content["image"] = task.image_settings
    # JSON is valid YAML.
    recipe.write_text(json.dumps(content))
    start = time.monotonic()
    run_finesight("train", recipe)
    result = json.loads((run_dir / "result.json").read_text())
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
        "before": result["before"],
        "after": result["after"],
    }


def run_finesight(*args: object) -> None:
    subprocess.run([sys.executable, "-m", "finesight", *map(str, args)], check=True)


if __name__ == "__main__":
    main()
