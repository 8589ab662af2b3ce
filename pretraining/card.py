"""Writes the model card of finesight-tiny from the facts of its making.

    python pretraining/card.py FACTS.json README.md

FACTS.json is one object, all of it required (see `Facts`):

    parameters  numbers that were learned
    geometry    {"layers of the language model": 5, ...}: shown as it is
    tokens      size of the vocabulary, special tokens counted
    pictures    1000000: all that were drawn to learn from
    samples     {"first": 150000, "second": 400000, ...}: pictures that each run learns from
    mixtures    {"first": {"letters": 0.6, ...}, ...}: shares of the generated tasks, by run
    training    {"first": {"steps": 2500, ...}, ...}: settings, shown as they are, by run
    curves      {"first": [{"step": 625, "loss": 0.41, "held_out_loss": 0.38}, ...], ...}: `curve`
                makes them
    seconds     {"draw": 300.0, "train": 900.0, ...} by stage
    machine     in words
    versions    {"torch": "2.13.0", ...}
    measured    by name of the held-out set, what `Evaluation.as_json` says
    seen        {"words": 0.47, "formulas": 0.036}: estimated shares of held-out words and
                formulas that occur in training, too

What the tasks draw and which fonts they draw with is read off the code.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from finesight.errors import UserError
from finesight.hub import TINY
from finesight.storage import write_file
from finesight.synth.fonts import FAMILIES, MATHTEXT
from finesight.synth.sheet import SQUARE
from finesight.synth.streets import ACROSS, DOWN
from finesight.synth.tasks import MOST_TURNS, TASKS
from finesight.synth.texts import LARGEST
from finesight.synth.vocabulary import CHINESE

MEASURING = "measure"
"""The stage that comes when the weights are there."""


class Part(BaseModel):
    """Facts of one kind; none may be missing and none be unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(Part):
    """The mean loss of the steps up to this one since the last point, and the loss on held-out
    samples after it."""

    step: int
    loss: float
    held_out_loss: float


class Measured(Part):
    """A held-out set and its figures, as `Evaluation.as_json` gives them."""

    metric: str
    samples: int
    unreadable: int
    headline: str
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    notes: dict[str, str] = {}
    details: dict[str, Any] = {}


class Seen(Part):
    """Shares, 0 to 1, of the held-out single words and formulas that training shows, too."""

    words: float
    formulas: float


class Facts(Part):
    """What the card is made from; the module's docstring says what each is."""

    parameters: int
    geometry: dict[str, int | float | str]
    tokens: int
    pictures: int
    samples: dict[str, int]
    mixtures: dict[str, dict[str, float]]
    training: dict[str, dict[str, Any]]
    curves: dict[str, tuple[Point, ...]]
    seconds: dict[str, float]
    machine: str
    versions: dict[str, str]
    measured: dict[str, Measured]
    seen: Seen


_CARD = """\
---
license: apache-2.0
language:
- en
- zh
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- finesight
- qwen2_vl
- ocr
- latex
- grounding
- synthetic-data
---

# {name}

A vision-language model of {millions} million numbers that reads words, receipts and formulas, and
describes and finds coloured shapes. It comes inside the Python package finesight and is there to be
fine-tuned: on a CPU, without a network, in minutes. Its architecture is Qwen2-VL's, scaled down.
There is no base model: it was trained from random numbers, on nothing but pictures that finesight
draws.

```sh
finesight predict {name} receipt.png --prompt "Give shop, date and total as JSON."
```

In a recipe it is `model: {name}`; its folder, which transformers loads, too, is
`finesight.hub.locate("{name}").path`. Boxes are asked for and answered in Qwen2-VL's way, in
thousandths of the picture's sides.

## What it can

Measured on pictures drawn from a seed that training never used, by greedy generation, with 95 %
intervals. Unseen fonts are families that no training picture is written in.

{measured}

By an estimate, at least {seen_words} of the held-out single words occur in training, too, for a
third of all are common English; the others are made-up words, numbers and codes. Of the held-out
formulas about {seen_formulas} occur in training.

## What it cannot

- It is small, and has seen only what was drawn: no photographs, no handwriting, no tables, no
  charts. On real pictures it is a start for fine-tuning and no reader.
- Its pictures had up to {largest} pixels a side, those with clutter up to {clutter}.
  Make larger ones smaller (`picture` in a recipe).
- It answers up to {turns} questions about one picture. It does not converse beyond that, and it
  knows nothing about the world.
- It reads English and, from a list of {chinese} characters, a little Chinese.
- Its formulas are those of its grammar: no matrices, no `\\operatorname`, no text between formulas.
- It answers even when it does not know, and its boxes carry no confidence.

## How it was made

`python pretraining/make.py OUT`, in the source archive of finesight, makes it again from nothing:
it draws the pictures, learns the tokenizer from their words, trains, measures and writes this
folder.

### Data

{pictures} pictures with questions and answers, one for letters and formulas and up to {turns} for
the others, in English and, for some, in Chinese. Runs follow each other; each has the pictures
of the one before and more, except that those of the first are its own:

{mixture}

### Model

{geometry}

The vocabulary has {tokens} tokens: bytes, Chinese characters and the words that questions,
formulas and descriptions often say, as byte-level BPE that spells every other word, and Qwen2-VL's
special tokens.

### Training

{training}

{curve}

{seconds} on {machine}, with {versions}.

## Licence

Apache-2.0. Weights, tokenizer and all training data are the project's own: no picture, text, label
or weight of anyone else is in them. Fonts were used for drawing only and are no part of the model:

{fonts}
"""


