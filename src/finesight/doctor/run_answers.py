"""What a run answered: scores that fell, answers without end, boxes in another frame."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

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
from finesight.data.headers import picture_size
from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.doctor.run_again import again, length, section, setting
from finesight.errors import UserError
from finesight.report.facts import last_start
from finesight.report.record import Line, Record, read_lines

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
    answers = list(read_lines(record.answers[-1])) if record.answers else []
    found += [*_endless(record, answers), *_frames(record, answers)]
    if not answers:
        return [*found, fine("answers", "the held-out loss alone was measured: no eval.metric")]
    return found or [fine("answers", f"{len(answers)} held-out answers, nothing odd about them")]


def _scores(record: Record) -> Iterator[Finding]:
    """Whether the headline rose, fell, or did neither for certain."""
    headline = next((line.get("headline") for line in reversed(record.measured)), None)
    differences = (record.result or {}).get("differences") or []
    rows = [row for row in differences if isinstance(row, dict) and row.get("name") == headline]
    if headline is None or not rows:
        return
    row = rows[0]
    before, after = float(row["before"]), float(row["after"])
    said = f"{headline} {before:.4f} before, {after:.4f} after"
    if row.get("verdict") == "worse":
        yield _worse(record, str(headline), said, after)
    elif row.get("verdict") == "better":
        yield fine("metric", said)
    else:
        yield _unclear(record, said, row)


def _worse(record: Record, headline: str, said: str, after: float) -> Finding:
    on_the_way = [line for line in record.measured if line["step"]]
    values = [float((line.get("scores") or {}).get(headline, -math.inf)) for line in on_the_way]
    if values and max(values) > after:
        step = on_the_way[values.index(max(values))]["step"]
        return fault(
            "metric-worse",
            f"{said}: worse; after step {step} it was {max(values):.4f}",
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


def _unclear(record: Record, said: str, row: Line) -> Finding:
    limit, low, high = section(record, "eval").get("limit"), row.get("low"), row.get("high")
    noise = f" ({low:+.4f} to {high:+.4f})" if low is not None and high is not None else ""
    if limit:
        # The interval narrows with the root of the number of samples.
        remedy = typed("finesight", "eval", str(record.folder), "--limit", str(4 * int(limit)))
    else:
        remedy = again(record, *length(record, 2.0))
    return hint(
        "metric-unclear",
        f"{said}: the difference is within noise{noise}",
        why="four times as many held-out samples halve the interval; or the run was too short",
        remedy=remedy,
    )


def _endless(record: Record, answers: Sequence[Line]) -> Iterator[Finding]:
    """Answers that came to the limit of tokens instead of an end."""
    endless = [line for line in answers if line.get("stopped") is False]
    if not answers or len(endless) <= ENDLESS * len(answers):
        return
    said = f"{len(endless)} of {len(answers)} answers have no end"
    limit = int(setting(record, "eval", "max_new_tokens", USUAL_LENGTH))
    looping = [line for line in endless if REPEATED.search(str(line.get("answer", ""))[-2000:])]
    longest = max(len(str(line.get("gold") or "")) for line in endless)
    shortest = min(len(str(line.get("answer") or "")) for line in endless)
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


def _frames(record: Record, answers: Sequence[Line]) -> Iterator[Finding]:
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


def _claims(record: Record, answers: Sequence[Line]) -> tuple[list[Claim], list[Claim]]:
    """Boxes of answers and of labels, pairwise, of answers that have as many as there should be,
    about pictures whose size is known."""
    said, right = [], []
    folder = Path(str(last_start(record).get("folder") or "."))
    for line in answers:
        boxes, gold = line.get("boxes") or [], line.get("gold_boxes") or []
        if not boxes or len(boxes) != len(gold) or not line.get("image"):
            continue
        path = folder / str(line["image"])
        try:
            size = picture_size(path)
        except UserError:
            continue
        for one, other in zip(boxes, gold, strict=True):
            said.append(_claim(line, path, size, one))
            right.append(_claim(line, path, size, other))
    return said, right


def _claim(line: Line, path: Path, size: tuple[int, int], box: Line) -> Claim:
    x1, y1, x2, y2 = (float(number) for number in box["xyxy"])
    return Claim("answers", str(line.get("id")), path, size, 1, (x1, y1, x2, y2))


def _overlaps(one: Reading, said: Table, other: Reading, right: Table) -> Floats:
    return overlap(one.shares(said), other.shares(right))


def _readings(record: Record, table: Table, beside: Table) -> list[Reading]:
    """What the numbers of `table` may mean: another order, thousandths, shares, pixels of a copy as
    the recipe makes it, or of one that is a constant factor larger."""
    ways = [Reading("xywh"), Reading("cxcywh")]
    ways += [Reading("xyxy", Frame("fixed", side, side)) for side in (1000.0, 1.0)]
    rule = section(record, "picture")
    if "height" in rule and "width" in rule:
        ways.append(Reading("xyxy", Frame("fixed", float(rule["width"]), float(rule["height"]))))
    if "longest_side" in rule:
        ways.append(Reading("xyxy", Frame("longest", float(rule["longest_side"]))))
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
