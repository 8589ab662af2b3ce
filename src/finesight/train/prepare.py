"""From a recipe to everything that a run needs, checked before anything is written."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finesight import __version__
from finesight.config import Recipe
from finesight.digests import digest
from finesight.encode.pack import PackedBatch, filled
from finesight.encode.rendering import Rendering
from finesight.evaluate import own
from finesight.evaluate.score import task_of
from finesight.infer.load import resolve_device, resolve_precision
from finesight.manifest import Manifest
from finesight.model.adapter import WEIGHTS as ADAPTER_WEIGHTS
from finesight.model.adapter import continue_adapter
from finesight.model.any_family import AnyModel, load_any
from finesight.model.fallback import LIMITS, FallbackModel
from finesight.model.fp8 import refuse_device
from finesight.model.lora import stacked
from finesight.model.network import VisionLanguageModel
from finesight.model.nf4 import bitsandbytes
from finesight.model.parts import apply_tuning
from finesight.model.qwen_vl import SquareTower
from finesight.train.base import Base, base_of
from finesight.train.budget import Budget
from finesight.train.checkpoint import Checkpoints, Progress, State, Tensors, check_identity
from finesight.train.course import Course, InOrder
from finesight.train.flops import Arithmetic, Uncounted, measured_peak
from finesight.train.image_record import (
    ImageStates,
    check_images,
    load_image_record,
    reported_damage,
)
from finesight.train.loader import Split, StepData
from finesight.train.moved import Watch
from finesight.train.optimizer import LossScale, Masters
from finesight.train.parallel import Parallel, share_model
from finesight.train.progress import Screen
from finesight.train.ranks import ALONE, Ranks
from finesight.train.recorded import Passes
from finesight.train.run import Run
from finesight.train.schedule import Schedule
from finesight.train.shares import shared
from finesight.train.texts import Texts, texts_of
from finesight.train.workers import default_workers

ANYTHING = {
    *("workers", "cache", "parallel", "pack_tokens", "recompute"),
    *("keep", "save_every", "device", "precision"),
}
"""Settings of `train` that a resumed run may change: they touch nothing that is computed, but for
`pack_tokens`, which moves drop-outs."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes, in which type, with how many processes reading, and as which of several."""

    device: torch.device
    dtype: torch.dtype
    workers: int
    peak: float
    ranks: Ranks = ALONE

    @property
    def precision(self) -> str:
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return names[self.dtype]


