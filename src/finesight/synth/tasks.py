"""Generated tasks: endless, and each sample a function of task, seed and number alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import get_args

from finesight.errors import UserError
from finesight.synth import formulas, receipts, scenes, streets, texts
from finesight.synth.drawn import Drawn
from finesight.synth.fonts import Choice

TASKS: dict[str, Callable[[random.Random, Choice], Drawn]] = {
    "letters": texts.letters,
    "pieces": texts.pieces,
    "word": texts.word,
    "words": texts.words,
    "lines": texts.lines,
    "sign": texts.sign,
    "street": streets.street,
    "chinese": texts.chinese,
    "receipt": receipts.receipt,
    "formula": formulas.formula,
    "scene": scenes.scene,
    "crowd": scenes.crowd,
}
"""What draws each task. All but `formula` need Pillow alone; `chinese` needs a font with Chinese,
and every task that writes needs the fonts of its choice."""


PATIENCE = 500
"""Samples that may go by before a kind of question counts as never asked."""


@dataclass(frozen=True)
class Task:
    """A task by its name and the fonts that it writes in. Raises UserError for unknown names."""

    name: str
    fonts: Choice = "seen"

    def __post_init__(self) -> None:
        for what, name, known in (
            ("task", self.name, tuple(TASKS)),
            ("choice of fonts", self.fonts, get_args(Choice)),
        ):
            if name not in known:
                raise UserError(
                    f"no {what} {name!r}",
                    where="generated tasks",
                    expected=f"one of {', '.join(known)}",
                    remedy="correct the name",
                )


@dataclass(frozen=True)
class HeldOut:
    """A task, and which of its kinds of questions are measured."""

    task: Task
    kind: str


FIRST: dict[str, float] = {"letters": 0.4, "pieces": 0.3, "word": 0.15, "scene": 0.15}
"""Shares of the tasks at the beginning of pre-training. From letters a model soon learns that
there is something to read; from whole words alone it takes many times longer."""

MIXTURE: dict[str, float] = {
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
"""Shares of the tasks in the rest of pre-training."""

MOST_TURNS = 8
"""Questions about a picture of a mixture, at most: it is dearer to draw than they are to ask."""

HELD_OUT: dict[str, HeldOut] = {
    "words": HeldOut(Task("word"), "word"),
    "words in unseen fonts": HeldOut(Task("word", "unseen"), "word"),
    "word boxes": HeldOut(Task("words"), "find"),
    "word boxes in unseen fonts": HeldOut(Task("words", "unseen"), "find"),
    "word boxes among clutter": HeldOut(Task("street"), "find"),
    "formulas": HeldOut(Task("formula"), "formula"),
    "captions": HeldOut(Task("scene"), "describe"),
    "shape boxes": HeldOut(Task("scene"), "find_shapes"),
    "counts": HeldOut(Task("crowd"), "count"),
    "receipts": HeldOut(Task("receipt"), "receipt"),
    "chinese": HeldOut(Task("chinese"), "read"),
}
"""What is measured on a fresh seed, by what it is called in reports."""


def sample(task: Task, seed: int, index: int) -> Drawn:
    """Sample number `index` of the task: the same whenever and wherever it is drawn with the same
    fonts and releases of Pillow and matplotlib."""
    # A text as seed is hashed whole: neighbouring numbers have nothing in common.
    rng = random.Random(f"{task.name} {seed} {index}")
    return TASKS[task.name](rng, task.fonts)


def mixed(mixture: Mapping[str, float], seed: int, index: int, fonts: Choice = "seen") -> Drawn:
    """Sample number `index` of a mixture of tasks by their shares, with one to MOST_TURNS
    questions about it."""
    rng = random.Random(f"mixture {seed} {index}")
    name = rng.choices(list(mixture), list(mixture.values()))[0]
    return sample(Task(name, fonts), seed, index).with_more(rng.randrange(MOST_TURNS), rng)


def of_kind(task: Task, seed: int, kind: str | None) -> Iterator[tuple[int, Drawn]]:
    """The samples of the task that ask this kind of question (any for None), with their numbers.

    Raises UserError when PATIENCE samples in a row ask others.
    """
    others: set[str] = set()
    passed_over = 0
    for index in count():
        drawn = sample(task, seed, index)
        if kind in (None, drawn.kind):
            passed_over = 0
            yield index, drawn
            continue
        others.add(drawn.kind)
        passed_over += 1
        if passed_over == PATIENCE:
            raise UserError(
                f"no question of the kind {kind!r} in {PATIENCE} samples",
                where=f"generated tasks: {task.name}",
                expected=f"one of {', '.join(sorted(others))}",
                remedy="correct the kind, or choose the task that asks it",
            )
