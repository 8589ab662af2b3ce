"""What a run answered: scores that fell, answers without end, boxes in another frame."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, FiniteFloat, ValidationError

from finesight.check.conventions.readings import (
    PIXEL_CORNERS,
    Claim,
    Floats,
    Frame,
    Reading,
    Table,
    overlap,
    reading_of,
)
from finesight.config import ExactSize, LongestSide
from finesight.data.headers import picture_size
from finesight.data.sample import BoxPart
from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.doctor.run_again import again, length, recipe_of
from finesight.errors import UserError
from finesight.report.facts import last_start
from finesight.report.record import Record, read_lines

ENDLESS = 0.05
"""Share of the answers that may have no end."""

REPEATED = re.compile(r"(.{1,60}?)\1{3,}.{0,60}$", re.DOTALL)
"""The end of an answer that says the same again and again."""

FEWEST_BOXES = 8
"""Boxes without which no frame can be told from another."""

BADLY, WELL, BETTER = 0.5, 0.5, 0.2
"""Mean overlap below which boxes are wrong, from which another reading makes them right, and by how
much more than the present one."""

USUAL_LENGTH = 512
"""Tokens of an answer at most, where a recipe does not say."""


class Said(BaseModel):
    """An answer beside what would have been right, as far as it is needed here."""

    id: str = ""
    image: str | None = None
    answer: str = ""
    gold: str = ""
    boxes: tuple[BoxPart, ...] = ()
    gold_boxes: tuple[BoxPart, ...] = ()
    stopped: bool = True


class Change(BaseModel):
    """A figure before and after."""

    name: str
    before: FiniteFloat
    after: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    verdict: str = ""


Kind = TypeVar("Kind", bound=BaseModel)


def _read(kind: type[Kind], line: object) -> Kind | None:
    """The line, None for one that is damaged."""
    try:
        return kind.model_validate(line)
    except ValidationError:
        return None


def judge(record: Record) -> list[Finding]:
    """What the held-out answers, and their scores before and after, say."""
    if not record.measured:
        return [
            hint(
                "not-measured",
                "the run measured nothing",
                why="whether the model got better is not known; hold samples out (data.eval), and"
                " name a metric",
                remedy=again(record, "data.eval=HELD_OUT.jsonl", "eval.metric=captions"),
            )
        ]
    found = list(_scores(record))
    lines = read_lines(record.answers[-1]) if record.answers else ()
    answers = [answer for line in lines if (answer := _read(Said, line)) is not None]
    found += [*_endless(record, answers), *_frames(record, answers)]
    if not answers:
        return [*found, fine("answers", "the held-out loss alone was measured: no eval.metric")]
    return found or [fine("answers", f"{len(answers)} held-out answers, nothing odd about them")]


def _scores(record: Record) -> Iterator[Finding]:
    """Whether the headline rose, fell, or did neither for certain."""
    headline = next((line.get("headline") for line in reversed(record.measured)), None)
    found = (record.result or {}).get("differences")
    rows = [_read(Change, row) for row in (found if isinstance(found, list) else ())]
    row = next((row for row in rows if row is not None and row.name == headline), None)
    if row is None:
        return
    said = f"{row.name} {row.before:.4f} before, {row.after:.4f} after"
    if row.verdict == "worse":
        yield _worse(record, row, said)
    elif row.verdict == "better":
        yield fine("metric", said)
    else:
        yield _unclear(record, said, row)


def _worse(record: Record, row: Change, said: str) -> Finding:
    scores = [(line.get("scores") or {}, line["step"]) for line in record.measured if line["step"]]
    values = [(known.get(row.name), step) for known, step in scores]
    found = [(value, step) for value, step in values if isinstance(value, int | float)]
    best, step = max(found, default=(-math.inf, 0))
    if best > row.after:
        return fault(
            "metric-worse",
            f"{said}: worse; after step {step} it was {best:.4f}",
            why="the run went past its best: with patience the weights are those of the best",
            remedy=again(record, "eval.every=0.1", "eval.patience=2"),
        )
    return fault(
        "metric-worse",
        f"{said}: worse",
        why="the samples teach something else than what is asked for here: look at the answers that"
        " got worse, with what would have been right",
        remedy=typed("finesight", "report", str(record.folder)),
    )


def _unclear(record: Record, said: str, row: Change) -> Finding:
    noise = ""
    if row.low is not None and row.high is not None:
        noise = f" ({row.low:+.4f} to {row.high:+.4f})"
    settings = recipe_of(record).eval
    if settings is not None and settings.limit:
        # The interval narrows with the root of the number of samples.
        remedy = typed("finesight", "eval", str(record.folder), "--limit", str(4 * settings.limit))
    else:
        remedy = again(record, *length(record, 2.0))
    return hint(
        "metric-unclear",
        f"{said}: the difference is within noise{noise}",
        why="four times as many held-out samples halve the interval; or the run was too short",
        remedy=remedy,
    )


def _endless(record: Record, answers: Sequence[Said]) -> Iterator[Finding]:
    """Answers that came to the limit of tokens instead of an end."""
    endless = [one for one in answers if not one.stopped]
    if not answers or len(endless) <= ENDLESS * len(answers):
        return
    said = f"{len(endless)} of {len(answers)} answers have no end"
    settings = recipe_of(record).eval
    limit = settings.max_new_tokens if settings else USUAL_LENGTH
    looping = [one for one in endless if REPEATED.search(one.answer[-2000:])]
    longest = max(len(one.gold) for one in endless)
    shortest = min(len(one.answer) for one in endless)
    if len(looping) * 2 < len(endless) and longest > 0.9 * shortest:
        out = str(record.folder / "longer.jsonl")
        more = ["--max-new-tokens", str(4 * limit), "--out", out]
        yield fault(
            "answers-cut-off",
            f"{said}: cut off at {limit} tokens (eval.max_new_tokens)",
            why=f"right answers of theirs have up to {longest} characters, and these had room for"
            f" as few as {shortest}",
            remedy=typed("finesight", "eval", str(record.folder), *more),
        )
        return
    repeat = f", {len(looping)} of them repeat themselves" if looping else ""
    yield fault(
        "answers-endless",
        f"{said}{repeat}",
        why="the model has not learned where an answer ends: it learned too little, or the answers"
        " it learned from do not end the same way",
        remedy=again(record, *length(record, 2.0)),
    )


def _frames(record: Record, answers: Sequence[Said]) -> Iterator[Finding]:
    """Boxes that would be right if their numbers, or those of the labels, meant something else."""
    said, right = _claims(record, answers)
    if len(said) < FEWEST_BOXES:
        return
    present = reading_of(PIXEL_CORNERS)
    answered, labelled = Table(said), Table(right)
    now = float(_overlaps(present, answered, present, labelled).mean())
    if now >= BADLY:
        return
    ways = _readings(record, answered, labelled)
    scored = [
        (float(_overlaps(way, answered, present, labelled).mean()), way, "answers") for way in ways
    ]
    ways = _readings(record, labelled, answered)
    scored += [
        (float(_overlaps(present, answered, way, labelled).mean()), way, "labels") for way in ways
    ]
    best, way, whose = max(scored, key=lambda one: one[0])
    if best < max(WELL, now + BETTER):
        return
    yield fault(
        "boxes-in-another-frame",
        f"the boxes of the {whose} are {_meant(way)}: read so, the mean overlap is {best:.2f}"
        f" in place of {now:.2f}",
        why="what the model learned from and what it is measured on were imported by different"
        f" rules: import both again, with {_options(way)}",
        remedy=typed("finesight", "data", "check", str(record.folder / "recipe.yaml")),
    )


def _claims(record: Record, answers: Sequence[Said]) -> tuple[list[Claim], list[Claim]]:
    """Boxes of answers and of labels, pairwise, of answers that have as many as there should be,
    about pictures whose size is known."""
    said, right = [], []
    folder = Path(str(last_start(record).get("folder") or "."))
    for one in answers:
        if not one.boxes or len(one.boxes) != len(one.gold_boxes) or not one.image:
            continue
        path = folder / one.image
        try:
            size = picture_size(path)
        except UserError:
            continue
        said += [_claim(one, path, size, box) for box in one.boxes]
        right += [_claim(one, path, size, box) for box in one.gold_boxes]
    return said, right


def _claim(said: Said, path: Path, size: tuple[int, int], box: BoxPart) -> Claim:
    return Claim("answers", said.id, path, size, 1, box.xyxy)


def _overlaps(one: Reading, said: Table, other: Reading, right: Table) -> Floats:
    # Readings that make no sense of some numbers, such as infinite ones, overlap with nothing.
    with np.errstate(all="ignore"):
        return np.nan_to_num(overlap(one.shares(said), other.shares(right)))


def _readings(record: Record, table: Table, beside: Table) -> list[Reading]:
    """What the numbers of `table` may mean: another order, thousandths, shares, pixels of a copy as
    the recipe makes it, or of one that is a constant factor larger."""
    ways = [Reading("xywh"), Reading("cxcywh")]
    ways += [Reading("xyxy", Frame("fixed", side, side)) for side in (1000.0, 1.0)]
    rule = recipe_of(record).picture
    if isinstance(rule, ExactSize):
        ways.append(Reading("xyxy", Frame("fixed", float(rule.width), float(rule.height))))
    if isinstance(rule, LongestSide):
        ways.append(Reading("xyxy", Frame("longest", float(rule.longest_side))))
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = table.numbers / beside.numbers
    known = quotients[np.isfinite(quotients) & (quotients > 0)]
    factor = float(np.median(known)) if len(known) else 1.0
    return [*ways, Reading("xyxy", Frame("factor", factor))]


def _meant(way: Reading) -> str:
    if way.format != "xyxy":
        return {"xywh": "x, y, width, height", "cxcywh": "centre, width, height"}[way.format]
    frame = way.frame
    if frame.base == "factor":
        return f"in pixels of a copy {frame.across:.2g} times as large"
    if frame.base == "longest":
        return f"in pixels of a copy whose longer side is {frame.across:g}"
    units = {1000.0: "in thousandths of the picture", 1.0: "in shares of the picture"}
    if frame.across == frame.down and frame.across in units:
        return units[frame.across]
    return f"in pixels of a copy of {frame.across:g} x {frame.down:g}"


def _options(way: Reading) -> str:
    if way.format != "xyxy":
        return f"--box-format {way.format}"
    if way.frame.base == "fixed" and way.frame.across in (1.0, 1000.0):
        return f"--box-units {way.frame.across:g}"
    return "their numbers brought to pixels of the original first"
