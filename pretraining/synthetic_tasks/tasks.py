"""Synthetic tasks with unlimited samples, which are reproducible from task, seed and index."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import get_args

from finesight.errors import UserError
from synthetic_tasks import formulas, receipts, scene_questions, streets, text_images
from synthetic_tasks.fonts import FontSplit
from synthetic_tasks.synthetic_sample import SyntheticSample

TASK_GENERATORS: dict[str, Callable[[random.Random, FontSplit], SyntheticSample]] = {
    "letters": text_images.generate_letters,
    "pieces": text_images.generate_fragments,
    "word": text_images.generate_word,
    "words": text_images.generate_words,
    "lines": text_images.generate_lines,
    "sign": text_images.generate_sign,
    "street": streets.generate_street,
    "chinese": text_images.generate_chinese,
    "receipt": receipts.generate_receipt,
    "formula": formulas.generate_formula,
    "scene": scene_questions.generate_scene,
    "crowd": scene_questions.generate_crowd,
}
"""Functions that generate a sample, by task name.

All tasks except `formula` need only Pillow. The task `chinese` needs a Chinese font, and every
other task with text needs the fonts of its split.
"""


MAX_REJECTED_SAMPLES = 500
"""Number of consecutive samples without a question type after which the search stops."""


@dataclass(frozen=True)
class SyntheticTask:
    """A synthetic task, with the fonts of its texts.

    Raises:
        UserError: The task name or the font split is unknown.
    """

    name: str
    font_split: FontSplit = "seen"

    def __post_init__(self) -> None:
        for field_name, name, known in (
            ("task", self.name, tuple(TASK_GENERATORS)),
            ("choice of fonts", self.font_split, get_args(FontSplit)),
        ):
            if name not in known:
                raise UserError(
                    f"no {field_name} {name!r}",
                    where="generated tasks",
                    expected=f"one of {', '.join(known)}",
                    remedy="correct the name",
                )


@dataclass(frozen=True)
class EvalTask:
    """A synthetic task and the question type to evaluate."""

    task: SyntheticTask
    task_kind: str


WARMUP_MIXTURE: dict[str, float] = {"letters": 0.4, "pieces": 0.3, "word": 0.15, "scene": 0.15}
"""Task weights at the start of pretraining.

Training on single letters first is many times faster than starting with complete words.
"""

MAIN_MIXTURE: dict[str, float] = {
    "letters": 0.02,
    "pieces": 0.04,
    "word": 0.14,
    "words": 0.12,
    "lines": 0.05,
    "sign": 0.04,
    "street": 0.03,
    "chinese": 0.04,
    "receipt": 0.06,
    "formula": 0.34,
    "scene": 0.10,
    "crowd": 0.02,
}
"""Task weights of pretraining after the first phase."""

MAX_TURNS = 8
"""Maximum number of questions per image in a task mixture.

Several questions share an image, because images are more expensive than questions.
"""

EVAL_TASKS: dict[str, EvalTask] = {
    "words": EvalTask(SyntheticTask("word"), "word"),
    "words in unseen fonts": EvalTask(SyntheticTask("word", "unseen"), "word"),
    "word boxes": EvalTask(SyntheticTask("words"), "find"),
    "word boxes in unseen fonts": EvalTask(SyntheticTask("words", "unseen"), "find"),
    "word boxes among clutter": EvalTask(SyntheticTask("street"), "find"),
    "formulas": EvalTask(SyntheticTask("formula"), "formula"),
    "captions": EvalTask(SyntheticTask("scene"), "describe"),
    "shape boxes": EvalTask(SyntheticTask("scene"), "find_shapes"),
    "counts": EvalTask(SyntheticTask("crowd"), "count"),
    "receipts": EvalTask(SyntheticTask("receipt"), "receipt"),
    "chinese": EvalTask(SyntheticTask("chinese"), "read"),
}
"""Evaluation tasks by their name in reports.

They use a seed that training does not use.
"""


def generate_sample(task: SyntheticTask, seed: int, index: int) -> SyntheticSample:
    """Generate the sample of a task with the given seed and index.

    It is reproducible with the same fonts and the same versions of Pillow and matplotlib.
    """
    # A text seed is hashed: adjacent indices give independent samples.
    rng = random.Random(f"{task.name} {seed} {index}")
    return TASK_GENERATORS[task.name](rng, task.font_split)


def generate_mixture_sample(
    mixture: Mapping[str, float], seed: int, index: int, font_split: FontSplit = "seen"
) -> SyntheticSample:
    """Generate a sample of a weighted task mixture, with one to MAX_TURNS questions."""
    rng = random.Random(f"mixture {seed} {index}")
    name = rng.choices(list(mixture), list(mixture.values()))[0]
    return generate_sample(SyntheticTask(name, font_split), seed, index).add_questions(
        rng.randrange(MAX_TURNS), rng
    )


def iter_samples_of_kind(
    task: SyntheticTask, seed: int, task_kind: str | None
) -> Iterator[tuple[int, SyntheticSample]]:
    """Yield the samples of a task that have a question type, with their indices.

    Args:
        task: Synthetic task.
        seed: Seed of the task.
        task_kind: Question type of the first question; None for all types.

    Raises:
        UserError: MAX_REJECTED_SAMPLES consecutive samples have other question types.
    """
    other_kinds: set[str] = set()
    num_rejected = 0
    for index in count():
        sample = generate_sample(task, seed, index)
        if task_kind in (None, sample.task_kind):
            num_rejected = 0
            yield index, sample
            continue
        other_kinds.add(sample.task_kind)
        num_rejected += 1
        if num_rejected == MAX_REJECTED_SAMPLES:
            raise UserError(
                f"no question of the kind {task_kind!r} in {MAX_REJECTED_SAMPLES} samples",
                where=f"generated tasks: {task.name}",
                expected=f"one of {', '.join(sorted(other_kinds))}",
                remedy="correct the kind, or choose the task that asks it",
            )
