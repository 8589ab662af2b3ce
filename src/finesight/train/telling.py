"""What trackers are told of a run: its settings, figures, answers drawn, and what a person who is
not looking should hear of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finesight.evaluate.score import LOWER_IS_BETTER
from finesight.track.pictures import drawn
from finesight.track.tracking import Tracking
from finesight.train.finish import RunResult
from finesight.train.measure import Measured, history
from finesight.train.prepare import Session


class Telling:
    """Between the reporter of a run and its trackers; does nothing where there are none."""

    def __init__(self, session: Session, tracking: Tracking) -> None:
        self._session, self._tracking = session, tracking

    def began(self, facts: Mapping[str, Any]) -> None:
        """The run has begun or goes on, on what these facts say."""
        parallel = self._session.parallel
        self._tracking.begin({**facts, "numbers_that_learn": parallel.numbers})

    def step(self, figures: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl` about a step."""
        numbers = {name: value for name, value in figures.items() if isinstance(value, float)}
        rates = {f"learning_rate/{part}": rate for part, rate in figures["lr"].items()}
        self._tracking.figures(figures["step"], numbers | rates)
        if figures["void"]:
            text = f"step {figures['step']} had no finite loss or gradient; nothing has moved"
            self._tracking.alert("warning", "void step", text)
        if figures["jumped"]:
            text = f"the loss of step {figures['step']} has jumped to {figures['loss']:.4g}"
            self._tracking.alert("warning", "loss has jumped", text)

    def measured(self, measured: Measured, name: str) -> None:
        """A measurement that the run has noted, its answers in the file of this name."""
        if not self._tracking.on:
            return
        scores = {f"scores/{score}": value for score, value in measured.scores.items()}
        loss = {"held_out_loss": measured.held_out_loss}
        self._tracking.figures(measured.step, loss | scores)
        answers = self._session.run.predictions
        pictures = drawn(answers / "before.jsonl", answers / f"{name}.jsonl")
        self._tracking.pictures(measured.step, pictures)
        before = history(self._session.run)[0]
        if (text := _worse(before, measured)) is not None:
            self._tracking.alert("warning", "worse than before training", text)

    def finished(self, result: RunResult) -> None:
        """The run has come to its end."""
        text = f"{result.steps} steps"
        if result.before is not None and result.after is not None:
            name, before = _chief(result.before)
            _, after = _chief(result.after)
            text += f", {name} {before:.4f} before, {after:.4f} after"
        self._tracking.alert("info", "run finished", text)


def _chief(measured: Measured) -> tuple[str, float]:
    """The figure that a measurement is judged by."""
    if measured.headline is None:
        return "held_out_loss", measured.held_out_loss
    return measured.headline, measured.scores[measured.headline]


def _worse(before: Measured, now: Measured) -> str | None:
    """What has got worse since before the first step, if it has."""
    (name, old), (same, new) = _chief(before), _chief(now)
    if name != same or not (new > old if name in LOWER_IS_BETTER else new < old):
        return None
    return f"{name} {new:.4f} after {now.step} steps, {old:.4f} before"
