"""The whole path with the package's small model on one device, a line of JSON for each stage.

`python -m finesight.doctor.smoke_child cpu|cuda FOLDER`, in a process of its own: whatever fails
there, `doctor` goes on.
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

STEPS, BATCH, TICKETS = 6, 2, 12
LONGEST = 24
"""Tokens of the answer."""

RECIPE = """\
model: finesight-tiny
data: {{train: {train}}}
tune: {{vision: lora, merger: lora, language: lora, lora: {{rank: 8, alpha: 16, dropout: 0.0}}}}
train:
  steps: {steps}
  batch: {batch}
  learning_rate: 2.0e-3
  device: {device}
  workers: 0
  cache: never
output: {run}
"""


def main() -> None:
    """Take the stages one after the other; the first that fails ends the process."""
    device: Literal["cpu", "cuda"] = "cuda" if sys.argv[1] == "cuda" else "cpu"
    folder = Path(sys.argv[2])
    with _stage("load"):
        from finesight.train.loop import train  # noqa: F401 (what takes time is the import)
    with _stage("data") as said:
        table = _drawn(folder)
        said["what"] = f"{TICKETS} pictures drawn and imported"
    with _stage("train") as said:
        said["what"] = _trained(device, folder, table)
    with _stage("answer") as said:
        said["what"] = _answered(device, folder)


@contextmanager
def _stage(name: str) -> Iterator[dict[str, str]]:
    """Print its seconds, and what the block puts under `what`, when it ends well."""
    start, said = time.perf_counter(), {"what": ""}
    yield said
    record = {"stage": name, "seconds": round(time.perf_counter() - start, 2), **said}
    print(json.dumps(record), flush=True)


def _drawn(folder: Path) -> Path:
    """Samples of a few train tickets."""
    from finesight.data.importing import import_file
    from finesight.data.opening import Request
    from finesight.synth.tickets import FIELDS, TABLE, draw_tickets

    draw_tickets(folder / "tickets", TICKETS, 0)
    columns = {"image": "picture", "fields": ",".join(FIELDS)}
    request = Request(columns=columns, prompt="Read the ticket.")
    import_file(folder / "tickets" / TABLE, folder / "data", request)
    return folder / "data" / "data.jsonl"


def _trained(device: str, folder: Path, table: Path) -> str:
    """A run of a few steps, whose loss has to fall."""
    from rich.console import Console

    from finesight.recipe import load_recipe
    from finesight.run_folder import METRICS
    from finesight.train.loop import train

    recipe = folder / "recipe.yaml"
    names = {"train": json.dumps(str(table)), "run": json.dumps(str(folder / "run"))}
    recipe.write_text(RECIPE.format(**names, steps=STEPS, batch=BATCH, device=device))
    train(load_recipe(recipe), console=Console(file=io.StringIO()))
    lines = (folder / "run" / METRICS).read_text().splitlines()
    # In fp16 the first steps may overflow and have none.
    losses = [line["loss"] for line in map(json.loads, lines) if line.get("loss") is not None]
    if len(losses) < 2 or not math.isfinite(sum(losses)) or losses[-1] >= losses[0]:
        raise RuntimeError(f"the loss does not fall: {losses}")
    return f"{STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, saved"


def _answered(device: Literal["cpu", "cuda"], folder: Path) -> str:
    """The saved adapter, read again, says something about a picture."""
    from finesight.infer.load import load_answerer
    from finesight.infer.predict import predict, questions

    loaded = load_answerer(str(folder / "run"), device)
    picture = next((folder / "tickets").rglob("*.png"))
    asked = questions([picture], "Read the ticket.")
    (answer,) = predict(loaded.model, loaded.renderer, asked, max_new_tokens=LONGEST, batch=1)
    if not answer.tokens:
        raise RuntimeError("the tuned model says nothing at all")
    return f"adapter read again, {answer.tokens} tokens said"


if __name__ == "__main__":
    main()
