"""A model measured on held-out samples by what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from finesight.config import Eval, Metric
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.evaluate.answered import Case, Scores, note_lines, truths_of
from finesight.evaluate.proportions import Interval
from finesight.evaluate.saved import line_of
from finesight.evaluate.score import check_truths, headline_of, score
from finesight.infer.predict import Prediction, predict
from finesight.model.any_family import AnyModel
from finesight.storage import write_file

LISTED = 10
"""Most lines of details in a table."""


Answers = tuple[list[Prediction], dict[int, str]]
"""Predictions in the order of the samples, and why those of others are missing, by the index of
their sample."""

Ask = Callable[[Sequence[Located]], Answers]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of a set of held-out samples, and every answer behind them.

    `scores` holds the task's figures and `stopped`, the share of answers that ended by themselves.
    `intervals` holds the 95 % interval of each, None where there is none; `notes` say why, or warn
    about a figure. `headline` names the one that stands for all (higher is better), `details` is
    what the task says beyond figures. `unreadable` are (sample id, reason) of those whose pictures
    could not be read: they are in no figure.
    """

    metric: Metric
    headline: str
    scores: Scores
    predictions: tuple[Prediction, ...]
    unreadable: tuple[tuple[str, str], ...]
    intervals: dict[str, Interval | None]
    details: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The figures alone, for machines."""
        return {
            "metric": self.metric,
            "samples": len(self.predictions),
            "unreadable": len(self.unreadable),
            "headline": self.headline,
            "scores": self.scores,
            "intervals": self.intervals,
            "notes": self.notes,
            "details": self.details,
        }

    def as_table(self) -> str:
        """The figures for people, the headline marked."""
        left_out = f", {len(self.unreadable)} left out" if self.unreadable else ""
        rows = [
            f"{name + ('*' if name == self.headline else ''):<18}  {value:8.4f}"
            f"   {_between(self.intervals[name])}"
            for name, value in self.scores.items()
        ]
        head = f"{self.metric}: {len(self.predictions)} samples{left_out}, with 95 % intervals"
        notes = note_lines(self.notes)
        return "\n".join([head, *rows, *notes, *_noted(self.details), *_cut(self.predictions)])


def _between(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.4f} to {interval.high:.4f}"


def _cut(predictions: Sequence[Prediction]) -> list[str]:
    """Whether answers of a model that thinks never began."""
    cut = sum(bool(p.thought) and not p.answer and not p.stopped for p in predictions)
    end = "ended before the thought did: raise eval.max_new_tokens (--max-new-tokens)"
    return [f"{cut} of {len(predictions)} answers {end}"] if cut else []


def _noted(details: dict[str, Any]) -> list[str]:
    """The classes taken for another one most often, and the fields that are read worst."""
    taken = [(r, s, n) for r, s, n in details.get("confusion", []) if r != s][:LISTED]
    lines = [f"{right!r} taken for {said!r}: {count}" for right, said, count in taken]
    fields = sorted(details.get("fields", {}).items(), key=lambda pair: float(pair[1]["f1"]))
    return lines + [f"field {name}: f1 {row['f1']:.4f}" for name, row in fields[:LISTED]]


def evaluate(
    model: AnyModel,
    renderer: Rendering,
    samples: Sequence[Located],
    settings: Eval,
    out: Path | None = None,
    advance: Callable[[int], None] | None = None,
    fewer: Callable[[int], None] | None = None,
    spread: Callable[[Ask], Ask] | None = None,
) -> Evaluation:
    """Answer held-out samples, score the answers, and write each to `out` as a line of JSON.

    Takes the first `settings.limit` samples. The model is left in the mode it was in. `advance` is
    told after each token how many answers ended with it, and may raise to stop; `fewer`, how many
    at once are tried where a GPU's memory is full. `spread` makes of asking here asking in several
    processes, each a share. Raises UserError for no samples, samples without
    an answer, answers that the metric cannot compare, and when not one sample could be read.
    """
    chosen = list(islice(samples, settings.limit))
    if not chosen:
        raise UserError(
            f"{len(chosen)} samples to measure on",
            where="evaluation data",
            expected="at least one sample with an answer",
            remedy="give held-out samples, such as `finesight data import --eval-last` leaves",
        )
    thinks = renderer.thinks
    truths = [truths_of(sample.sample, thinks=thinks) for sample in chosen]
    check_truths(settings.metric, truths)
    ask = partial(_answers, model, renderer, settings, advance, fewer)
    predictions, unreadable = (spread(ask) if spread else ask)(chosen)
    if not predictions:
        raise UserError(
            f"not one of {len(chosen)} samples has a picture that can be read",
            where="evaluation data",
            expected="whole pictures",
            remedy=f"the first one says: {unreadable[0]}",
        )
    readable = [truth for i, truth in enumerate(truths) if i not in unreadable]
    cases = [
        Case(prediction.answer, prediction.boxes, *truth, prediction.id, prediction.stopped)
        for prediction, truth in zip(predictions, readable, strict=True)
    ]
    scored = score(settings.metric, cases)
    if out is not None:
        lines = [line_of(*row) for row in zip(predictions, cases, scored.each, strict=True)]
        write_file(out, "".join(lines).encode())
    return Evaluation(
        metric=settings.metric,
        headline=headline_of(settings.metric, scored.scores),
        scores=scored.scores,
        predictions=tuple(predictions),
        unreadable=tuple((chosen[i].sample.id, reason) for i, reason in sorted(unreadable.items())),
        intervals=scored.intervals(),
        details=scored.details,
        notes=scored.notes(),
    )


def _answers(
    model: AnyModel,
    renderer: Rendering,
    settings: Eval,
    advance: Callable[[int], None] | None,
    fewer: Callable[[int], None] | None,
    samples: Sequence[Located],
) -> Answers:
    unreadable: dict[int, str] = {}

    def set_aside(index: int, error: DamagedPicture) -> None:
        unreadable[index] = str(error).splitlines()[0]

    predictions = predict(
        model,
        renderer,
        samples,
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
        advance=advance,
        damaged=set_aside,
        fewer=fewer,
    )
    return predictions, unreadable
