"""A recipe read as far as a plan needs: small files, headers of pictures, shapes of the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from typing import get_args

from finesight.config import Precision, Quantisable, Recipe
from finesight.errors import UserError
from finesight.infer.load import cpu_precision
from finesight.model.parts import PARTS
from finesight.plan.answering import Answering, answering
from finesight.plan.choice import Chooser, Estimate, Setting, Steps
from finesight.plan.load import Load, steps_of
from finesight.plan.model import Sized, sized
from finesight.plan.seconds import start_seconds
from finesight.plan.target import Target, named_target, own_target
from finesight.train.base import base_of
from finesight.train.course import Course
from finesight.train.flops import Arithmetic
from finesight.train.progress import Screen
from finesight.train.survey import Survey
from finesight.train.texts import texts_of
from finesight.train.workers import MOST

SPARE = 1.3
"""Reading processes for each that is needed: pictures differ."""

BINS = 10
"""Bars of a histogram, about."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """How long samples are: `bars` are (first number of tokens, samples) of stretches as wide as
    `width`; the longest one's name and patches."""

    samples: int
    dropped: int
    tokens: int
    patches: int
    shortest: int
    median: float
    longest: int
    longest_id: str
    width: int
    bars: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take as its recipe is `written`, and with what was `chosen`. `operations` are
    those of a mean sample, by part; `features` the bytes of all pictures' features, where they are
    always the same; `words` set the recipe to what was chosen, `less` says what
    else would take less memory."""

    family: str
    numbers: int
    learning: int
    target: Target
    precision: str
    tokens: Tokens
    operations: Mapping[str, float]
    steps: int
    batch: int
    samples: int
    written: Estimate
    chosen: Estimate
    answering: Answering
    features: int | None
    workers: int
    start_s: float
    words: tuple[str, ...]
    less: tuple[str, ...]

    def seconds(self, estimate: Estimate) -> float:
        """Of all steps and measurements, without the start."""
        return self.steps * estimate.step.in_all + self.answering.seconds


def make_plan(recipe: Recipe, gpu: str | None, screen: Screen) -> Plan:
    """Read, count, estimate and choose; nothing is written.

    `gpu` names a card (`plan.cards`); without it this machine is measured. Raises UserError for
    what a run would refuse, for a card that is not known and a model without native code.
    """
    # A name that is not known is told before headers are read.
    written_on = _target(recipe, gpu, recipe.train.precision)
    base = base_of(recipe)
    renderer = base.renderer(recipe)
    train, held_out = texts_of(recipe, renderer, written_on.workers, screen)
    course = Course(train.corpus, train.survey.kept, recipe.train)
    steps = Steps([*steps_of(course, train.glances(renderer, recipe.data))], train.survey.beginning)
    on = _better(recipe, gpu, written_on)

    @lru_cache
    def on_chosen(nf4: tuple[Quantisable, ...]) -> Sized:
        return sized(base.folder, recipe, nf4, on)

    own = recipe.tune.nf4 or ()
    as_written = Setting(recipe.train.pack_tokens, float(recipe.train.recompute), own)
    few = _few(recipe, on_chosen)
    chooser = Chooser(on_chosen, steps, on.memory, few, grows=on.computing.cuda)
    chosen = chooser.estimate(chooser.best(as_written))
    if on is written_on:
        written = chooser.estimate(as_written)
    else:
        other = sized(base.folder, recipe, own, written_on)
        written = Chooser(lambda _: other, steps, on.memory, [own], grows=False).estimate(
            as_written
        )
    model = on_chosen(chosen.setting.nf4)
    measured = held_out.survey.glances if held_out is not None else ()
    answers = Answering(0, 0, 0.0, 0)
    if measured:
        answers = answering(recipe, model, on, measured, len(course))
    workers = _workers(recipe, chosen, on)
    return Plan(
        family=base.folder.family,
        numbers=model.numbers,
        learning=model.learning,
        target=on,
        precision=on.precision,
        tokens=_tokens(train.survey),
        operations=_operations(model, steps.timed(chosen.setting.pack_tokens)),
        steps=len(course),
        batch=recipe.train.batch,
        samples=course.samples,
        written=written,
        chosen=chosen,
        answering=answers,
        features=_features(model, train.survey.patches, on),
        workers=workers,
        start_s=start_seconds(model.stays, on),
        words=_words(recipe, as_written, chosen.setting, on, written_on, workers),
        less=_less(recipe),
    )


def _target(recipe: Recipe, gpu: str | None, precision: Precision) -> Target:
    if gpu is not None:
        return named_target(gpu, precision)
    return own_target(recipe.train.device, precision)


def _better(recipe: Recipe, gpu: str | None, written: Target) -> Target:
    """The same in bf16 where a processor multiplies it, which the recipe leaves open."""
    if written.computing.cuda or recipe.train.precision != "auto" or cpu_precision() == "fp32":
        return written
    return _target(recipe, gpu, "bf16")


def _few(
    recipe: Recipe, sized_with: Callable[[tuple[Quantisable, ...]], Sized]
) -> list[tuple[Quantisable, ...]]:
    """Parts in four bits: the recipe's own, then the decoder and all frozen parts beside it."""
    own = recipe.tune.nf4 or ()
    modes = {
        "language": recipe.tune.language,
        "vision": recipe.tune.vision,
        "merger": recipe.tune.merger,
    }
    found = [own]
    for parts in (("language",), ("vision", "merger", "language")):
        more = tuple(p for p in get_args(Quantisable) if p in own or p in parts)
        if more in found or any(modes.get(part) == "full" for part in more):
            continue
        try:
            sized_with(more)
        except UserError:
            # Experts, a published model in four bits, or no package that quantises.
            continue
        found.append(more)
    return found