@dataclass(frozen=True, slots=True)
class Session:
    """Everything a run works with."""

    recipe: Recipe
    run: Run
    machine: Machine
    base: Base
    renderer: Rendering
    train: Texts
    held_out: Texts | None
    course: Course
    data: StepData
    model: AnyModel
    parallel: Parallel
    masters: Masters
    passes: Passes
    watch: Watch
    scale: LossScale
    schedule: Schedule
    arithmetic: Arithmetic | Uncounted
    identity: dict[str, Any]
    progress: Progress

    def agree(self) -> None:
        """Raises UserError where other processes are about to learn something else, or otherwise:
        each would wait for what the others do not do."""
        train = self.recipe.train.model_dump(mode="json")
        alike = {name: train[name] for name in ("parallel", "pack_tokens", "recompute")}
        images = {split: states.digest for split, states in self.images().items()}
        self.machine.ranks.same(self.identity | alike | {"images": images})

    def images(self) -> dict[str, ImageStates]:
        """Return the fingerprints of the images of each split."""
        return _images(self.train, self.held_out)

    @property
    def together(self) -> Ranks:
        """The processes that have to come together for whatever takes the whole model: this one
        alone, where it has all of it."""
        return self.machine.ranks if self.parallel.sharded else ALONE

    @property
    def most_alone(self) -> int | None:
        """Tokens of the longest sample that one process learns alone; None where none is split."""
        members = self.data.within(self.progress.budget.pack_tokens).members
        return members.most_alone if isinstance(members, Split) else None

    def held_out_data(self, pack_tokens: int) -> StepData | None:
        """This process's held-out samples in steps of the training's batch, in packs of at most so
        many tokens. What they begin with is computed for each: outside of training, a family may
        compute a token by the length of its sample (`model.qwen_language`)."""
        if self.held_out is None:
            return None
        own = self.machine.ranks.own(self.held_out.survey.kept)
        members = InOrder(own, self.recipe.train.batch)
        return self.held_out.in_steps(self.renderer, members, pack_tokens, self.recipe.data)

    def placed(self, packed: PackedBatch) -> PackedBatch:
        """The pack as a step or the held-out loss computes it: on the device, and filled up where
        that is faster."""
        packed = self.parallel.passable(packed)
        if self.even and packed.share is None and not isinstance(self.model, FallbackModel):
            return filled(packed, merge_filled(self.model))
        return packed.to(self.machine.device)

    @property
    def even(self) -> bool:
        """Whether sizes are filled up: where a CPU computes in 16 bits, since oneDNN builds its
        kernels anew for every new shape."""
        return self.machine.device.type == "cpu" and self.machine.dtype != torch.float32

    def forget_gradients(self) -> None:
        """Drop those of a step that is not taken."""
        self.masters.forget_gradients()
        self.parallel.forget()

    def load(self, values: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Continue from what a checkpoint holds."""
        self.masters.load(self.parallel.own(values), self.parallel.own(moments))
        self.parallel.moved()

    def keep_within(self, budget: Budget) -> None:
        """Learn within this budget from here on."""
        self.progress.budget = budget
        self.model.recompute = budget.recompute

    def state(self) -> State:
        """What a checkpoint keeps beside tensors."""
        step = self.progress.step
        return State(
            step=step,
            samples=min(step * self.recipe.train.batch, self.course.samples),
            measured=self.progress.measured,
            best=self.progress.best,
            loss_scale=self.scale.state(),
            budget=self.progress.budget,
            void=self.progress.void,
            void_in_a_row=self.progress.void_in_a_row,
            identity=self.identity,
        )

    def manifest(self) -> Manifest:
        """What evaluation, prediction and merging will read."""
        return Manifest(
            family=self.base.folder.family,
            base=self.base.name,
            base_fingerprint=self.base.folder.fingerprint(),
            picture=self.renderer.rule,
            system=self.renderer.system,
            end_token=self.renderer.tokenizer.name_of(self.renderer.end_ids[0]),
            tune=self.recipe.tune,
            versions=versions(),
        )


def merge_filled(model: VisionLanguageModel) -> int | None:
    """Patches of a side that become one feature, where pictures may be filled up: None for a tower
    whose pictures all have one size."""
    return None if isinstance(model.visual, SquareTower) else model.geometry.vision.merge


def versions() -> dict[str, str]:
    """What computes, by name."""
    return {
        "finesight": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def prepare(
    recipe: Recipe, run: Run, screen: Screen, resume: bool, ranks: Ranks = ALONE
) -> Session:
    """Load and check everything, and continue from the newest checkpoint when resuming.

    The small files come first, so that a mistake shows in seconds and not after the weights.
    """
    if recipe.tune.nf4:
        bitsandbytes("tune.nf4")
    machine = _machine(recipe, ranks)
    if recipe.tune.fp8:
        refuse_device(machine.device, "tune.fp8")
    base = base_of(recipe)
    renderer = base.renderer(recipe)
    if recipe.eval is not None and recipe.data.eval:
        task_of(own.found(recipe.eval.metric, recipe.output))  # a faulty metric is told first
    train, held_out = texts_of(recipe, renderer, machine.workers, screen)
    course = Course(train.corpus, train.survey.kept, recipe.train)
    schedule = Schedule(recipe.train, len(course))
    identity = _identity(recipe, machine, base, renderer, train, held_out)
    checkpoints = Checkpoints(run.checkpoints, recipe.train.keep)
    found = _newest(checkpoints, machine.ranks, resume, screen)
    if found is not None:
        with machine.ranks.confirmed():
            if machine.ranks.first:
                _check_images(run, found[0], identity, train, held_out, screen)
        _check_began(found[0], identity, checkpoints)
    model = _tuned(recipe, machine, base, screen)
    arithmetic = Uncounted() if isinstance(model, FallbackModel) else Arithmetic(model)
    glances = train.glances(renderer, recipe.data) if train.survey.whole else None
    members = shared(course, machine.ranks, glances, arithmetic, recipe.train.pack_tokens)
    rows = stacked(model)
    parallel = share_model(recipe, model, machine.dtype, machine.ranks)
    masters = Masters(parallel.learning, recipe.train, rows)
    if not (machine.ranks.alone or parallel.sharded):
        masters.sum_always()
    budget = Budget(pack_tokens=recipe.train.pack_tokens, recompute=recipe.train.recompute)
    session = Session(
        recipe=recipe,
        run=run,
        machine=machine,
        base=base,
        renderer=renderer,
        train=train,
        held_out=held_out,
        course=course,
        data=train.in_steps(
            renderer,
            members,
            recipe.train.pack_tokens,
            recipe.data,
            branched=not isinstance(model, FallbackModel),
        ),
        model=model.train(),
        parallel=parallel,
        masters=masters,
        passes=Passes(model, list(parallel.learning.values()), alone=not parallel.sharded),
        watch=Watch(model, masters.values()),
        scale=LossScale(active=machine.dtype == torch.float16),
        schedule=schedule,
        arithmetic=arithmetic,
        identity=identity,
        progress=Progress(budget),
    )
    session.keep_within(budget)
    if found is not None:
        _go_on(session, *found)
    _say_what_is_other(session, budget, screen)
    return session


def _images(train: Texts, held_out: Texts | None) -> dict[str, ImageStates]:
    splits = {"train": train.survey.images}
    return splits if held_out is None else splits | {"eval": held_out.survey.images}


def _check_images(
    run: Run,
    state: State,
    identity: Mapping[str, Any],
    train: Texts,
    held_out: Texts | None,
    screen: Screen,
) -> None:
    """Raises UserError where images have changed since the run began."""
    if not run.images.exists():
        screen.say(f"{run.images} is missing: images are not compared with those of the start")
        return
    recorded, damage = load_image_record(run.images), reported_damage(run.lines())
    for split, texts in (("train", train), ("eval", held_out)):
        # Of other data, samples have other indices; they are refused by their fingerprint.
        name = f"data.{split}"
        if texts and split in recorded and state.identity.get(name) == identity[name]:
            found = texts.survey.images
            where = recorded[split], run.images, damage
            check_images(split, texts.corpus, found, *where, screen.say)


def _check_began(state: State, identity: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """Raises UserError for a run that began otherwise than this one would."""
    # An older version may have kept what may change.
    left = {f"train.{name}" for name in ANYTHING}.difference(identity)
    began = {name: value for name, value in state.identity.items() if name not in left}
    check_identity(began, identity, checkpoints.path(state.step))


def _say_what_is_other(session: Session, asked: Budget, screen: Screen) -> None:
    """Than the recipe lets one expect."""
    if session.progress.budget != asked:
        unlike = session.progress.budget.unlike(asked)
        screen.say(f"as until here, {unlike}: these settings can only take less memory")
    most = session.most_alone
    if most is not None and any(seen.needed > most for seen in session.train.survey.glances):
        screen.say(f"samples of more than {most:,} tokens are split over all processes")


def _tuned(recipe: Recipe, machine: Machine, base: Base, screen: Screen) -> AnyModel:
    """The base's model, its parts ready to learn or to stay as the recipe says."""
    nf4, fp8 = recipe.tune.nf4 or (), recipe.tune.fp8 or ()
    model = load_any(base.folder, machine.dtype, machine.device, nf4, fp8=fp8)
    apply_tuning(model, recipe.tune, recipe.train.seed)
    if base.adapter is not None:
        continue_adapter(model, base.adapter, base=base.folder)
    if isinstance(model, FallbackModel):
        screen.say(f"{base.folder.family} {LIMITS}")
    return model


def _newest(
    checkpoints: Checkpoints, ranks: Ranks, resume: bool, screen: Screen
) -> tuple[State, Tensors, Tensors] | None:
    """Where a run that is resumed goes on. The first of several processes looks at every byte, the
    others take its word."""
    found = None
    with ranks.confirmed():
        if ranks.first and resume:
            found = checkpoints.newest(screen.say)
    told = ranks.everybodys("" if found is None else str(found[0].step))[0]
    if told and not ranks.first:
        found = checkpoints.opened(int(told), "start again with --resume")
    return found


def _go_on(session: Session, state: State, values: Tensors, moments: Tensors) -> None:
    session.load(values, moments)
    session.scale.load(state.loss_scale)
    progress = session.progress
    progress.step, progress.measured, progress.best = state.step, state.measured, state.best
    progress.void, progress.void_in_a_row = state.void, state.void_in_a_row
    if state.budget is not None:
        session.keep_within(state.budget.within(progress.budget))


def _machine(recipe: Recipe, ranks: Ranks) -> Machine:
    device = ranks.placed(resolve_device(recipe.train.device))
    dtype = resolve_precision(recipe.train.precision, device)
    workers = recipe.train.workers
    return Machine(
        device=device,
        dtype=dtype,
        workers=default_workers(device, ranks.beside) if workers is None else workers,
        peak=measured_peak(device, dtype),
        ranks=ranks,
    )


def _identity(
    recipe: Recipe,
    machine: Machine,
    base: Base,
    renderer: Rendering,
    train: Texts,
    held_out: Texts | None,
) -> dict[str, Any]:
    """What a resumed run must share with the run that began, by the name a user knows it by."""
    settings = {
        "model": base.folder.fingerprint(),
        "adapter": digest(base.adapter / ADAPTER_WEIGHTS) if base.adapter else None,
        "picture": renderer.rule.model_dump(mode="json"),
        "data.system": renderer.system,
        "data.max_length": recipe.data.max_length,
        "data.unusable": recipe.data.unusable,
        "train.precision": machine.precision,
    }
    for name, texts in (("train", train), ("eval", held_out)):
        kept = texts.usable if texts else ""
        settings[f"data.{name}"] = texts.corpus.fingerprint if texts else None
        settings[f"usable samples of data.{name}"] = hashlib.sha256(kept.encode()).hexdigest()
    tune = recipe.tune.model_dump(mode="json")
    settings |= {f"tune.{name}": value for name, value in tune.items()}
    chosen = recipe.train.model_dump(mode="json")
    settings |= {f"train.{name}": v for name, v in chosen.items() if name not in ANYTHING}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