def card(facts: Facts) -> str:
    """The model card: Markdown under the front matter that hubs read."""
    return _CARD.format(
        name=TINY,
        millions=f"{facts.parameters / 1e6:.1f}",
        measured=_measured(facts.measured),
        seen_words=f"{facts.seen.words:.1%}",
        seen_formulas=f"{facts.seen.formulas:.1%}",
        largest=LARGEST,
        clutter=f"{ACROSS[1] * SQUARE} by {DOWN[1] * SQUARE}",
        chinese=len(CHINESE),
        pictures=f"{facts.pictures:,}",
        turns=MOST_TURNS,
        mixture=_mixture(facts),
        geometry=_table(("geometry", ""), facts.geometry.items()),
        tokens=f"{facts.tokens:,}",
        training=_training(facts.training),
        curve=_table(
            ("run", "step", "loss", "held-out loss"),
            (
                (_ordinal(number), p.step, f"{p.loss:.4f}", f"{p.held_out_loss:.4f}")
                for number, points in enumerate(facts.curves.values())
                for p in points
            ),
        ),
        seconds=_seconds(facts.seconds),
        machine=facts.machine,
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        fonts=_fonts(),
    )


def curve(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The points of a run's curve, from the lines of its `metrics.jsonl` in their order: one for
    each measurement that steps lie before."""
    points, losses = [], list[float]()
    for line in history:
        if "held_out_loss" not in line:
            losses += [line["loss"]] if line.get("loss") is not None else []
        elif losses:
            mean = sum(losses) / len(losses)
            held_out = line["held_out_loss"]
            points.append({"step": line["step"], "loss": mean, "held_out_loss": held_out})
            losses = []
    return points


def _measured(sets: Mapping[str, Measured]) -> str:
    rows = [
        (name, figure, f"{one.scores[figure]:.1%}", _interval(one.intervals[figure]), one.samples)
        for name, one in sets.items()
        for figure in dict.fromkeys((one.headline, *(["exact"] if "exact" in one.scores else [])))
    ]
    return _table(("held-out pictures", "figure", "", "95 % interval", "samples"), rows)


def _interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return "-"
    return " to ".join(f"{bound:.1%}" for bound in bounds)


def _mixture(facts: Facts) -> str:
    names = dict.fromkeys(name for shares in facts.mixtures.values() for name in shares)
    runs = [f"{_ordinal(i)} run, {n:,}" for i, n in enumerate(facts.samples.values())]
    rows = [
        (name, *(f"{shares.get(name, 0):.0%}" for shares in facts.mixtures.values()), _about(name))
        for name in names
    ]
    return _table(("task", *runs, "what is drawn"), rows)


def _training(settings: Mapping[str, Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for of_run in settings.values() for name in of_run)
    rows = [(name, *(of_run.get(name, "") for of_run in settings.values())) for name in names]
    return _table(("setting", *(f"{_ordinal(i)} run" for i in range(len(settings)))), rows)


def _ordinal(number: int) -> str:
    return ("first", "second", "third", "fourth")[number]


def _about(task: str) -> str:
    """The first sentence of what the code says of a task."""
    about = inspect.getdoc(TASKS[task])
    assert about, f"the task {task} does not say what it draws"
    return about.partition(". ")[0].partition("; ")[0].rstrip(".")


def _seconds(stages: Mapping[str, float]) -> str:
    made = {name: seconds for name, seconds in stages.items() if name != MEASURING}
    parts = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in made.items())
    measuring = f", and {stages[MEASURING]:.0f} s to measure it," if MEASURING in stages else ""
    return f"{sum(made.values()) / 60:.1f} minutes ({parts}){measuring}"


def _fonts() -> str:
    rows = [
        (family.name, family.licence, "measuring" if family.unseen else "training")
        for family in FAMILIES
    ]
    rows += [(name, licence, "formulas") for name, licence in MATHTEXT.items()]
    return _table(("fonts", "licence", "used for"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def read_facts(path: Path) -> Facts:
    """Raises UserError for a file that is no FACTS.json."""
    try:
        return Facts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            where=str(path),
            expected="the facts that pretraining/card.py names",
            remedy="correct them",
        ) from error


def main() -> int:
    """Read the facts and write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts", type=Path)
    parser.add_argument("card", type=Path)
    asked = parser.parse_args()
    try:
        write_file(asked.card, card(read_facts(asked.facts)).encode())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
