"""Run the smoke test on one device and print a JSON line for each stage.

Usage: `python -m finesight.doctor.smoke_test_stages cpu|cuda FOLDER`. `finesight doctor` runs it in
a child process, so that a crash does not stop `finesight doctor`.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

STEPS, BATCH_SIZE, NUM_TICKETS = 6, 2, 12
MAX_NEW_TOKENS = 24
"""Maximum number of tokens that the smoke test generates."""

RECIPE_TEMPLATE = """\
model: finesight-tiny
data: {{train: {train}}}
tune: {{vision: lora, merger: lora, language: lora, lora: {{rank: 8, alpha: 16, dropout: 0.0}}}}
train:
  steps: {steps}
  batch_size: {batch}
  learning_rate: 2.0e-3
  device: {device}
  num_workers: 0
  vision_cache: never
output_dir: {run}
"""


def main() -> None:
    """Run the stages of the smoke test in order. The first failure stops the process."""
    device: Literal["cpu", "cuda"] = "cuda" if sys.argv[1] == "cuda" else "cpu"
    folder = Path(sys.argv[2])
    with _time_stage("load"):
        from finesight.train.trainer import train  # noqa: F401 (times the import)
    with _time_stage("data") as details:
        data_file = _create_samples(folder)
        details["what"] = f"{NUM_TICKETS} images created and imported"
    with _time_stage("train") as details:
        details["what"] = _train_model(device, folder, data_file)
    with _time_stage("generate") as details:
        details["what"] = _generate_answer(device, folder)


@contextmanager
def _time_stage(name: str) -> Iterator[dict[str, str]]:
    """Time a stage and print a JSON line with its duration if it passes.

    The caller adds the result of the stage to the yielded dictionary.
    """
    start, details = time.perf_counter(), {"what": ""}
    yield details
    stage_record = {"stage": name, "seconds": round(time.perf_counter() - start, 2), **details}
    print(json.dumps(stage_record), flush=True)


def _create_samples(folder: Path) -> Path:
    """Create images of train tickets, import them, and return the data file."""
    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets

    write_tickets(folder / "tickets", NUM_TICKETS, 0)
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    options = ImportOptions(columns=columns, prompt="Read the ticket.")
    import_dataset(folder / "tickets" / TABLE_FILE, folder / "data", options)
    return folder / "data" / "data.jsonl"


def _train_model(device: str, folder: Path, data_file: Path) -> str:
    """Train for a few steps, check that the loss falls, and describe the result."""
    from rich.console import Console

    from finesight.recipe import load_recipe
    from finesight.run_files import METRICS_FILE
    from finesight.train.trainer import train

    recipe_file = folder / "recipe.yaml"
    values = {"train": json.dumps(str(data_file)), "run": json.dumps(str(folder / "run"))}
    recipe_file.write_text(
        RECIPE_TEMPLATE.format(**values, steps=STEPS, batch=BATCH_SIZE, device=device)
    )
    train(load_recipe(recipe_file), console=Console(file=io.StringIO()))
    lines = (folder / "run" / METRICS_FILE).read_text().splitlines()
    # The first fp16 steps may overflow and have no loss.
    losses = [line["loss"] for line in map(json.loads, lines) if line.get("loss") is not None]
    if len(losses) < 2 or not math.isfinite(sum(losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss did not fall: {losses}")
    return f"{STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, saved"


def _generate_answer(device: Literal["cpu", "cuda"], folder: Path) -> str:
    """Load the trained adapter, generate a completion for one image, and describe the result."""
    from finesight.infer.model_loader import load_inference_model
    from finesight.infer.prediction import build_questions, predict

    inference_model = load_inference_model(str(folder / "run"), device)
    image_path = next((folder / "tickets").rglob("*.png"))
    samples = build_questions([image_path], "Read the ticket.")
    (prediction,) = predict(
        inference_model.model,
        inference_model.renderer,
        samples,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=1,
    )
    if not prediction.num_tokens:
        raise RuntimeError("the trained model generated no tokens")
    return f"adapter loaded, {prediction.num_tokens} tokens generated"


if __name__ == "__main__":
    main()
