"""Compare the settings search with the default recipe and a random search of the same time.

    python benchmarks/settings_search.py --out FILE --seeds 3 --workers 16
        [--real grounding.jsonl] [--printed latex_ocr.jsonl] [--tasks TASK...] [--steps 30]

Three small tasks with finesight-tiny: boxes of shapes, captions of shapes and formulas. With
`--real`, the task `photos` as well: rows of the file have `image`, `question` and `bbox_xyxy` in
pixels. With `--printed`, the task `printed`: rows have `image` and `latex`. Each seed has its own
samples. The random search trains each trial completely, with random settings of the same ranges.
Scores are those of the chosen trials on test samples, which neither search has used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "pretraining"))

from shape_images import LABELS_FILE, write_shape_images
from synthetic_tasks.dataset_writer import write_task
from synthetic_tasks.tasks import SyntheticTask

from finesight import api
from finesight.evaluate.metric_difference import compare_cases
from finesight.evaluate.prediction_file import read_predictions
from finesight.evaluate.task_metrics import get_primary_metric
from finesight.launch import trial_search
from finesight.samples.sample import BoxPart, ImagePart, Message, Sample, TextPart, write_samples
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions

TASKS = {
    **{"boxes": "detection", "captions": "captions", "formulas": "latex"},
    **{"photos": "grounding", "printed": "latex"},
}
"""Metric of each task."""

METHODS = ("search", "random")


def write_real(file: Path, seed: int, counts: dict[str, int], folder: Path) -> dict[str, str]:
    """Write samples of different photos or printed formulas for each split."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: hashlib.sha256(f"{seed} {row['image']}".encode()).digest())
    files, start = {}, 0
    for split, count in counts.items():
        samples = []
        for number, row in enumerate(rows[start : start + count]):
            image = str((file.parent / row["image"]).resolve())
            text = row.get("question", "Write the formula as LaTeX.")
            question, answer = (ImagePart(image=image), TextPart(text=text)), list[Any]()
            if "latex" in row:
                answer.append(TextPart(text=row["latex"]))
            else:
                answer.append(BoxPart(label=None, xyxy=tuple(map(float, row["bbox_xyxy"]))))
            roles = (
                Message(role="user", content=question),
                Message(role="assistant", content=tuple(answer)),
            )
            samples.append(Sample(id=f"{split}-{number}", messages=roles))
        files[split] = str(folder / f"{split}.jsonl")
        write_samples(Path(files[split]), samples)
        start += count
        # Rows of one photo stay in one split.
        while start < len(rows) and rows[start]["image"] == rows[start - 1]["image"]:
            start += 1
    return files


def write_data(task: str, seed: int, count: int, folder: Path) -> Path:
    """Write the samples of a task to a folder, and return their file."""
    if task == "formulas":
        return write_task(folder, SyntheticTask("formula", "unseen"), count, seed, "formula")
    write_shape_images(folder, count, seed)
    samples = []
    for line in (folder / LABELS_FILE).read_text().splitlines():
        row = json.loads(line)
        prompt = "Mark the shapes." if task == "boxes" else "List the shapes."
        question = (ImagePart(image=row["image"]), TextPart(text=prompt))
        answer: Any = (TextPart(text=" | ".join(sorted(row["shapes"]))),)
        if task == "boxes":
            answer = tuple(
                BoxPart(label=name, xyxy=(x, y, x + width, y + height))
                for name, (x, y, width, height) in zip(row["shapes"], row["boxes"], strict=True)
            )
        roles = Message(role="user", content=question), Message(role="assistant", content=answer)
        samples.append(Sample(id=f"{seed}-{row['image']}", messages=roles))
    write_samples(folder / "data.jsonl", samples)
    return folder / "data.jsonl"


def run_search(job: tuple[str, int, str, Path, argparse.Namespace]) -> dict[str, Any]:
    """Search for the settings of a task with one method."""
    task, seed, method, work, args = job
    folder = work / f"{task}-{seed}-{method}"
    folder.mkdir(parents=True)
    if method == "random":
        trial_search.RUNGS, trial_search.NUM_RANDOM_TRIALS = (9,), sys.maxsize
        trial_search.LEARNING_RATE_FACTORS = ()
    counts = {"train": args.samples, "eval": args.test_samples}
    if task in ("photos", "printed"):
        file = args.real if task == "photos" else args.printed
        files = write_real(file, seed, counts, folder)
    else:
        files = {
            name: str(write_data(task, 1000 * seed + index, count, folder / name))
            for index, (name, count) in enumerate(counts.items())
        }
    recipe = {
        "model": "finesight-tiny",
        "data": files,
        "train": {
            **{"steps": args.steps, "batch_size": 8, "seed": seed},
            **{"device": args.device, "num_workers": 0},
        },
        "eval": {"metric": TASKS[task], "max_new_tokens": 256 if task == "printed" else 64},
        "output_dir": str(folder / "run"),
        "search": {"train.steps": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = api.search(folder / "recipe.yaml", out=folder / "search", budget=args.budget)
    assert record.choice is not None, "an incomplete search"
    settings = record.trials[record.choice].settings
    figures = {"num_trials": len(record.trials), "seconds": round(record.seconds)}
    found = {"task": task, "seed": seed, "method": method, "choice": record.choice, **figures}
    return found | {"settings": settings, "test": record.test, "reasons": record.reasons}


def compare(task: str, work: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Compare the answers of the chosen trials to the test samples of all seeds."""
    chosen: dict[str, list[Any]] = {"default": [], "search": [], "random": []}
    for row in rows:
        folder = work / f"{task}-{row['seed']}-{row['method']}" / "search"
        for name, number in {row["method"]: row["choice"], "default": 0}.items():
            if name != "default" or row["method"] == "search":
                cases = read_predictions(folder / f"test-{number:03}.jsonl")
                chosen[name] += [one.case for one in cases]
    texts = {}
    for before, after in (("default", "search"), ("default", "random"), ("random", "search")):
        pairs = compare_cases(TASKS[task], chosen[before], chosen[after])
        name = get_primary_metric(TASKS[task], {one.name: one.after for one in pairs})
        difference = next(one for one in pairs if one.name == name)
        texts[f"{before} and {after}"] = difference.describe()
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--printed", type=Path, help="JSONL file of printed formulas")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS)[:3], choices=list(TASKS)[:3])
    parser.add_argument("--real", type=Path, help="JSONL file of boxes in photos")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--test-samples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--budget", default="180s")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    tasks = [*args.tasks, *(["photos"] if args.real else [])]
    tasks += ["printed"] if args.printed else []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jobs = [
            (task, seed, method, work, args)
            for task in tasks
            for seed in range(args.seeds)
            for method in METHODS
        ]
        with ProcessPoolExecutor(args.workers, get_context("spawn"), max_tasks_per_child=1) as pool:
            rows = list(pool.map(run_search, jobs))
        differences = {
            task: compare(task, work, [row for row in rows if row["task"] == task])
            for task in tasks
        }
    for row in rows:
        print(*(row[name] for name in ("task", "seed", "method", "num_trials", "test")), sep="  ")
    for task, texts in differences.items():
        for pair, text in texts.items():
            print(f"{task}: {pair}: {text}")
    words = " ".join(sys.argv[1:])
    figures = {
        "command": f"python benchmarks/settings_search.py {words}",
        "machine": get_device_name(torch.device(args.device)),
        "versions": library_versions(),
        "rows": rows,
        "differences": differences,
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
