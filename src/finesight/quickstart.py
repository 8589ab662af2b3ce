"""The whole path in minutes, on a CPU and without a network.

Train tickets are drawn, their table is imported and checked, the model that comes with the package
learns by LoRA to read them into JSON, and is measured on tickets that it has never seen. Every
stage is the one that a command runs; the commands are shown as they would be typed.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from finesight.check.run import check_sources
from finesight.check.subjects import of_recipe
from finesight.check.summary import as_lines
from finesight.data.importing import import_file
from finesight.data.opening import Request
from finesight.errors import Interrupted, UserError
from finesight.evaluate.saved import read_answers
from finesight.hub import TINY
from finesight.infer.load import cpu_precision
from finesight.recipe import load_recipe
from finesight.run_folder import PREDICTIONS, REPORT
from finesight.storage import write_file
from finesight.synth.tickets import FIELDS, TABLE, draw_tickets
from finesight.train.finish import RunResult
from finesight.train.loop import train

PROMPT = "Read the ticket."
SHOWN = 4
"""Held-out tickets whose answers are printed."""

FINDINGS = 3
"""Findings of each fault that are printed."""

_COLUMNS = {"image": "picture", "fields": ",".join(FIELDS)}

_RECIPE = """\
# Made by `finesight quickstart`: {pictures} train tickets, the last {held_out} held out.
# A small model learns to read them into JSON.
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
  batch: 16
  learning_rate: 2.0e-3
  seed: {seed}
  precision: {precision}
  device: cpu
eval: {{metric: json, max_new_tokens: 112, batch: 100}}
output: {run}
"""


@dataclass(frozen=True)
class Plan:
    """How much is drawn, held out and learned, by which model, and what chance begins with."""

    pictures: int = 2500
    held_out: int = 100
    steps: int = 200
    model: str = TINY
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A held-out ticket, what it says, and what the model answered before training and after."""

    picture: Path
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class Quickstart:
    """What came out: the run's result, some answers, and the seconds it took in all."""

    result: RunResult
    answers: tuple[Answer, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        answers = [{**asdict(a), "picture": str(a.picture)} for a in self.answers]
        return {
            "result": self.result.as_json(),
            "answers": answers,
            "seconds": round(self.seconds, 1),
        }


def quickstart(out: Path, console: Console, plan: Plan | None = None) -> Quickstart:
    """Run the whole path inside the folder `out`.

    What is drawn, imported or trained there already is not done again; the check always is.
    Raises UserError when `out` holds something else, and Interrupted, with a checkpoint, when the
    training is stopped.
    """
    plan, start = plan or Plan(), time.monotonic()
    recipe = write_recipe(out, plan)
    table = out / "tickets" / TABLE

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"1. Draw {plan.pictures} train tickets; what each says stands in {table}")
    if not table.parent.exists():
        draw_tickets(table.parent, plan.pictures, plan.seed)
    say(_head(table))
    say(f"2. Import them, the last {plan.held_out} held out\n   $ {_import(table, out, plan)}")
    say(f"3. Look for what is wrong with them\n   $ {_command('data', 'check', recipe)}")
    say(_checked(recipe))
    say(f"4. Train {plan.model}, measured before and after\n   $ {_command('train', recipe)}")
    result = _train(recipe, console)
    say("5. What it answered about tickets that it was not trained on")
    answers = _answers(out / "run" / PREDICTIONS)
    say(_shown(answers))
    done = Quickstart(result, tuple(answers), time.monotonic() - start)
    say(_last_words(out, done))
    return done


