"""A run measured on held-out samples: by its loss, and by what it answers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor

from finesight.config import Eval
from finesight.data.jsonl import Located
from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.evaluate.evaluate import Answers, Ask, Evaluation, evaluate
from finesight.evaluate.proportions import Interval
from finesight.infer.predict import Prediction
from finesight.train.budget import Budget, too_many, too_much, within_memory
from finesight.train.loader import Dropped, read_steps
from finesight.train.loss import label_loss
from finesight.train.optimizer import not_finite
from finesight.train.prepare import Session
from finesight.train.progress import Advance, Screen
from finesight.train.ranks import Ranks
from finesight.train.run import Run
from finesight.train.stop import Stop


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures after so many finished steps: loss per learned token in nats and, where the recipe
    asks for a metric, scores by name with their intervals and what the task says beyond them.
    `notes` say why a score has no interval (None), or warn about it."""

    step: int
    held_out_loss: float
    scores: dict[str, float]
    headline: str | None
    intervals: dict[str, Interval | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

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
            "notes": self.notes,
        }

    @classmethod
    def read(cls, line: dict[str, Any]) -> Measured | None:
        """The measurement that a line of `metrics.jsonl` holds, if it does."""
        if "held_out_loss" not in line:
            return None
        intervals = {
            name: Interval(*ends) if ends else None
            for name, ends in line.get("intervals", {}).items()
        }
        figures = line["step"], line["held_out_loss"], line["scores"], line["headline"]
        return cls(*figures, intervals, line.get("details", {}), line.get("notes", {}))


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
    which go to `predictions/NAME.jsonl`. The model is left in training mode. Of several processes
    each takes a share of the samples, all come to the same figures, and the first one writes.

    Raises Interrupted when the run was asked to stop on the way, and FullMemory when one sample at
    a time is too much for the GPU's.
    """
    assert session.held_out is not None, "nothing to measure on"
    kept, ranks = session.held_out.survey.kept, session.machine.ranks

    def loss_within(budget: Budget) -> Summed:
        with screen.stage(f"held-out loss {name}", len(ranks.own(kept))) as advance:
            return held_out_loss(session, budget, advance, stop)

    budget, device = session.progress.budget, session.machine.device
    with session.parallel.whole():
        with ranks.confirmed():
            summed = within_memory(budget, device, screen.say, loss_within)
        loss = _mean(session, summed, screen)
        step, settings = session.progress.step, session.recipe.eval
        if settings is None:
            return Measured(step, loss, {}, None)
        samples = [session.held_out.corpus[index] for index in kept[: settings.limit]]
        result = _answered(session, settings, samples, name, screen, stop)
    return Measured(
        step,
        loss,
        result.scores,
        result.headline,
        result.intervals,
        result.details,
        result.notes,
    )


def _answered(
    session: Session,
    settings: Eval,
    samples: Sequence[Located],
    name: str,
    screen: Screen,
    stop: Stop,
) -> Evaluation:
    metric, ranks = own.found(settings.metric, session.run.folder), session.machine.ranks

    def fewer(batch: int) -> None:
        session.passes.forget()
        screen.say(f"the GPU's memory is full: going on with {batch} answers at once (eval.batch)")

    with screen.stage(f"answers {name}", len(ranks.own(samples))) as advance:

        def answered(count: int) -> None:
            advance(count)
            stop.check()

        return evaluate(
            session.model,
            session.renderer,
            samples,
            settings.model_copy(update={"metric": metric}),
            out=session.run.predictions / f"{name}.jsonl" if ranks.first else None,
            advance=answered,
            fewer=fewer,
            spread=partial(_spread, ranks),
        )


_ANSWERS: TypeAdapter[Answers] = TypeAdapter(Answers)


def _spread(ranks: Ranks, ask: Ask) -> Ask:
    """Asking in several processes, each its own samples: all of them get all answers."""

    def asked(samples: Sequence[Located]) -> Answers:
        mine = ranks.own(samples)
        with ranks.confirmed():
            try:
                answers = ask(mine) if mine else ([], {})
            except torch.OutOfMemoryError as error:
                raise too_many(error) from None
        if ranks.alone:
            return answers
        predictions: dict[int, Prediction] = {}
        unreadable: dict[int, str] = {}
        for number, told in enumerate(ranks.everybodys(_ANSWERS.dump_json(answers).decode())):
            found, missing = _ANSWERS.validate_json(told)
            places = range(number, len(samples), ranks.count)
            unreadable |= {places[index]: why for index, why in missing.items()}
            read = (place for index, place in enumerate(places) if index not in missing)
            predictions |= zip(read, found, strict=True)
        return [predictions[place] for place in sorted(predictions)], unreadable

    return asked


class Summed(NamedTuple):
    """The loss of some held-out samples in nats, summed over so many learned tokens, and those
    whose pictures turned out damaged."""

    loss: float
    tokens: int
    dropped: tuple[Dropped, ...]


def _mean(session: Session, own: Summed, screen: Screen) -> float:
    """The loss per learned token, of all processes. Raises UserError when all samples are
    damaged."""
    told = session.machine.ranks.everybodys(json.dumps(own))
    losses, tokens, all_dropped = zip(*map(json.loads, told), strict=True)
    dropped = [Dropped(*one) for some in all_dropped for one in some]
    if not sum(tokens):
        raise UserError(
            f"not one of {len(dropped)} samples has a picture that can be decoded",
            where="data.eval",
            expected="whole pictures",
            remedy=f"the first one says: {dropped[0].reason}",
        )
    loss: float = math.fsum(losses) / sum(tokens)
    if not math.isfinite(loss):
        raise not_finite(loss, "held-out loss", session.progress.step)
    if dropped:
        screen.say(
            f"{len(dropped)} held-out samples left out, {dropped[0].id}: {dropped[0].reason}"
        )
    return loss


@torch.no_grad()
def held_out_loss(session: Session, budget: Budget, advance: Advance, stop: Stop) -> Summed:
    """Cross entropy at the learned tokens of this process's usable held-out samples, dropout off.
    Raises FullMemory when a pack is too much for the GPU's."""
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
                        freed = session.passes.forget()
                        raise too_much(error, packed, budget, learning=False, freed=freed) from None
                    count += packed.supervised
                dropped += step.dropped
                advance(step.samples + len(step.dropped))
    finally:
        model.train()
    return Summed(total.item(), count, tuple(dropped))


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
