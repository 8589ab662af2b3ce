"""What is said of a source whose boxes mean something else: evidence, doubts and a way out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.readings import Bools, Frame, Reading, Table, overlap
from finesight.check.conventions.witness import Witness, chance
from finesight.check.findings import Finding

Floats = NDArray[np.float64]

TELLING = 2.0
"""A sample whose two readings differ by less in their scores cannot tell by its picture."""

_ORDERS = {
    "xyxy": "two corners (x1, y1, x2, y2)",
    "xywh": "a corner and a size (x, y, width, height)",
    "cxcywh": "a centre and a size (x, y, width, height)",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A convention that was found out.

    `code` is a key of FAULTS; `reading` what the numbers mean, `meant` the same in words. Of
    `samples`, `against` have a box that the present reading makes impossible, and `undecided` is
    the share that cannot tell the two readings apart. `summary` is the weightiest evidence. What
    mends it are `options` of the command, further work, or both.
    """

    code: str
    reading: Reading
    meant: str
    samples: int
    against: int
    undecided: float
    summary: str
    evidence: tuple[str, ...]
    options: str = ""
    work: str = ""

    def finding(self, source: str, *, takes_options: bool = True) -> Finding:
        """The verdict as a finding about a whole source. A file of samples takes no options: its
        boxes are always two corners in pixels."""
        give = "give" if takes_options else "import what the file was made from again, with"
        options = f"{give} {self.options}" if self.options else ""
        return Finding(
            self.code,
            source,
            f"the boxes are {self.meant}: {self.summary}",
            "; ".join(filter(None, [options, self.work])),
            source=source,
            evidence=self.evidence,
        )


@dataclass(frozen=True)
class Weighed:
    """The present reading of a table against another: which boxes each makes impossible (`now`,
    `then`), how many readings were tried, and, once pictures were asked, what they say."""

    table: Table
    given: Reading
    other: Reading
    now: Bools
    then: Bools
    tries: int
    pictures: int = 0
    z: float = 0.0
    versus: float = 0.0
    shares: tuple[float, float] = (0.0, 0.0)
    for_other: int = 0
    for_given: int = 0
    asked: int = 0

    def with_pictures(self, witness: Witness, given: Floats, other: Floats) -> Weighed:
        """The same with the scores of both readings added."""
        rows = witness.rows
        open_ = ~np.isin(self.table.sample[rows], self.table.sample[self.now])
        same = overlap(self.given.shares(self.table), self.other.shares(self.table))[rows] > 0.95
        difference = np.where(same, 0.0, other - given)
        kept = open_ & np.isfinite(difference)
        samples, places = np.unique(self.table.sample[rows[kept]], return_inverse=True)
        counts = np.maximum(np.bincount(places, minlength=len(samples)), 1)
        means = np.bincount(places, difference[kept], len(samples)) / counts
        return replace(
            self,
            pictures=len(np.unique(witness.picture)),
            z=witness.surprise(other),
            versus=witness.surprise(other - given),
            shares=(_above(given), _above(other)),
            for_other=int((means >= TELLING).sum()),
            for_given=int((means <= -TELLING).sum()),
            asked=len(np.unique(self.table.sample[rows[open_]])),
        )

    @property
    def against(self) -> int:
        return self.table.samples_with(self.now)

    @property
    def undecided(self) -> float:
        """Share of all samples whose boxes fit both readings and whose picture does not tell."""
        share = 1 - self.against / self.table.samples
        if self.asked:
            share *= 1 - (self.for_other + self.for_given) / self.asked
        return share


def _above(scores: Floats) -> float:
    able = np.isfinite(scores)
    return float((scores[able] > 0).mean()) if able.any() else 0.0


def verdict(case: Weighed) -> Verdict:
    """The words for a reading that was found to be the one that is meant."""
    code, meant, options, work = _named(case)
    return Verdict(
        code,
        case.other,
        meant,
        case.table.samples,
        case.against,
        case.undecided,
        f"{_summary(case)}; {_doubts(case)}",
        tuple(_evidence(case)),
        options,
        work,
    )


def mixed_verdict(case: Weighed) -> Verdict:
    """The words for a source of two conventions."""
    total, then = case.table.samples, case.table.samples_with(case.then)
    _, meant, *_ = _named(case)
    now = _present(case)
    evidence = (
        f"{_share(case.against, total)} cannot be {now}, {_share(then, total)} cannot be {meant}",
        f"in the pictures the former fit as {meant} (by accident: {_odds(case)})",
    )
    return Verdict(
        "boxes-mixed",
        case.other,
        f"partly {now}, partly {meant}",
        total,
        case.against,
        max(0.0, 1 - (case.against + then) / total),
        evidence[0],
        evidence,
        work="find out which rows come from where, and import them as two files",
    )


