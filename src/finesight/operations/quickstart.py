"""`finesight quickstart`: the complete workflow, in minutes on a CPU and without a network.

It generates images of train tickets, imports and checks their table, fine-tunes the bundled model
with LoRA to read them as JSON, and evaluates it on validation tickets. Each stage runs the code of
a command, and the commands are printed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finesight.errors import Step, TrainingInterrupted, UserError, shorten
from finesight.operations.dataset import check_data, import_data
from finesight.operations.operation import Outcome, Parameter, StrPath, format_command
from finesight.operations.training import train
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.evaluate.metric_difference import ScoredPrediction
    from finesight.train.finalize import RunResult

PROMPT = "Read the ticket."
NUM_SHOWN_PREDICTIONS = 4


@dataclass(frozen=True)
class QuickstartSettings:
    """Dataset size, training steps, model and random seed of the quickstart."""

    num_images: int = 2500
    num_eval_rows: int = 100
    steps: int = 200
    model: str = "finesight-tiny"
    seed: int = 0


def quickstart(
    out: Annotated[StrPath, Parameter(metavar="FOLDER")] = Path("quickstart"),
    settings: QuickstartSettings | None = None,
) -> Outcome[RunResult]:
    """Run the complete workflow on generated train tickets, with finesight-tiny.

    Needs no network and no GPU, and takes about two minutes on two CPU cores. Run it again to
    resume after an interruption.

    Example: finesight quickstart --out /tmp/first

    Args:
        out: Folder for all files.
    """
    from finesight.evaluate.metric_difference import read_predictions
    from finesight.manifest import PREDICTIONS_FOLDER
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
    before, after = (
        read_predictions(run / PREDICTIONS_FOLDER / f"{name}.jsonl")[:NUM_SHOWN_PREDICTIONS]
        for name in ("before", "after")
    )
    question = {"images": [os.path.normpath(after[0].record["image"])], "prompt": PROMPT}
    next_steps = [
        Step("show", {"recipe": recipe}),
        Step("predict", {"run_or_model": run, **question}),
        Step("eval", {"run_or_model": run}),
        Step("chat", {"run_or_model": run}),
        Step("merge", {"source": run, "out": out / "merged"}),
        Step("init", {}),
    ]
    shown = [*_format_result(run, run_result, before, after)]
    shown.append(f"{time.monotonic() - start_time:.0f} s in total")
    return Outcome(run_result, shown, run_result.as_json(), next_steps)


def _format_step(operation: str, **arguments: object) -> str:
    return f"   $ {format_command(Step(operation, arguments))}"


def write_recipe(out: Path, plan: QuickstartSettings) -> Path:
    """Write the recipe of the quickstart into the folder `out`, unless it exists.

    Raises UserError if `out` contains other files.
    """
    from finesight.infer.model_loader import select_cpu_precision
    from finesight.model_folder import TINY_MODEL
    from finesight.recipe_template import DetectedTask, format_recipe
    from finesight.storage import write_file

    recipe, num_samples = out / "recipe.yaml", plan.num_images - plan.num_eval_rows
    counts = {"train": num_samples, "eval": plan.num_eval_rows}
    files = {out / "data" / f"{name}.jsonl": f"{n} train tickets" for name, n in counts.items()}
    task = DetectedTask("json", PROMPT, max_new_tokens=112)
    overrides = [
        # A JSON string is a YAML string, whatever is in it.
        f"model={json.dumps(plan.model, ensure_ascii=False)}",
        f"train.seed={plan.seed}",
        f"train.precision={select_cpu_precision()}",
        "train.device=cpu",
        "eval.every=0",
        "eval.limit=null",
    ]
    inputs = (recipe, out / "run", TINY_MODEL, "`finesight quickstart`", task, files, num_samples)
    content = format_recipe(*inputs, overrides, {"train.steps": str(plan.steps)}).encode()
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


def _format_result(
    run_dir: Path,
    result: RunResult,
    old_answers: Sequence[ScoredPrediction],
    new_answers: Sequence[ScoredPrediction],
) -> Iterator[str]:
    """Yield label and predictions of each ticket, before and after training, and the scores."""
    from finesight.manifest import REPORT_FILE

    yield "5. Predictions for validation tickets"
    for old, new in zip(old_answers, new_answers, strict=True):
        name = Path(new.record["image"]).name
        indent = " " * len(name)
        yield f"   {name}  label   {new.case.references[0]}"
        yield f"   {indent}  before  {shorten(' '.join(old.case.answer.split()), 120)}"
        yield f"   {indent}  after   {shorten(' '.join(new.case.answer.split()), 120)}"
    before, after = result.before, result.after
    assert before is not None, f"{run_dir} has no evaluation before its first step"
    assert after is not None, f"{run_dir} has no evaluation after its last step"
    for name, title in (("f1", "F1 of the ticket fields"), ("exact", "All fields correct")):
        yield f"{title}: {before.scores[name]:.1%} before, {after.scores[name]:.1%} after"
    yield f"Report: {run_dir / REPORT_FILE}"
