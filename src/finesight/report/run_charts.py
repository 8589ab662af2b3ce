"""Which curves the report of a run shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finesight.report.curves import Drawing, Series, draw, finite, smooth
from finesight.report.figures import interval_of, named
from finesight.report.language import say
from finesight.report.record import Line, Record


def charts(record: Record) -> list[Drawing]:
    """Loss, the headline, learning rates, gradient norm, speed and utilisation, those that the
    run has figures of."""
    steps = record.steps
    drawings = [
        draw(
            say("Loss"),
            [*_both(say("training"), _of(steps, "loss")), _held_out(record)],
            say("nats per learned token"),
        ),
        *_headline(record),
        draw(say("Learning rate"), _rates(steps)),
        draw(
            say("Gradient norm"),
            _both(say("norm"), _of(steps, "grad_norm")),
            say("before clipping"),
        ),
        draw(
            say("Speed"),
            _both(say("samples a second"), _of(steps, "samples_per_s")),
            say("samples a second"),
        ),
        draw(
            say("Utilisation"),
            _both(say("utilisation"), [(x, 100 * y) for x, y in _of(steps, "utilisation")]),
            say("% of the device's measured peak"),
        ),
    ]
    return [drawing for drawing in drawings if drawing is not None]


def _of(lines: Sequence[Line], name: str) -> list[tuple[float, float]]:
    return finite((line.get("step"), line.get(name)) for line in lines)


def _both(name: str, points: Sequence[tuple[float, float]]) -> list[Series]:
    """The values as they were, and a smooth line through them where there are many."""
    calm = smooth(points)
    if not calm:
        return [Series(name, points)]
    return [Series(name, points, "faint"), Series(say("smoothed"), calm)]


def _held_out(record: Record) -> Series:
    return Series(say("held-out"), _of(record.measured, "held_out_loss"), "marks")


def _headline(record: Record) -> list[Drawing | None]:
    names = [line["headline"] for line in record.measured if line.get("headline")]
    if not names:
        return []
    name = str(names[-1])
    points, whiskers = [], []
    for line in record.measured:
        scores: Any = line.get("scores")
        points += finite([(line.get("step"), scores.get(name) if scores else None)])
        found = interval_of(line, name)
        if found is not None:
            whiskers.append((float(line["step"]), *found))
    note = say("held-out, bars: 95 % intervals" if whiskers else "held-out")
    said = named(name)
    return [draw(said, [Series(said, points, "marks", whiskers)], note)]


def _rates(steps: Sequence[Line]) -> list[Series]:
    """A line for each part; one for all where they are the same throughout."""
    rates = [(line.get("step"), line["lr"]) for line in steps if isinstance(line.get("lr"), dict)]
    parts = dict.fromkeys(part for _, by_part in rates for part in by_part)
    lines = {part: finite((step, by.get(part)) for step, by in rates) for part in parts}
    groups: list[tuple[list[str], list[tuple[float, float]]]] = []
    for part, points in lines.items():
        same = next((names for names, other in groups if other == points), None)
        if same is None:
            groups.append(([part], points))
        else:
            same.append(part)
    return [Series(", ".join(names), points) for names, points in groups]
