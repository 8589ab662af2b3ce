"""Train finesight-small for a given time, from finesight-tiny and generated documents.

    python pretraining/build_small_model.py OUT --labels LABELS.jsonl [--seconds 180]

The model has twice the width of finesight-tiny and 61.7 M parameters (`grow_model`). Most of its
documents are formulas recombined from LABELS, rows with a formula under `latex`. Others are words,
receipts and scenes of the mixture of finesight-tiny. A short first stage measures the step time.
The second one uses the rest of the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from random_model import grow_model
from synthetic_tasks.formula_recombination import FormulaRecombiner, fit_formula_image
from synthetic_tasks.synthetic_sample import SyntheticSample
from synthetic_tasks.tasks import MAIN_MIXTURE, generate_mixture_sample

from finesight.files.storage import write_folder
from finesight.model_folder import TINY_MODEL, locate_model
from finesight.samples.sample import write_samples

PRETRAINING_DIR = Path(__file__).parent
FORMULA_PROMPT = "Write the formula in LaTeX."
OTHER_TASKS = {
    name: share for name, share in MAIN_MIXTURE.items() if name not in ("formula", "chinese")
}
SAMPLES_PER_PART, FORMULA_SHARE, SEED = 500, 0.85, 1
PARTS_PER_SECOND, FIRST_PARTS = 1.2, 20
"""Parts per second of training, so that a sample is seen about four times; parts before it."""

FIRST_STEPS, START_S, MIN_STEPS = 150, 9.0, 20
"""Steps of the first stage; seconds of a stage besides its steps; minimum steps of the second."""

SETTINGS = (
    "eval=null",
    "data.eval=[]",
    "train.batch_size=256",
    "train.pack_tokens=65536",
    "train.learning_rate={default: 2.0e-3, embeddings: 5.0e-4}",
    "train.save_every=0.99",
)
_recombiners: list[FormulaRecombiner] = []


def build_small_model(
    output_dir: Path, labels: Sequence[str], seconds: float, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Train the model in `output_dir`/model, and return the facts of its training.

    `settings` are overrides of the recipe.
    """
    deadline = time.monotonic() + seconds
    first_steps = FIRST_STEPS if seconds > 60 else MIN_STEPS
    grown = grow_model(locate_model(TINY_MODEL), output_dir / "grown")
    pool = ProcessPoolExecutor(
        max(1, (os.cpu_count() or 2) - 1), initializer=_init_worker, initargs=(tuple(labels),)
    )
    num_parts = max(1, int(PARTS_PER_SECOND * seconds))
    parts = [pool.submit(_write_part, output_dir / f"part-{i:04}", i) for i in range(num_parts)]
    while len(_list_written(parts)) < min(FIRST_PARTS, num_parts):
        time.sleep(0.1)
    first = _train(grown, output_dir / "first", _list_written(parts), first_steps, 100, settings)
    step_s = statistics.quantiles(first, n=4)[0]
    while len(_list_written(parts)) < num_parts and time.monotonic() < deadline - 0.72 * seconds:
        time.sleep(0.1)
    data = _list_written(parts)
    pool.shutdown(wait=False, cancel_futures=True)
    steps = max(MIN_STEPS, int((deadline - time.monotonic() - START_S) / step_s))
    start = output_dir / "first" / "model"
    last = _train(
        start, output_dir / "last", data, steps, 20, ("train.lr_schedule=linear", *settings)
    )
    (output_dir / "last" / "model").rename(output_dir / "model")
    return {
        "images": len(data) * SAMPLES_PER_PART,
        "formula_share": FORMULA_SHARE,
        "steps": [len(first), len(last)],
        "step_s": [round(statistics.median(times), 4) for times in (first, last)],
        "seconds": round(seconds - (deadline - time.monotonic()), 1),
        "settings": list(SETTINGS),
    }


def _init_worker(labels: Sequence[str]) -> None:
    # Training has priority.
    os.nice(10)
    _recombiners.append(FormulaRecombiner(labels))
    gc.freeze()
    gc.disable()


def _write_part(output_dir: Path, number: int) -> Path:
    """Generate the images of a part and return its data file."""
    rng = random.Random(f"part {SEED} {number}")
    samples = []
    with write_folder(output_dir) as folder:
        for index in range(SAMPLES_PER_PART):
            if rng.random() < FORMULA_SHARE:
                latex, page = _recombiners[0].sample(rng)
                page = fit_formula_image(page)
                drawn = SyntheticSample(page, (FORMULA_PROMPT,), (latex,), "formula")
            else:
                position = number * SAMPLES_PER_PART + index
                drawn = generate_mixture_sample(OTHER_TASKS, SEED, position)
            image = f"{index:06}.bmp"
            drawn.image.save(folder / image)
            samples.append(drawn.to_sample(f"{number}-{index}", image))
        write_samples(folder / "data.jsonl", samples)
    return output_dir / "data.jsonl"


def _list_written(parts: Sequence[Future[Path]]) -> list[Path]:
    return [part.result() for part in parts if part.done() and not part.cancelled()]


def _train(
    model: Path, run: Path, data: Sequence[Path], steps: int, warmup: int, settings: Sequence[str]
) -> list[float]:
    """Train one stage, and return the seconds of its steps."""
    words = [
        f"model={model}",
        f"data.train={json.dumps(list(map(str, data)))}",
        f"train.steps={steps}",
        f"train.warmup={min(warmup, steps // 2)}",
        f"output_dir={run}",
    ]
    command = [sys.executable, "-m", "finesight", "train", str(PRETRAINING_DIR / "recipe.yaml")]
    subprocess.run(
        [*command, *SETTINGS, "train.lr_schedule=constant", *settings, *words], check=True
    )
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step_s"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", nargs="*", metavar="group.setting=value")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    args = parser.parse_intermixed_args()
    lines = args.labels.read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["latex"] for line in lines]
    print(json.dumps(build_small_model(args.out, labels, args.seconds, args.settings), indent=1))


if __name__ == "__main__":
    main()
