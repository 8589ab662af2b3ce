"""Write the model card of finesight-tiny from the facts of its training.

    python pretraining/model_card.py FACTS.json README.md

FACTS.json is one object with these required keys (see `ModelCardFacts`):

    num_params     number of trained parameters
    architecture   {"decoder layers": 5, ...}: printed as it is
    vocab_size     size of the vocabulary, including special tokens
    num_images     1000000: number of all training images
    num_samples    {"first": 150000, "second": 400000, ...}: training images of each stage
    mixtures       {"first": {"letters": 0.6, ...}, ...}: proportion of each task, by stage
    training       {"first": {"steps": 2500, ...}, ...}: settings of each stage, printed as they are
    loss_curves    {"first": [{"step": 625, "loss": 0.41, "validation_loss": 0.38}, ...], ...}, from
                   `loss_curve`
    stage_seconds  {"draw": 300.0, "train": 900.0, ...}
    machine        GPU or CPU, as text
    versions       {"torch": "2.13.0", ...}
    eval_results   `EvalResult.as_json()` of each evaluation set
    train_overlap  {"words": 0.47, "formulas": 0.036}: estimated fraction of validation words and
                   formulas that occur in the training data

Descriptions of tasks and fonts are read from the code.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from synthetic_tasks.backgrounds import TOKEN_SIZE
from synthetic_tasks.fonts import FONT_FAMILIES, MATHTEXT_LICENSES
from synthetic_tasks.streets import COLUMN_RANGE, ROW_RANGE
from synthetic_tasks.tasks import MAX_TURNS, TASK_GENERATORS
from synthetic_tasks.text_images import MAX_IMAGE_SIZE
from synthetic_tasks.vocabulary import CHINESE_CHARACTERS

from finesight.errors import UserError
from finesight.files.storage import write_file
from finesight.model_folder import TINY_MODEL

EVAL_STAGE = "evaluation"
"""Name of the evaluation stage after training."""


class StrictModel(BaseModel):
    """Base model that rejects missing and unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LossPoint(StrictModel):
    """Mean training loss since the previous point, and validation loss at this step."""

    step: int
    loss: float
    validation_loss: float


class EvalFigures(StrictModel):
    """Results of one evaluation set, as returned by `EvalResult.as_json`."""

    metric: str
    num_samples: int
    corrupt_samples: int
    primary_metric: str
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    notes: dict[str, str] = {}
    details: dict[str, Any] = {}


class TrainOverlap(StrictModel):
    """Fractions of evaluation words and formulas that occur in the training data."""

    words: float
    formulas: float


class ModelCardFacts(StrictModel):
    """Facts of the model card. The module docstring describes each field."""

    num_params: int
    architecture: dict[str, int | float | str]
    vocab_size: int
    num_images: int
    num_samples: dict[str, int]
    mixtures: dict[str, dict[str, float]]
    training: dict[str, dict[str, Any]]
    loss_curves: dict[str, tuple[LossPoint, ...]]
    stage_seconds: dict[str, float]
    machine: str
    versions: dict[str, str]
    eval_results: dict[str, EvalFigures]
    train_overlap: TrainOverlap


_CARD_TEMPLATE = """\
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

A vision-language model with {millions} million parameters. It reads words, receipts and formulas,
and describes and locates colored shapes. The Python package finesight contains it for fine-tuning
on a CPU, without a network, in minutes. The architecture is a scaled-down Qwen2-VL. The model was
trained from random weights, only on images that finesight generates.

```sh
finesight predict {name} receipt.png --prompt "Give shop, date and total as JSON."
```

In a recipe, use `model: {name}`. transformers loads the same folder,
`finesight.model_folder.locate_model("{name}").path`. Boxes use the Qwen2-VL format: thousandths of
the image sides.

## Evaluation

Greedy decoding on images generated with a seed that training did not use, with 95 % confidence
intervals. Unseen fonts are families that do not occur in the training images.

{eval_table}

An estimated {word_overlap} or more of the single words in the evaluation sets also occur in the
training data: a third of all words are common English, the others are generated words, numbers and
codes. About {formula_overlap} of the evaluation formulas occur in the training data.

## Limitations

- The model is small. The training data contains generated images only: no photographs, handwriting,
  tables or charts. On real images, it is a starting point for fine-tuning.
- Training images had up to {max_side} pixels per side, images with clutter up to
  {clutter_size}. Downscale larger images (`image` in a recipe).
- The model answers up to {max_turns} questions about one image. It has no other conversation
  ability and no world knowledge.
- It reads English and a limited set of {num_chinese} Chinese characters.
- Formulas follow a fixed grammar: no matrices, no `\\operatorname`, no text between formulas.
- The model always answers, and its boxes have no confidence scores.

## Training

`python pretraining/build_tiny_model.py OUT`, in the source archive of finesight, reproduces the
model from scratch. It generates the images, trains the tokenizer and the model, evaluates it and
writes this folder.

### Data

{num_images} images with questions and answers: one question for letters and formulas, up to
{max_turns} for other tasks, in English and partly in Chinese. The training stages run one after
another. Each stage uses the images of the previous stage and new ones; the first stage has its own
images.

{mixture}

### Model

{architecture}

The vocabulary has {vocab_size} tokens: byte-level BPE with bytes, Chinese characters and frequent
words of questions, formulas and descriptions, and the special tokens of Qwen2-VL.

### Settings and loss

{training}

{loss_curve}

{seconds} on {machine}, with {versions}.

## License

Apache-2.0. Weights, tokenizer and training data are original work of the project, without images,
texts, labels or weights of others. Fonts were only used to draw images and are not part of the
model:

{fonts}
"""


