"""A run measured on held-out samples: by its loss, and by what it answers."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from finesight.errors import UserError
from finesight.evaluate.evaluate import evaluate
from finesight.train.loader import Advance, Dropped, read_steps
from finesight.train.loss import label_loss
from finesight.train.optimizer import not_finite
from finesight.train.prepare import Session
from finesight.train.progress import Screen
from finesight.train.stop import Stop


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures after so many finished steps: loss per learned token in nats, and scores by name
    where the recipe asks for a metric."""

    step: int
    held_out_loss: float
    scores: dict[str, float]
    headline: str | None

    def as_json(self) -> dict[str, Any]:
        """A line of `metrics.jsonl`."""
        return {
            "step": self.step,
            "held_out_loss": self.held_out_loss,
            "scores": self.scores,
            "headline": self.headline,
        }

    @classmethod
    def read(cls, line: dict[str, Any]) -> Measured | None:
        """The measurement that a line of `metrics.jsonl` holds, if it does."""
        if "held_out_loss" not in line:
            return None
        return cls(line["step"], line["held_out_loss"], line["scores"], line["headline"])


def measure(session: Session, name: str, screen: Screen, stop: Stop) -> Measured:
    """Loss over all usable held-out samples, and answers to those that the recipe's limit leaves,
    which go to `predictions/NAME.jsonl`. The model is left in training mode.

    Raises Interrupted when the run was asked to stop on the way.
    """
    assert session.held_out is not None, "nothing to measure on"
    kept = session.held_out.survey.kept
    with screen.stage(f"held-out loss {name}", len(kept)) as advance:
        loss, dropped = held_out_loss(session, advance, stop)
    if dropped:
        screen.say(
            f"{len(dropped)} held-out samples left out, {dropped[0].id}: {dropped[0].reason}"
        )
    step, settings = session.progress.step, session.recipe.eval
    if settings is None:
        return Measured(step, loss, {}, None)
    samples = [session.held_out.corpus[index] for index in kept[: settings.limit]]
    with screen.stage(f"answers {name}", len(samples)) as advance:

        def answered(count: int) -> None:
            advance(count)
            stop.check()

        out = session.run.predictions / f"{name}.jsonl"
        result = evaluate(session.model, session.renderer, samples, settings, out, answered)
    return Measured(step, loss, dict(result.scores), result.headline)


@torch.no_grad()
def held_out_loss(session: Session, advance: Advance, stop: Stop) -> tuple[float, list[Dropped]]:
    """Mean cross entropy per learned token over all usable held-out samples, dropout off, and the
    samples whose pictures turned out damaged. Raises UserError when these are all."""
    data, model, machine = session.held_out_data(), session.model, session.machine
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
                    batch = packed.to(machine.device)
                    total += label_loss(model(batch), model.head_weight, batch.target_L, one)
                    count += batch.supervised
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


def memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Not on every system; imported where it is used.
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
