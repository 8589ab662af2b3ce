"""The course of a run: a loss that stays, rises or jumps, held-out loss that turns, and waiting."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.doctor.run_again import (
    again,
    length,
    lower_rates,
    rates,
    rates_times,
    resume,
    workers,
)
from finesight.report.facts import WAITING
from finesight.report.record import Line, Record, is_finite

FEWEST = 12
"""Steps without which nothing can be said of a course."""

WINDOWS = 10
"""Stretches of a run whose medians are compared."""

RISEN = 1.25
"""Times its lowest, from where a loss has risen."""

BURST = 1.5
"""Times its beginning, from where a loss has burst: batches differ by less."""

STAYED = 0.02
"""Share of its beginning by which a loss has to fall to count as learned."""

DEAD = 0.1
"""Share of their beginning below which gradients have died away."""

LEARNED = 0.5
"""Share of its beginning below which a loss that stays has arrived: small gradients are no sign of
death then."""

KNOWN = 0.05
"""Nats a token at which there is nothing left to learn."""

SLOW = 5e-5
"""Learning rates below it are little, for adapters and for whole parts alike."""

LITTLE = 0.05
"""Relative change of weights below which a flat loss means that they have hardly moved."""

MOST = 12
"""Reading processes beyond which none has been seen to help."""

JUMPS = 3
"""Of the loss, from where they are no accident."""

TURNED = 1.05
"""Times its best, from where a held-out loss has turned."""


@dataclass(frozen=True, slots=True)
class Course:
    """The loss of the first step, before anything was learned, a run's losses as medians of
    `WINDOWS` stretches, how much single losses scatter about them, and the norms of the gradients
    at the beginning and at the end."""

    begun: float
    windows: tuple[float, ...]
    scatter: float
    norm_first: float
    norm_last: float

    @classmethod
    def of(cls, steps: Sequence[Line]) -> Course | None:
        """That of the steps that have finite figures; None of too few."""
        losses = [line["loss"] for line in steps if is_finite(line.get("loss"))]
        norms = [line["grad_norm"] for line in steps if is_finite(line.get("grad_norm"))]
        if len(losses) < FEWEST or len(norms) < FEWEST:
            return None
        parts = [part for part in _parts(losses) if part]
        middles = tuple(median(part) for part in parts)
        off = [
            abs(one - middle) for part, middle in zip(parts, middles, strict=True) for one in part
        ]
        few = max(2, len(norms) // WINDOWS)
        return cls(
            losses[0], middles, 1.4826 * median(off), median(norms[:few]), median(norms[-few:])
        )

    @property
    def first(self) -> float:
        return self.windows[0]

    @property
    def last(self) -> float:
        return self.windows[-1]

    @property
    def lowest(self) -> float:
        return min(self.windows)

    @property
    def has_risen(self) -> bool:
        """Whether it ends clearly above where it was."""
        return self.last > RISEN * self.lowest and self.last - self.lowest > 4 * self.scatter

    @property
    def peak(self) -> float:
        return max(self.windows)

    @property
    def has_burst(self) -> bool:
        """Whether it was far above its beginning on the way."""
        return self.peak > BURST * self.begun and self.peak - self.begun > 6 * self.scatter

    @property
    def has_died(self) -> bool:
        """Whether gradients have all but vanished while the loss is high and stays."""
        stays = abs(self.windows[len(self.windows) // 2] - self.last) < STAYED * self.first
        gone = self.norm_last < DEAD * self.norm_first
        return gone and stays and self.last > LEARNED * self.first

    @property
    def stays(self) -> bool:
        """Whether nothing was learned, or no more than scatter."""
        return self.first - self.last < max(STAYED * self.first, self.scatter)


def _parts(values: Sequence[float]) -> list[Sequence[float]]:
    count = min(WINDOWS, len(values) // 3)
    ends = [round(len(values) * number / count) for number in range(count + 1)]
    return [values[start:end] for start, end in pairwise(ends)]


def judge(record: Record) -> list[Finding]:
    """What the figures of the steps and of the measurements say, by themselves."""
    course = Course.of(record.steps)
    found = [*_loss(record, course), *_jumps(record), *_held_out(record), *_waiting(record)]
    if course is not None and not any(one.severity == "fault" for one in found):
        said = f"the loss fell from {course.begun:.3g} to {course.last:.3g}"
        found.insert(
            0, fine("loss", said) if not course.stays else fine("loss", "no loss to lower")
        )
    return found


def _loss(record: Record, course: Course | None) -> Iterator[Finding]:
    if course is None:
        count = len(record.steps)
        yield hint(
            "too-short",
            f"{count} steps: too few to say anything of the loss",
            why=f"from {FEWEST} steps on its course can be seen",
            remedy=again(record, *length(record, FEWEST / max(1, count))),
        )
        return
    used = ", ".join(f"{rate:g}" for rate in rates(record).values())
    if course.has_risen:
        yield fault(
            "rate-too-high",
            f"the loss rose from {course.lowest:.3g} to {course.last:.3g} (learning rate {used})",
            why="steps overshoot, and what was known is destroyed",
            remedy=again(record, *lower_rates(record)),
        )
    elif course.has_burst:
        make = hint if course.last < LEARNED * course.begun else fault
        yield make(
            "rate-too-high",
            f"the loss rose from {course.begun:.3g} to {course.peak:.3g} before it fell to"
            f" {course.last:.3g} (learning rate {used})",
            why="the first steps overshot and destroyed what the model knew; it learned anew",
            remedy=again(record, *lower_rates(record)),
        )
    elif course.has_died:
        yield fault(
            "rate-too-high",
            f"the loss stays at {course.last:.3g}, and gradients have died away: their norm went"
            f" from {course.norm_first:.2g} to {course.norm_last:.2g} (learning rate {used})",
            why="the first steps were so large that the model answers everything alike",
            remedy=again(record, *lower_rates(record)),
        )
    elif course.stays:
        yield _flat(record, course, used)


def _flat(record: Record, course: Course, used: str) -> Finding:
    said = f"the loss is flat: {course.first:.4g} at first, {course.last:.4g} at last"
    if course.first < KNOWN:
        return hint(
            "nothing-to-learn",
            said,
            why="the model knew all of this before the first step",
            remedy=typed("finesight", "data", "show", str(record.folder / "recipe.yaml")),
        )
    rate, moved = max(rates(record).values()), _moved(record)
    if rate < SLOW or moved < LITTLE:
        changed = f"; the weights that learned changed by {moved:.1%}" if moved < LITTLE else ""
        return fault(
            "loss-flat",
            f"{said} (learning rate {used})",
            why=f"the learning rate is too low{changed}",
            remedy=again(record, *rates_times(record, 1e-4 / rate if rate < SLOW else 10.0)),
        )
    return fault(
        "loss-flat",
        f"{said} (learning rate {used})",
        why="the rate is not too low: the answers may have nothing to do with the pictures, or"
        " every token of them may be left out of learning",
        remedy=typed("finesight", "data", "show", str(record.folder / "recipe.yaml")),
    )


def _moved(record: Record) -> float:
    """The largest relative change of a part that learned; infinite where none was written down."""
    rows = [row for row in record.moved or () if row.get("trained")]
    changes = [row["relative"] for row in rows if is_finite(row.get("relative"))]
    return max(changes, default=math.inf)


def _jumps(record: Record) -> Iterator[Finding]:
    jumped = [line for line in record.steps if line.get("jumped")]
    if len(jumped) < JUMPS:
        return
    places = [str(place) for line in jumped for place in line["jumped"]][:4]
    steps = ", ".join(str(line["step"]) for line in jumped[:6])
    yield hint(
        "loss-jumps",
        f"the loss jumped {len(jumped)} times (steps {steps})",
        why="the learning rate is near what is too much, or single samples are wrong:"
        f" {', '.join(places)}",
        remedy=again(record, *rates_times(record, 1 / 3), "train.warmup=0.1"),
    )


def _held_out(record: Record) -> Iterator[Finding]:
    """Whether the held-out loss turned while that of the training went on falling."""
    measured = [line for line in record.measured if is_finite(line.get("held_out_loss"))]
    if len(measured) < 2:
        return
    best = min(measured, key=lambda line: float(line["held_out_loss"]))
    last = measured[-1]
    low, now = float(best["held_out_loss"]), float(last["held_out_loss"])
    since = [line["loss"] for line in record.steps if line["step"] > best["step"]]
    since = [loss for loss in since if is_finite(loss)]
    falls = len(since) >= 6 and median(since[-3:]) < median(since[:3])
    if now <= TURNED * low or not falls:
        return
    if record.recipe.get("eval"):
        changes = ["eval.every=0.1", "eval.patience=2"]
    elif best["step"]:
        changes = length(record, int(best["step"]) / int(record.steps[-1]["step"]))
    else:
        changes = rates_times(record, 0.3)
    yield fault(
        "overfitted",
        f"the held-out loss rose from {low:.3g} after step {best['step']} to {now:.3g}, while that"
        f" of the training fell to {median(since[-3:]):.3g}",
        why="the samples are learned by heart: stop earlier, or have more of them",
        remedy=again(record, *changes),
    )


def _waiting(record: Record) -> Iterator[Finding]:
    known = [line for line in record.steps if line.get("waited_s") is not None]
    seconds = sum(float(line["seconds"]) for line in known)
    share = sum(float(line["waited_s"]) for line in known) / seconds if seconds else 0.0
    if share <= WAITING:
        return
    now = workers(record)
    more = max((now or 0) + 1, min(MOST, (os.cpu_count() or 4) - 2))
    go_on = [f"train.workers={more}"]
    yield hint(
        "waits-for-data",
        f"in {share:.0%} of the steps' time nothing was computed for want of data",
        why=f"{now if now is not None else 'the'} reading processes are too few, or the pictures"
        " too large: a smaller size in the model (picture) is read more quickly, too",
        remedy=again(record, *go_on) if record.result is not None else resume(record, *go_on),
    )