def render_card(facts: ModelCardFacts) -> str:
    """Render the model card as Markdown with hub metadata."""
    return _CARD_TEMPLATE.format(
        name=TINY_MODEL,
        millions=f"{facts.num_params / 1e6:.1f}",
        eval_table=_render_eval_table(facts.eval_results),
        word_overlap=f"{facts.train_overlap.words:.1%}",
        formula_overlap=f"{facts.train_overlap.formulas:.1%}",
        max_side=MAX_IMAGE_SIZE,
        clutter_size=f"{COLUMN_RANGE[1] * TOKEN_SIZE} x {ROW_RANGE[1] * TOKEN_SIZE}",
        num_chinese=len(CHINESE_CHARACTERS),
        num_images=f"{facts.num_images:,}",
        max_turns=MAX_TURNS,
        mixture=_render_mixture(facts),
        architecture=_render_table(("property", "value"), facts.architecture.items()),
        vocab_size=f"{facts.vocab_size:,}",
        training=_render_training(facts.training),
        loss_curve=_render_table(
            ("stage", "step", "loss", "validation loss"),
            (
                (_ordinal(index), p.step, f"{p.loss:.4f}", f"{p.validation_loss:.4f}")
                for index, points in enumerate(facts.loss_curves.values())
                for p in points
            ),
        ),
        seconds=_render_seconds(facts.stage_seconds),
        machine=facts.machine,
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        fonts=_render_fonts(),
    )


def loss_curve(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Compute the loss curve from `metrics.jsonl`: one point per evaluation after step 0."""
    points, losses = [], list[float]()
    for line in history:
        if "validation_loss" not in line:
            losses += [line["loss"]] if line.get("loss") is not None else []
        elif losses:
            mean = sum(losses) / len(losses)
            point = {"step": line["step"], "loss": mean}
            points.append(point | {"validation_loss": line["validation_loss"]})
            losses = []
    return points


def _render_eval_table(eval_results: Mapping[str, EvalFigures]) -> str:
    rows = [
        (
            name,
            metric,
            f"{result.scores[metric]:.1%}",
            _format_interval(result.intervals[metric]),
            result.num_samples,
        )
        for name, result in eval_results.items()
        for metric in dict.fromkeys(
            (result.primary_metric, *(["exact"] if "exact" in result.scores else []))
        )
    ]
    return _render_table(("evaluation set", "metric", "score", "95 % interval", "samples"), rows)


def _format_interval(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return "-"
    return " to ".join(f"{bound:.1%}" for bound in bounds)


def _render_mixture(facts: ModelCardFacts) -> str:
    names = dict.fromkeys(name for shares in facts.mixtures.values() for name in shares)
    stages = [f"{_ordinal(i)} stage, {n:,}" for i, n in enumerate(facts.num_samples.values())]
    rows = [
        (
            name,
            *(f"{shares.get(name, 0):.0%}" for shares in facts.mixtures.values()),
            _task_summary(name),
        )
        for name in names
    ]
    return _render_table(("task", *stages, "content"), rows)


def _render_training(settings: Mapping[str, Mapping[str, Any]]) -> str:
    names = dict.fromkeys(name for values in settings.values() for name in values)
    rows = [(name, *(values.get(name, "") for values in settings.values())) for name in names]
    return _render_table(("setting", *(f"{_ordinal(i)} stage" for i in range(len(settings)))), rows)


def _ordinal(index: int) -> str:
    return ("first", "second", "third", "fourth")[index]


def _task_summary(task: str) -> str:
    """Return the content of a task: the first sentence of its docstring, without the verb."""
    docstring = inspect.getdoc(TASK_GENERATORS[task])
    assert docstring, f"the task {task} has no docstring"
    sentence = " ".join(docstring.partition("\n\n")[0].split()).partition(". ")[0]
    content = sentence.removeprefix("Generate ").rstrip(".")
    return content[0].upper() + content[1:]


def _render_seconds(stages: Mapping[str, float]) -> str:
    build_stages = {name: seconds for name, seconds in stages.items() if name != EVAL_STAGE}
    parts = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in build_stages.items())
    eval_text = f", and evaluation in {stages[EVAL_STAGE]:.0f} s," if EVAL_STAGE in stages else ""
    return f"{sum(build_stages.values()) / 60:.1f} minutes ({parts}){eval_text}"


def _render_fonts() -> str:
    rows = [
        (family.name, family.license, "evaluation" if family.is_unseen else "training")
        for family in FONT_FAMILIES
    ]
    rows += [(name, license_name, "formulas") for name, license_name in MATHTEXT_LICENSES.items()]
    return _render_table(("fonts", "license", "used for"), rows)


def _render_table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def read_facts(path: Path) -> ModelCardFacts:
    """Read FACTS.json. Raises UserError if the file is invalid."""
    try:
        return ModelCardFacts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}",
            where=str(path),
            expected="the facts that pretraining/model_card.py lists",
            remedy="correct the file",
        ) from error


def main() -> int:
    """Write the model card from a facts file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("facts", type=Path)
    parser.add_argument("card", type=Path)
    args = parser.parse_args()
    try:
        write_file(args.card, render_card(read_facts(args.facts)).encode())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
