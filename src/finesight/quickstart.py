"""The whole path in minutes, on a CPU and without a network.

Pictures are drawn, their labels imported from a foreign file, a small model with random weights is
trained and measured, and answers about pictures it has never seen. Every stage is the one that a
command runs; the commands are shown as they would be typed.
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

import torch
from rich.console import Console

from finesight.data.generated import LABELS, draw_scenes
from finesight.data.importing import import_file
from finesight.data.jsonl import Located, read_samples
from finesight.data.opening import Request
from finesight.data.sample import BoxPart
from finesight.errors import Interrupted, UserError
from finesight.evaluate.answered import truths_of
from finesight.infer.draw import draw
from finesight.infer.load import load_answerer
from finesight.infer.predict import Prediction, predict
from finesight.model.tiny import SIZES, TinySize, make_tiny
from finesight.recipe import load_recipe
from finesight.run_folder import REPORT
from finesight.storage import write_file, write_folder
from finesight.train.finish import RunResult
from finesight.train.loop import train

PROMPT = "Find every shape."
SHOWN = 8
"""Held-out pictures whose answers are printed and drawn."""

_RECIPE = """\
# Made by `finesight quickstart`: every part of a small random model learns to find shapes.
model: {model}
data:
  train: {train}
  eval: {held_out}
picture: {{height: 84, width: 84}}
tune: {{vision: full, merger: full, language: full, embeddings: full}}
train:
  steps: {steps}
  batch: 16
  learning_rate: 8.0e-4
  betas: [0.9, 0.95]
  weight_decay: 0.01
  warmup: 0.05
  precision: {precision}
  device: cpu
  workers: 0
eval: {{metric: grounding, max_new_tokens: 64, batch: 100}}
output: {run}
"""


@dataclass(frozen=True)
class Plan:
    """How much is drawn, held out and learned, and the geometry of the model."""

    pictures: int = 4000
    held_out: int = 200
    steps: int = 1200
    size: TinySize = SIZES["quickstart"]


@dataclass(frozen=True)
class Answer:
    """A held-out picture, what is on it, and what the model found before training and after: names
    and corners in pixels of the picture."""

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
    """Run the whole path inside the folder `out`; stages that are there already are not repeated.

    Raises UserError when `out` holds something else, and Interrupted, with a checkpoint, when the
    training is stopped.
    """
    plan, start = plan or Plan(), time.monotonic()
    recipe = _claim(out, plan)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"1. Draw {plan.pictures} pictures; what is where stands in {out / 'shapes' / LABELS}")
    if not (out / "shapes").exists():
        draw_scenes(out / "shapes", plan.pictures, seed=0)
    say(f"2. Import them, the last {plan.held_out} held out\n   $ {_import(out, plan)}")
    say("3. Make a small Qwen2-VL with random weights and its own tokenizer")
    if not (out / "model").exists():
        make_tiny(out / "model", "qwen2_vl", seed=0, size=plan.size)
    say(f"4. Train it, measured before and after\n   $ {_command('train', recipe)}")
    result = _train(recipe, console)
    say(f"5. Ask both models about held-out pictures; boxes are drawn in {out / 'drawn'}")
    answers = _ask(out)
    say(_table(answers))
    done = Quickstart(result, tuple(answers), time.monotonic() - start)
    say(_last_words(out, done))
    return done


def _claim(out: Path, plan: Plan) -> Path:
    """The recipe in `out`, written first: it is what marks the folder as a quickstart's own."""
    recipe = out / "recipe.yaml"
    paths = {
        "model": out / "model",
        "train": out / "data" / "train.jsonl",
        "held_out": out / "data" / "eval.jsonl",
        "run": out / "run",
    }
    # A JSON string is a YAML string, whatever is in it.
    quoted = {name: json.dumps(str(path), ensure_ascii=False) for name, path in paths.items()}
    texts = {
        precision: _RECIPE.format(steps=plan.steps, precision=precision, **quoted)
        for precision in ("bf16", "fp32")
    }
    if recipe.is_file() and recipe.read_text(encoding="utf-8") in texts.values():
        return recipe
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "holds something else than a quickstart of this version",
            where=str(out),
            expected="an empty folder, or none yet",
            remedy="choose another one with --out, or move this one away",
        )
    write_file(recipe, texts[_quicker_precision()].encode())
    return recipe