def write_recipe(out: Path, plan: Plan) -> Path:
    """The recipe in `out`, written first: it is what marks the folder as a quickstart's own.

    Raises UserError when `out` holds something else.
    """
    recipe = out / "recipe.yaml"
    texts = {
        "model": plan.model,
        "train": str(out / "data" / "train.jsonl"),
        "eval": str(out / "data" / "eval.jsonl"),
        "run": str(out / "run"),
    }
    # A JSON string is a YAML string, whatever is in it.
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items()}
    drawn = {"pictures": plan.pictures, "held_out": plan.held_out}
    settings = {"steps": plan.steps, "seed": plan.seed, "precision": cpu_precision()}
    content = _RECIPE.format(**drawn, **settings, **quoted).encode()
    if recipe.is_file() and recipe.read_bytes() == content:
        return recipe
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "holds something else than a quickstart of this version",
            where=str(out),
            expected="an empty folder, or none yet",
            remedy="choose another one with --out, or move this one away",
        )
    write_file(recipe, content)
    return recipe


def _head(table: Path) -> str:
    """The first lines of the label file."""
    with table.open(encoding="utf-8") as lines:
        return "".join(f"      {line}" for line, _ in zip(lines, range(3), strict=False)).rstrip()


def _import(table: Path, out: Path, plan: Plan) -> str:
    """Import the table; gives the command that does the same."""
    target = out / "data"
    if not target.exists():
        request = Request(columns=_COLUMNS, prompt=PROMPT, eval_last=plan.held_out)
        import_file(table, target, request)
    mapped = [word for pair in _COLUMNS.items() for word in ("--map", "=".join(pair))]
    options = ["--prompt", PROMPT, "--eval-last", str(plan.held_out)]
    return _command("data", "import", table, target, *mapped, *options)


def _command(*words: str | Path) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(["finesight", *map(str, words)])


def _checked(recipe: Path) -> str:
    """What `data check` says of the recipe's data."""
    checked = check_sources(*of_recipe(recipe))
    return "\n".join(f"   {line}" for line in as_lines(checked, FINDINGS))


def _train(recipe: Path, console: Console) -> RunResult:
    try:
        result = train(load_recipe(recipe), resume=True, console=console)
    except Interrupted as interruption:
        raise Interrupted(f"{interruption} (the same quickstart does, too)") from interruption
    assert result is not None, "a quickstart of several processes"
    return result


def _answers(predictions: Path) -> list[Answer]:
    """The first held-out tickets with their answers, as the run has kept them."""
    before, after = (
        read_answers(predictions / f"{name}.jsonl")[:SHOWN] for name in ("before", "after")
    )
    return [
        Answer(
            picture=Path(os.path.normpath(new.record["image"])),
            truth=new.case.truths[0],
            before=old.case.answer,
            after=new.case.answer,
        )
        for old, new in zip(before, after, strict=True)
    ]


def _shown(answers: Sequence[Answer]) -> str:
    """Answers for people."""
    lines = []
    for answer in answers:
        name, indent = answer.picture.name, " " * len(answer.picture.name)
        lines.append(f"   {name}  says    {answer.truth}")
        lines.append(f"   {indent}  before  {_on_one_line(answer.before)}")
        lines.append(f"   {indent}  after   {_on_one_line(answer.after)}")
    return "\n".join(lines)


def _on_one_line(text: str, most: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _last_words(out: Path, done: Quickstart) -> str:
    """The scores, and what to type next."""
    before, after = done.result.before, done.result.after
    assert before is not None, f"{out} was not measured before its first step"
    assert after is not None, f"{out} was not measured after its last step"
    fields, whole = (
        f"{before.scores[name]:.1%} before, {after.scores[name]:.1%} after"
        for name in ("f1", "exact")
    )
    return "\n".join(
        [
            f"Fields of held-out tickets that are right (F1): {fields}",
            f"Tickets that are right as a whole: {whole}; {done.seconds:.0f} s in all",
            f"All of it on a page, to open in a browser: {out / 'run' / REPORT}",
            "Next:",
            f"   $ {_command('data', 'show', out / 'recipe.yaml')}",
            f"   $ {_command('predict', out / 'run', done.answers[0].picture, '--prompt', PROMPT)}",
            f"   $ {_command('eval', out / 'run')}",
            f"   $ {_command('chat', out / 'run')}",
            f"   $ {_command('merge', out / 'run', out / 'merged')}",
            "and with your own pictures:",
            f"   $ {_command('data', 'import', '--help')}",
        ]
    )
