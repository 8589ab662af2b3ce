"""A model measured on held-out samples by what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from finesight.config import Eval, Metric
from finesight.data.headers import DamagedPicture
from finesight.data.jsonl import Located
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.evaluate.score import TASKS, Case, Scores, check_truths, score, truths_of
from finesight.infer.predict import Prediction, as_box, predict
from finesight.model.network import VisionLanguageModel
from finesight.storage import write_file


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of a set of held-out samples, and every answer behind them.

    `scores` holds the task's figures and `stopped`, the share of answers that ended by themselves;
    `headline` names the one that stands for all (higher is better). `unreadable` are (sample id,
    reason) of those whose pictures could not be read: they are in no figure.
    """

    metric: Metric
    headline: str
    scores: Scores
    predictions: tuple[Prediction, ...]
    unreadable: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """The figures alone, for machines."""
        return {
            "metric": self.metric,
            "samples": len(self.predictions),
            "unreadable": len(self.unreadable),
            "headline": self.headline,
            "scores": self.scores,
        }

    def as_table(self) -> str:
        """The figures for people, the headline marked."""
        left_out = f", {len(self.unreadable)} left out" if self.unreadable else ""
        rows = [
            f"{name + ('*' if name == self.headline else ''):<16}  {value:8.4f}"
            for name, value in self.scores.items()
        ]
        return "\n".join([f"{self.metric}: {len(self.predictions)} samples{left_out}", *rows])


def evaluate(
    model: VisionLanguageModel,
    renderer: Renderer,
    samples: Sequence[Located],
    settings: Eval,
    out: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answer held-out samples, score the answers, and write each to `out` as a line of JSON.

    Takes the first `settings.limit` samples. The model is left in the mode it was in. `advance` is
    told after each token how many answers ended with it, and may raise to stop. Raises UserError
    for no samples, samples without an answer, answers that the metric cannot compare, and when not
    one sample could be read.
    """
    chosen = list(islice(samples, settings.limit))
    if not chosen:
        raise UserError(
            f"{len(chosen)} samples to measure on",
            where="evaluation data",
            expected="at least one sample with an answer",
            remedy="give held-out samples, such as `finesight data import --eval-last` leaves",
        )
    truths = [truths_of(sample.sample) for sample in chosen]
    check_truths(settings.metric, truths)
    predictions, unreadable = _answers(model, renderer, chosen, settings, advance)
    readable = [truth for i, truth in enumerate(truths) if i not in unreadable]
    cases = [
        Case(prediction.answer, prediction.boxes, *truth)
        for prediction, truth in zip(predictions, readable, strict=True)
    ]
    scored = score(settings.metric, cases)
    stopped = fmean(prediction.stopped for prediction in predictions)
    if out is not None:
        lines = [_line(*row) for row in zip(predictions, cases, scored.each, strict=True)]
        write_file(out, "".join(lines).encode())
    return Evaluation(
        metric=settings.metric,
        headline=TASKS[settings.metric].headline,
        scores=scored.scores | {"stopped": stopped},
        predictions=tuple(predictions),
        unreadable=tuple((chosen[i].sample.id, reason) for i, reason in sorted(unreadable.items())),
    )


def _answers(
    model: VisionLanguageModel,
    renderer: Renderer,
    samples: Sequence[Located],
    settings: Eval,
    advance: Callable[[int], None] | None,
) -> tuple[list[Prediction], dict[int, str]]:
    """Predictions, at least one, and why others are missing, by the index of their sample."""
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
    )
    if not predictions:
        raise UserError(
            f"not one of {len(samples)} samples has a picture that can be read",
            where="evaluation data",
            expected="whole pictures",
            remedy=f"the first one says: {unreadable[0]}",
        )
    return predictions, unreadable


def _line(prediction: Prediction, case: Case, scores: Scores) -> str:
    gold, *references = case.truths
    record = prediction.as_json() | {
        "gold": gold,
        "references": references,
        "gold_boxes": [as_box(box) for box in case.targets],
        "scores": scores,
        "tokens": prediction.tokens,
        "stopped": prediction.stopped,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