def _evidence(case: Weighed) -> list[str]:
    then = case.table.samples_with(case.then)
    lines = [
        f"{_share(case.against, case.table.samples)} have a box that is impossible as"
        f" {_present(case)} (reversed, outside of its picture, or below a pixel);"
        f" read so, {then} do"
    ]
    if case.pictures:
        before, after = (f"{100 * share:.0f} %" for share in case.shares)
        lines.append(
            f"measured on {case.pictures} pictures, the sides of the boxes so read stand on edges"
            f" better than in other pictures for {after} (by accident: {_odds(case)}), as they"
            f" are read now for {before} of those that are possible so; no connection is 50 %"
        )
    if case.asked:
        lines.append(_votes(case))
    return [*lines, _doubts(case)]


def _summary(case: Weighed) -> str:
    total = case.table.samples
    if case.against >= 0.1 * total or not case.asked:
        return f"{_share(case.against, total)} have a box that is impossible as it is read now"
    return _votes(case)


def _votes(case: Weighed) -> str:
    return (
        f"of {case.asked} samples that fit both ways and were looked at, {case.for_other} fit their"
        f" picture better so, {case.for_given} as now"
    )


def _doubts(case: Weighed) -> str:
    return f"{100 * case.undecided:.0f} % of the samples cannot tell"


def _odds(case: Weighed) -> str:
    odds = chance(case.z, case.tries)
    return f"below {max(odds, 1e-12):.0e}" if odds < 1 else "not excluded"


def _share(count: int, total: int) -> str:
    return f"{count} of {total} samples ({100 * count / total:.0f} %)"


def _present(case: Weighed) -> str:
    form = case.table.form
    units = {"pixel": "pixels", "1": "shares of the picture", "1000": "thousandths"}
    return f"{_ORDERS[form.format]} in {units[form.units]}"


def _named(case: Weighed) -> tuple[str, str, str, str]:
    """Code, meaning in words, and as remedy the options to give and the work to do."""
    reading, form = case.other, case.table.form
    order = _ORDERS[reading.format]
    option = f"--box-format {reading.format}" if reading.format != form.format else ""
    base = reading.frame.base
    if base == "stored":
        return (
            "boxes-before-turn",
            f"{order} in the picture as it is stored, before its EXIF turn",
            "",
            "turn the boxes as their picture is turned; or leave them and take the turn (EXIF tag"
            " Orientation) out of the pictures, which then lie as the boxes do",
        )
    whole = reading.frame.across
    if base == "fixed" and whole in (1, 1000) and whole == reading.frame.down:
        code = "boxes-thousandths" if whole == 1000 else "boxes-shares"
        name = "thousandths of the picture" if whole == 1000 else "shares of the picture"
        if form.units == f"{whole:g}":
            return f"boxes-{reading.format}", f"{order} in {name}", option, ""
        return code, f"{order} in {name}", f"{option} --box-units {whole:g}".strip(), ""
    if base == "picture":
        if form.units == "pixel":
            return f"boxes-{reading.format}", f"{order} in pixels", option, ""
        return "boxes-pixels", f"{order} in pixels", f"{option} --box-units pixel".strip(), ""
    copy = _copy(reading.frame, case.table)
    return (
        "boxes-resized",
        f"{order} in pixels of a resized copy, {copy}",
        option,
        "scale the boxes back to the picture that the data names, x by its width over the"
        " copy's and y by its height over the copy's; or name the copies as the pictures",
    )


def _copy(frame: Frame, table: Table) -> str:
    size = f"about {frame.across:.3g}"
    if frame.base == "fixed":
        text = f"about {frame.across:.0f} x {frame.down:.0f}"
        width, height = table.width[0], table.height[0]
        if (table.width == width).all() and (table.height == height).all():
            text += f" ({frame.across / width:.2f} x {frame.down / height:.2f} of the size)"
        return text
    if frame.base == "factor":
        return f"{size} times the size"
    kind = {
        "longest": f"the longest side {size}",
        "shortest": f"the shortest side {size}",
        "pixels": f"about {frame.across**2:.2g} pixels in all",
    }[frame.base]
    if frame.grid > 1:
        kind += f", sides in multiples of {frame.grid}"
    return kind + (", smaller pictures as they were" if frame.capped else "")
