"""`finesight quickstart`: the complete workflow, in minutes on a CPU and without a network.

It generates images of train tickets, imports and checks their table, fine-tunes the bundled model
with LoRA to read them as JSON, and evaluates it on validation tickets. Each stage runs the code of
a command, and the commands are printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finesight.errors import Step, TrainingInterrupted, UserError, shorten
from finesight.operations.dataset import check_data, import_data
from finesight.operations.operation import Outcome, Parameter, StrPath, format_command
from finesight.operations.training import train

if TYPE_CHECKING:
    from finesight.train.finalize import RunResult

PROMPT = "Read the ticket."
NUM_SHOWN_PREDICTIONS = 4

_RECIPE_TEMPLATE = """\
# Made by `finesight quickstart`: {num_images} train tickets.
# The last {num_eval_rows} are for validation. A small model is fine-tuned to read them as JSON.
model: {model}
data:
  train: {train}
  eval: {eval}
tune:
  vision: lora
  merger: lora
  language: lora
  lora: {{rank: 32, alpha: 32, dropout: 0.0}}
train:
  steps: {steps}
  batch_size: 16
  learning_rate: 2.0e-3
  seed: {seed}
  precision: {precision}
  device: cpu
eval: {{metric: json, every: 0, max_new_tokens: 112, batch_size: 100}}
output_dir: {run}
"""


@dataclass(frozen=True)
class QuickstartSettings:
    """Dataset size, training steps, model and random seed of the quickstart."""

    num_images: int = 2500
    num_eval_rows: int = 100
    steps: int = 200
    model: str = "finesight-tiny"
    seed: int = 0


@dataclass(frozen=True)
class TicketPrediction:
    """A validation ticket, its reference, and the predictions before and after training."""

    image: Path
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class QuickstartResult:
    """Result of the quickstart: training result, example predictions, and total time in seconds."""

    result: RunResult
    predictions: tuple[TicketPrediction, ...]
    total_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        predictions = [{**asdict(a), "image": str(a.image)} for a in self.predictions]
        return {
            "result": self.result.as_json(),
            "predictions": predictions,
            "total_s": round(self.total_s, 1),
        }


def quickstart(
    out: Annotated[StrPath, Parameter(metavar="FOLDER")] = Path("quickstart"),
    settings: QuickstartSettings | None = None,
) -> Outcome[QuickstartResult]:
    """Generate train tickets, import and check them, and fine-tune finesight-tiny on them.

    Needs no network and no GPU, and takes about two minutes on two CPU cores. Run it again to
    resume after an interruption.

    Example: finesight quickstart --out /tmp/first

    Args:
        out: Folder for all files.
    """
    from finesight.progress import ProgressConsole
    from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets

    out, settings, start_time = Path(out), settings or QuickstartSettings(), time.monotonic()
    recipe, log = write_recipe(out, settings), ProgressConsole().log
    table, data = out / "tickets" / TABLE_FILE, out / "data"
    log(f"1. Generate {settings.num_images} images of train tickets and their label file {table}")
    if not table.parent.exists():
        write_tickets(table.parent, settings.num_images, settings.seed)
    with table.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(3), strict=False):
            log(f"      {line.rstrip()}")
    log(f"2. Import them, the last {settings.num_eval_rows} for validation")
    columns = {"image": "image", "fields": ",".join(TICKET_FIELDS)}
    arguments = {"columns": columns, "prompt": PROMPT, "eval_last": settings.num_eval_rows}
    log(_format_step("import", source=table, out=data, **arguments))
    if not data.exists():
        import_data(table, data, columns=columns, prompt=PROMPT, eval_last=settings.num_eval_rows)
    log("3. Check the data")
    log(_format_step("check", sources=[recipe]))
    for line in check_data([recipe]).lines:
        log(f"   {line}")
    log(f"4. Train {settings.model}, with an evaluation before and after")
    log(_format_step("train", recipe=recipe))
    try:
        run_result = train(recipe, resume=True).value
    except TrainingInterrupted as interruption:
        raise TrainingInterrupted(
            f"{interruption} (the same quickstart does, too)"
        ) from interruption
    run = out / "run"
    predictions = _read_predictions(run)
    result = QuickstartResult(run_result, predictions, time.monotonic() - start_time)
    question = {"images": [predictions[0].image], "prompt": PROMPT}
    next_steps = [
        Step("show", {"recipe": recipe}),
        Step("predict", {"run_or_model": run, **question}),
        Step("eval", {"run_or_model": run}),
        Step("chat", {"run_or_model": run}),
        Step("merge", {"source": run, "out": out / "merged"}),
        Step("init", {}),
    ]
    return Outcome(result, [*_format_result(run, result)], result.as_json(), next_steps)


def _format_step(operation: str, **arguments: object) -> str:
    return f"   $ {format_command(Step(operation, arguments))}"


def write_recipe(out: Path, plan: QuickstartSettings) -> Path:
    """Write the recipe of the quickstart into the folder `out`, unless it exists.

    Raises UserError if `out` contains other files.
    """
    from finesight.infer.model_loader import select_cpu_precision
    from finesight.storage import write_file

    recipe = out / "recipe.yaml"
    string_values = {
        "model": plan.model,
        "train": str(out / "data" / "train.jsonl"),
        "eval": str(out / "data" / "eval.jsonl"),
        "run": str(out / "run"),
    }
    # A JSON string is a YAML string, whatever is in it.
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in string_values.items()}
    data_values = {"num_images": plan.num_images, "num_eval_rows": plan.num_eval_rows}
    run_values = {"steps": plan.steps, "seed": plan.seed, "precision": select_cpu_precision()}
    content = _RECIPE_TEMPLATE.format(**data_values, **run_values, **quoted).encode()
    if recipe.is_file() and recipe.read_bytes() == content:
        return recipe
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "contains files that are not from a quickstart of this version",
            where=str(out),
            expected="an empty or missing folder",
            remedy="choose another folder with --out, or move this one",
        )
    write_file(recipe, content)
    return recipe


def _read_predictions(run_dir: Path) -> tuple[TicketPrediction, ...]:
    """Read the first predictions of the run, before and after training."""
    from finesight.evaluate.metric_difference import read_predictions
    from finesight.manifest import PREDICTIONS_FOLDER

    before, after = (
        read_predictions(run_dir / PREDICTIONS_FOLDER / f"{name}.jsonl")[:NUM_SHOWN_PREDICTIONS]
        for name in ("before", "after")
    )
    return tuple(
        TicketPrediction(
            image=Path(os.path.normpath(after_answer.record["image"])),
            reference=after_answer.case.references[0],
            before=before_answer.case.answer,
            after=after_answer.case.answer,
        )
        for before_answer, after_answer in zip(before, after, strict=True)
    )


def _format_result(run_dir: Path, result: QuickstartResult) -> Iterator[str]:
    """Yield label and predictions of each ticket, before and after training, and the scores."""
    from finesight.manifest import REPORT_FILE

    yield "5. Predictions for validation tickets"
    for prediction in result.predictions:
        name, indent = prediction.image.name, " " * len(prediction.image.name)
        yield f"   {name}  label   {prediction.reference}"
        yield f"   {indent}  before  {shorten(' '.join(prediction.before.split()), 120)}"
        yield f"   {indent}  after   {shorten(' '.join(prediction.after.split()), 120)}"
    before, after = result.result.before, result.result.after
    assert before is not None, f"{run_dir} has no evaluation before its first step"
    assert after is not None, f"{run_dir} has no evaluation after its last step"
    field_scores, exact_scores = (
        f"{before.scores[name]:.1%} before, {after.scores[name]:.1%} after"
        for name in ("f1", "exact")
    )
    yield f"F1 of the ticket fields: {field_scores}"
    yield f"Tickets with all fields correct: {exact_scores}; {result.total_s:.0f} s in total"
    yield f"Report: {run_dir / REPORT_FILE}"
