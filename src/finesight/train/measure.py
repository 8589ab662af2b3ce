"""A run measured on held-out samples: by its loss, and by what it answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.evaluate.bootstrap import Interval
from finesight.evaluate.evaluate import evaluate
from finesight.train.budget import Budget, too_many, too_much, within_memory
from finesight.train.loader import Dropped, read_steps
from finesight.train.loss import label_loss
from finesight.train.optimizer import not_finite
from finesight.train.prepare import Session
from finesight.train.progress import Advance, Screen
from finesight.train.run import Run
from finesight.train.stop import Stop


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures after so many finished steps: loss per learned token in nats and, where the recipe
    asks for a metric, scores by name with their intervals and what the task says beyond them."""

    step: int
    held_out_loss: float
    scores: dict[str, float]
    headline: str | None
    intervals: dict[str, Interval] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The headline's value."""
        return None if self.headline is None else self.scores[self.headline]

    def as_json(self) -> dict[str, Any]:
        """A line of `metrics.jsonl`."""
        return {
            "step": self.step,
            "held_out_loss": self.held_out_loss,
            "scores": self.scores,
            "headline": self.headline,
            "intervals": self.intervals,
            "details": self.details,
        }

    @classmethod
    def read(cls, line: dict[str, Any]) -> Measured | None:
        """The measurement that a line of `metrics.jsonl` holds, if it does."""
        if "held_out_loss" not in line:
            return None
        intervals = {name: Interval(*ends) for name, ends in line.get("intervals", {}).items()}
        figures = line["step"], line["held_out_loss"], line["scores"], line["headline"]
        return cls(*figures, intervals, line.get("details", {}))


def history(run: Run) -> list[Measured]:
    """The measurements of a run so far, the one before its first step first."""
    return [m for line in run.lines() if (m := Measured.read(line)) is not None]


def waited(measured: Sequence[Measured]) -> int:
    """How many measurements have passed since the best one of the trained model: by its headline
    and, where that is equal, by the loss. What came before the first step does not count: a run
    may fall below its base and climb past it."""
    named = [one for one in measured if one.step and one.headline == measured[-1].headline]
    ranks = [(one.score, -one.held_out_loss) for one in named if one.score is not None]
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0


def measure(session: Session, name: str, screen: Screen, stop: Stop) -> Measured:
    """Loss over all usable held-out samples, and answers to those that the recipe's limit leaves,
    which go to `predictions/NAME.jsonl`. The model is left in training mode.

    Raises Interrupted when the run was asked to stop on the way, and FullMemory when one sample at
    a time is too much for the GPU's.
    """
    assert session.held_out is not None, "nothing to measure on"
    kept = session.held_out.survey.kept

    def loss_within(budget: Budget) -> tuple[float, list[Dropped]]:
        with screen.stage(f"held-out loss {name}", len(kept)) as advance:
            return held_out_loss(session, budget, advance, stop)

    budget, device = session.progress.budget, session.machine.device
    loss, dropped = within_memory(budget, device, screen.say, loss_within)
    if dropped:
        screen.say(
            f"{len(dropped)} held-out samples left out, {dropped[0].id}: {dropped[0].reason}"
        )
    step, settings = session.progress.step, session.recipe.eval
    if settings is None:
        return Measured(step, loss, {}, None)
    samples = [session.held_out.corpus[index] for index in kept[: settings.limit]]
    metric = own.found(settings.metric, session.run.folder)
    model, renderer = session.model, session.renderer

    def fewer(batch: int) -> None:
        screen.say(f"the GPU's memory is full: going on with {batch} answers at once (eval.batch)")

    with screen.stage(f"answers {name}", len(samples)) as advance:

        def answered(count: int) -> None:
            advance(count)
            stop.check()

        out = session.run.predictions / f"{name}.jsonl"
        chosen = settings.model_copy(update={"metric": metric})
        try:
            result = evaluate(model, renderer, samples, chosen, out, answered, fewer)
        except torch.OutOfMemoryError as error:
            raise too_many(error) from None
    scores, headline = result.scores, result.headline
    return Measured(step, loss, scores, headline, result.intervals, result.details)


@torch.no_grad()
def held_out_loss(
    session: Session, budget: Budget, advance: Advance, stop: Stop
) -> tuple[float, list[Dropped]]:
    """Mean cross entropy per learned token over all usable held-out samples, dropout off, and the
    samples whose pictures turned out damaged. Raises UserError when these are all, and FullMemory
    when a pack is too much for the GPU's."""
    data, model = session.held_out_data(budget.pack_tokens), session.model
    machine = session.machine
    assert data is not None, "nothing to measure on"
    total = torch.zeros((), device=machine.device, dtype=torch.float64)
    one = torch.ones((), device=machine.device)
    count = 0
    dropped: list[Dropped] = []
    model.eval()
    try:
        reading = read_steps(data, 0, machine.workers, machine.device.type == "cuda")
        with closing(reading) as steps:
            for step in steps:
                stop.check()
                for packed in step.packs:
                    try:
                        total += _loss(session, packed, one)
                    except torch.OutOfMemoryError as error:
                        raise too_much(error, packed, budget, learning=False) from None
                    count += packed.supervised
                dropped += step.dropped
                advance(step.samples + len(step.dropped))
    finally:
        model.train()
    if not count:
        raise UserError(
            f"not one of {len(dropped)} samples has a picture that can be decoded",
            where="data.eval",
            expected="whole pictures",
            remedy=f"the first one says: {dropped[0].reason}",
        )
    loss = total.item() / count
    if not math.isfinite(loss):
        raise not_finite(loss, "held-out loss", session.progress.step)
    return loss, dropped


def _loss(session: Session, packed: PackedBatch, one: Tensor) -> Tensor:
    """Of a pack, summed. Its own function: what it holds on the device ends with it."""
    model, batch = session.model, session.placed(packed)
    return label_loss(model(batch), model.head_weight, batch.target_L, one)


def memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Not on every system; imported where it is used.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
