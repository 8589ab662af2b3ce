"""Workflow of `finesight quickstart`, which takes minutes on a CPU and needs no network.

It generates images of train tickets, imports and checks their table, fine-tunes the bundled model
with LoRA to read them as JSON, and evaluates it on validation tickets. Each stage runs the code of
a command, and the commands are printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.check.check_issues import format_summary
from finesight.check.data_checker import check_sources, inputs_from_recipe
from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.errors import TrainingInterrupted, UserError, format_command, shorten
from finesight.evaluate.metric_difference import read_predictions
from finesight.infer.model_loader import select_cpu_precision
from finesight.manifest import PREDICTIONS_FOLDER, REPORT_FILE
from finesight.model_folder import TINY_MODEL
from finesight.recipe import load_recipe
from finesight.storage import write_file
from finesight.synth.tickets import TABLE_FILE, TICKET_FIELDS, write_tickets
from finesight.train.finalize import RunResult
from finesight.train.training_run import train

PROMPT = "Read the ticket."
NUM_SHOWN_PREDICTIONS = 4

MAX_SHOWN_ISSUES = 3

_COLUMNS = {"image": "image", "fields": ",".join(TICKET_FIELDS)}

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
    model: str = TINY_MODEL
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


def run_quickstart(
    out: Path, console: Console, settings: QuickstartSettings | None = None
) -> QuickstartResult:
    """Run the complete workflow in the folder `out`, and print each stage with its command.

    If the folder contains finished stages of an earlier quickstart, they are not repeated, except
    for the data check.

    Raises:
        UserError: `out` contains other files.
        TrainingInterrupted: The training was interrupted; a checkpoint was saved.
    """
    settings, start_time = settings or QuickstartSettings(), time.monotonic()
    recipe = write_recipe(out, settings)
    table = out / "tickets" / TABLE_FILE

    def log(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    log(f"1. Generate {settings.num_images} images of train tickets and their label file {table}")
    if not table.parent.exists():
        write_tickets(table.parent, settings.num_images, settings.seed)
    log(_read_head(table))
    log(
        f"2. Import them, the last {settings.num_eval_rows} for validation\n   $"
        f" {_import_table(table, out, settings)}"
    )
    log(f"3. Check the data\n   $ {format_command('check', recipe)}")
    check_lines = format_summary(check_sources(*inputs_from_recipe(recipe)), MAX_SHOWN_ISSUES)
    log("\n".join(f"   {line}" for line in check_lines))
    log(
        f"4. Train {settings.model}, with an evaluation before and after\n   $"
        f" {format_command('train', recipe)}"
    )
    train_result = _train(recipe, console)
    log("5. Predictions for validation tickets")
    predictions = _read_predictions(out / "run" / PREDICTIONS_FOLDER)
    log(_format_predictions(predictions))
    result_summary = QuickstartResult(
        train_result, tuple(predictions), time.monotonic() - start_time
    )
    log(_format_result(out, result_summary))
    return result_summary


def write_recipe(out: Path, plan: QuickstartSettings) -> Path:
    """Write the recipe of the quickstart into the folder `out`, unless it exists."""
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


def _read_head(table: Path) -> str:
    """Return the first lines of the label file, indented for the console."""
    with table.open(encoding="utf-8") as lines:
        return "".join(f"      {line}" for line, _ in zip(lines, range(3), strict=False)).rstrip()


def _import_table(table: Path, out: Path, settings: QuickstartSettings) -> str:
    target = out / "data"
    if not target.exists():
        import_options = ImportOptions(
            columns=_COLUMNS, prompt=PROMPT, eval_last=settings.num_eval_rows
        )
        import_dataset(table, target, import_options)
    map_options = [part for pair in _COLUMNS.items() for part in ("--map", "=".join(pair))]
    options = ["--prompt", PROMPT, "--eval-last", str(settings.num_eval_rows)]
    return format_command("import", table, target, *map_options, *options)


def _train(recipe: Path, console: Console) -> RunResult:
    try:
        result = train(load_recipe(recipe), resume=True, console=console)
    except TrainingInterrupted as interruption:
        raise TrainingInterrupted(
            f"{interruption} (the same quickstart does, too)"
        ) from interruption
    assert result is not None, "a quickstart of several processes"
    return result


def _read_predictions(folder: Path) -> list[TicketPrediction]:
    """Read the first predictions of the run, before and after training."""
    before, after = (
        read_predictions(folder / f"{name}.jsonl")[:NUM_SHOWN_PREDICTIONS]
        for name in ("before", "after")
    )
    return [
        TicketPrediction(
            image=Path(os.path.normpath(after_answer.record["image"])),
            reference=after_answer.case.references[0],
            before=before_answer.case.answer,
            after=after_answer.case.answer,
        )
        for before_answer, after_answer in zip(before, after, strict=True)
    ]


def _format_predictions(predictions: Sequence[TicketPrediction]) -> str:
    """Format label, prediction before and prediction after training of each ticket."""
    lines = []
    for prediction in predictions:
        name, indent = prediction.image.name, " " * len(prediction.image.name)
        lines.append(f"   {name}  label   {prediction.reference}")
        lines.append(f"   {indent}  before  {shorten(' '.join(prediction.before.split()), 120)}")
        lines.append(f"   {indent}  after   {shorten(' '.join(prediction.after.split()), 120)}")
    return "\n".join(lines)


def _format_result(out: Path, result: QuickstartResult) -> str:
    """Format the scores of the run, and commands to try next."""
    before, after = result.result.before, result.result.after
    assert before is not None, f"{out} has no evaluation before its first step"
    assert after is not None, f"{out} has no evaluation after its last step"
    field_scores, exact_scores = (
        f"{before.scores[name]:.1%} before, {after.scores[name]:.1%} after"
        for name in ("f1", "exact")
    )
    first_image = result.predictions[0].image
    return "\n".join(
        [
            f"F1 of the ticket fields: {field_scores}",
            f"Tickets with all fields correct: {exact_scores}; {result.total_s:.0f} s in total",
            f"Report: {out / 'run' / REPORT_FILE}",
            "Next:",
            f"   $ {format_command('show', out / 'recipe.yaml')}",
            f"   $ {format_command('predict', out / 'run', first_image, '--prompt', PROMPT)}",
            f"   $ {format_command('eval', out / 'run')}",
            f"   $ {format_command('chat', out / 'run')}",
            f"   $ {format_command('merge', out / 'run', out / 'merged')}",
            "With your own images:",
            f"   $ {format_command('init')}",
        ]
    )