def _quicker_precision() -> str:
    """What this processor multiplies faster: some compute in bf16, others only imitate it."""
    best = {"bf16": float("inf"), "fp32": float("inf")}
    for _ in range(20):  # in turns, so that other work on the machine delays both
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=best.__getitem__)


def _import(out: Path, plan: Plan) -> str:
    """Import the labels; gives the command that does the same."""
    source, target = out / "shapes" / LABELS, out / "data"
    columns = {"image": "picture", "label": "shapes", "box": "boxes"}
    if not target.exists():
        request = Request(
            columns=columns, prompt=PROMPT, box_format="xywh", eval_last=plan.held_out
        )
        import_file(source, target, request)
    mapped = [word for pair in columns.items() for word in ("--map", "=".join(pair))]
    options = ["--box-format", "xywh", "--prompt", PROMPT, "--eval-last", str(plan.held_out)]
    return _command("data", "import", source, target, *mapped, *options)


def _command(*words: str | Path) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(["finesight", *map(str, words)])


def _train(recipe: Path, console: Console) -> RunResult:
    try:
        return train(load_recipe(recipe), resume=True, console=console)
    except Interrupted as interruption:
        raise Interrupted(f"{interruption} (the same quickstart does, too)") from interruption


def _ask(out: Path) -> list[Answer]:
    """What the random model and the tuned one find in the first held-out pictures."""
    file = out / "data" / "eval.jsonl"
    samples = [Located(sample, file.parent) for sample in read_samples(file)[:SHOWN]]
    found = [_found(source, samples) for source in (out / "model", out / "run")]
    if not (out / "drawn").exists():
        with write_folder(out / "drawn") as folder:
            draw(found[-1], folder)
    return [
        Answer(
            picture=Path(os.path.normpath(after.images[0])),
            truth=_boxes(truths_of(sample.sample)[1]),
            before=_said(before),
            after=_said(after),
        )
        for sample, before, after in zip(samples, *found, strict=True)
    ]


def _found(source: Path, samples: Sequence[Located]) -> list[Prediction]:
    answerer = load_answerer(str(source), "cpu")
    return predict(answerer.model, answerer.renderer, samples, max_new_tokens=64, batch=SHOWN)


def _said(prediction: Prediction) -> str:
    return _boxes(prediction.boxes) if prediction.boxes else "no box"


def _boxes(boxes: Sequence[BoxPart]) -> str:
    """Names and corners, rounded to pixels."""
    return "; ".join(f"{box.label} {' '.join(f'{v:.0f}' for v in box.xyxy)}" for box in boxes)


def _table(answers: Sequence[Answer]) -> str:
    """Answers for people."""
    rows = [("picture", "what is there", "before", "after")]
    rows += [(answer.picture.name, answer.truth, answer.before, answer.after) for answer in answers]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"   {line}".rstrip() for line in lines)


def _last_words(out: Path, done: Quickstart) -> str:
    """The scores, and what to type next."""
    before, after = done.result.before, done.result.after
    assert before is not None, f"{out} was not measured before its first step"
    assert after is not None, f"{out} was not measured after its last step"
    hits = [measured.scores["accuracy_at_0.5"] for measured in (before, after)]
    overlaps = [measured.scores["mean_iou"] for measured in (before, after)]
    picture = done.answers[0].picture
    return "\n".join(
        [
            f"Shapes found in held-out pictures: {hits[0]:.1%} before, {hits[1]:.1%} after"
            f" (mean overlap {overlaps[0]:.2f} and {overlaps[1]:.2f}), {done.seconds:.0f} s in all",
            f"All of it on a page, to open in a browser: {out / 'run' / REPORT}",
            "Next:",
            f"   $ {_command('data', 'show', out / 'recipe.yaml')}",
            f"   $ {_command('predict', out / 'run', picture, '--prompt', PROMPT)}",
            f"   $ {_command('eval', out / 'run')}",
            "and with your own pictures:",
            f"   $ {_command('data', 'import', '--help')}",
        ]
    )