def _workers(recipe: Recipe, chosen: Estimate, on: Target) -> int:
    """So many that reading keeps pace, within what the machine has; a run's default where that is
    more."""
    if not on.computing.cuda:
        return on.workers if recipe.train.workers is None else recipe.train.workers
    step = replace(chosen.step, reading=0.0).in_all
    now = on.workers if recipe.train.workers is None else recipe.train.workers
    needed = math.ceil(chosen.step.reading * max(1, now) / step * SPARE)
    return min(MOST, max(1, needed, now))


def _tokens(survey: Survey) -> Tokens:
    glances = survey.glances
    lengths = sorted(glance.tokens for glance in glances)
    width = _round_width((lengths[-1] - lengths[0]) / BINS)
    bars = Counter(length // width * width for length in lengths)
    first, last = min(bars), max(bars)
    longest = max(glances, key=lambda glance: glance.tokens)
    return Tokens(
        samples=len(survey.kept),
        dropped=len(survey.dropped),
        tokens=survey.tokens,
        patches=survey.patches,
        shortest=lengths[0],
        median=median(lengths),
        longest=lengths[-1],
        longest_id=longest.id,
        width=width,
        bars=tuple((start, bars[start]) for start in range(first, last + 1, width)),
    )


def _round_width(width: float) -> int:
    """1, 2 or 5 times a power of ten, at least that."""
    power: int = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)


def _operations(model: Sized, steps: Sequence[Sequence[Load]]) -> dict[str, float]:
    """Of a mean sample of these steps."""
    loads = [load for step in steps for load in step]
    counted = [*map(Arithmetic(model.model).by_part, loads)]
    number = sum(load.samples for load in loads)
    found = {part: sum(one.weights[part] for one in counted) / number for part in PARTS}
    attention = {
        "attention of tokens": sum(one.tokens for one in counted),
        "attention of patches": sum(one.patches for one in counted),
    }
    return found | {name: count / number for name, count in attention.items()}


def _features(model: Sized, patches: int, on: Target) -> int | None:
    """Bytes of the features of all training pictures, where they never change."""
    if not model.tower_is_frozen:
        return None
    tower = model.model.visual
    geometry = model.model.geometry.vision
    places = patches // geometry.merge**2
    return places * tower.features * geometry.out_width * on.dtype.itemsize


def _less(recipe: Recipe) -> tuple[str, ...]:
    found = ["smaller pictures", "a smaller model"]
    if recipe.train.optimizer == "adamw":
        found.append("train.optimizer=adamw8bit")
    if recipe.tune.uses("full"):
        found.append("lora in place of full")
    return tuple(found)


def _words(
    recipe: Recipe,
    written: Setting,
    chosen: Setting,
    on: Target,
    written_on: Target,
    workers: int,
) -> tuple[str, ...]:
    """Settings that differ from the recipe's, as `finesight train` takes them."""
    words = []
    if chosen.pack_tokens != written.pack_tokens:
        words.append(f"train.pack_tokens={chosen.pack_tokens}")
    if chosen.recompute != written.recompute:
        share = {0.0: "false", 1.0: "true"}.get(chosen.recompute, f"{chosen.recompute:g}")
        words.append(f"train.recompute={share}")
    if chosen.nf4 != written.nf4:
        words.append(f"tune.nf4=[{','.join(chosen.nf4)}]")
    if on.dtype != written_on.dtype:
        words.append(f"train.precision={on.precision}")
    if workers != (on.workers if recipe.train.workers is None else recipe.train.workers):
        words.append(f"train.workers={workers}")
    return tuple(words)
