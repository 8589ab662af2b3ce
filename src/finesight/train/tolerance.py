"""What a run puts up with: steps without a finite loss or gradient, and pictures that cannot be
decoded, up to a limit; jumps of the loss are told and end nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from finesight.errors import UserError
from finesight.train.prepare import Session
from finesight.train.step import Taken

IN_A_ROW = 5
"""Void steps, one after the other, with which a run ends: the samples of one step may be at fault,
those of so many are not."""

MOST_DAMAGED, FEW = 0.1, 8
"""Share of the samples whose pictures may turn out damaged on the way, and how many of them may in
any run."""

RECENT, ENOUGH = 64, 16
"""Losses that a new one is compared with, at most and at least."""

DEVIATIONS = 8.0
"""Above the median of the recent losses, from where a loss is a jump."""

NAMED = 64
"""Samples named in a message; `metrics.jsonl` has all."""


class Judged(NamedTuple):
    """Loss and gradient norm of a step: NaN for what is no finite number, None where there was
    nothing to learn or fp16 overflowed. `void` and `jumped` are the places of its samples, where
    it was a void step, or one whose loss has jumped."""

    loss: float | None
    norm: float | None
    void: tuple[str, ...] = ()
    jumped: tuple[str, ...] = ()


class Tolerance:
    """Judges the steps of a run one after the other, those before a resumed run's by what it has
    noted: so that it says, and ends with, the same as one that was never stopped. Only damaged
    pictures are counted anew: they may have been put back."""

    def __init__(self, session: Session, say: Callable[[str], None]) -> None:
        self._session, self._say = session, say
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._damaged: dict[str, str] = {}
        self._void: list[str] = []
        for line in session.run.lines():
            if "loss" in line:
                self._recall(line)

    def judge(self, taken: Taken) -> Judged:
        """The figures of a step that the device has finished; waits for it."""
        self._damaged |= taken.together.dropped
        loss, norm = taken.wait()
        progress = self._session.progress
        if not taken.moved:
            return Judged(None, None)
        if math.isfinite(loss) and math.isfinite(norm):
            progress.void_in_a_row, self._void = 0, []
            jumped = is_jump(loss, self._losses)
            if jumped:
                self._tell_jump(taken.step.number, loss)
            self._losses.append(loss)
            return Judged(loss, norm, jumped=self._places(taken.step.number) if jumped else ())
        places = self._places(taken.step.number)
        progress.void += 1
        progress.void_in_a_row += 1
        self._void += places
        self._say(
            f"step {taken.step.number + 1} is void, nothing has moved: loss {loss}, gradient norm"
            f" {norm}; {progress.void_in_a_row} in a row, the run ends with {IN_A_ROW};"
            f" samples: {_named(places)}"
        )
        return Judged(_or_nan(loss), _or_nan(norm), void=places)

    def _recall(self, line: Mapping[str, Any]) -> None:
        """A step as it was noted, by whatever version."""
        if line.get("void"):
            self._void += line["void"]
        elif line["loss"] is not None:
            self._void = []
            self._losses.append(line["loss"])

    def check(self) -> None:
        """Raises UserError when it is too much."""
        progress, survey = self._session.progress, self._session.train.survey
        if progress.void_in_a_row >= IN_A_ROW:
            raise UserError(
                f"{progress.void_in_a_row} steps in a row had a loss or gradient that is no finite"
                f" number; their samples: {_named(self._void)}",
                where="training",
                expected="finite numbers; the weights are those of the last step before these",
                remedy="look at these samples (finesight data check); or lower train.learning_rate,"
                " lengthen train.warmup, or use train.precision=bf16",
            )
        if len(self._damaged) > max(FEW, MOST_DAMAGED * len(survey.kept)):
            name, reason = next(reversed(self._damaged.items()))
            raise UserError(
                f"{len(self._damaged)} of {len(survey.kept)} samples have pictures that cannot be"
                f" decoded, the last one {name}: {reason}",
                where="data.train",
                expected=f"at most {max(FEW, round(MOST_DAMAGED * len(survey.kept)))} of them",
                remedy="put the pictures back and start again with --resume; or leave them out with"
                " `finesight data check --fix`",
            )

    def _tell_jump(self, number: int, loss: float) -> None:
        self._say(
            f"the loss of step {number + 1} has jumped to {loss:.4g}: the median of the"
            f" {len(self._losses)} before it is {median(self._losses):.4g}"
        )

    def _places(self, number: int) -> tuple[str, ...]:
        """Of all samples of a step, whichever process had them."""
        corpus = self._session.train.corpus
        return tuple(corpus.where(index) for index in self._session.course.of(number))


def is_jump(loss: float, before: Collection[float]) -> bool:
    """Whether a loss is more than twice the median of those before it, and so far above it as to
    be no part of them: in standard deviations, estimated by the median absolute deviation, of which
    single outliers are no part (Hampel 1974)."""
    if len(before) < ENOUGH:
        return False
    middle = median(before)
    deviation = 1.4826 * median(abs(one - middle) for one in before)
    return loss - middle > max(DEVIATIONS * deviation, middle)


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _named(places: Iterable[str]) -> str:
    every = list(dict.fromkeys(places))
    more = f" and {len(every) - NAMED} more" if len(every) > NAMED else ""
    return ", ".join(every[:NAMED]) + more
