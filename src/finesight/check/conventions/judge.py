"""Box conventions that only a whole source shows: what its numbers mean, if not what they say.

Two kinds of evidence are weighed for every other reading of the numbers.

Bounds. Some boxes are impossible as they are read: corners reversed, outside of the picture, below
a pixel. A few are slips. They speak for another reading when at least 5 % of the samples (and 10)
have one, while that reading leaves at most 5 %, and at most a quarter of those.

Pictures. Where a box fits either way, its sides are measured on a small copy of its picture (see
`edges`) and, for comparison, on three other pictures of the source. Boxes drawn around what the
picture shows score above 0 there, boxes of a wrong reading 0 on average, whatever the layout. The
sum over the source, one vote a picture, has a bound that holds for any number and size of votes
(see `witness.chance`).

A reading is taken as meant when

1. its boxes know their pictures: by accident with a chance below 1e-6, all readings tried counted;
2. bounds speak for it, or its boxes fit better than those of the present reading (chance below
   3e-4 more), and on all sides, so that boxes drawn too large or too small are no resized copy;
3. half of the boxes overlap by less than 0.85 with what they are now;
4. they fit better than when stretched or shrunk by a tenth (a reading with a name), or best of
   some 1,500 frames tried (a resized copy); frames within 5 % of one with a name are that one.

The present reading is asked first: if its boxes know their pictures and are possible, the source
is right and nothing else is tried. Without pictures, or where they show nothing, bounds alone are
enough when a fifth of the samples is impossible. Otherwise nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from finesight.check.conventions.frames import find_frame
from finesight.check.conventions.readings import (
    Bools,
    Claim,
    Frame,
    Reading,
    Table,
    corners_of,
    impossible,
    overlap,
    reading_of,
    reversed_or_empty,
)
from finesight.check.conventions.verdicts import Verdict, Weighed, mixed_verdict, verdict
from finesight.check.conventions.witness import MOST, Look, Witness, look_at, needed
from finesight.data.boxes import BoxForm, BoxFormat, BoxUnits

FEWEST = 20
"""Samples below which nothing is said."""

SLIPS = 0.05
"""Share of the samples whose boxes may be impossible by mistake."""

BLINDLY = 0.2
"""Share of the samples that have to be impossible where pictures do not support a reading."""

STRETCH = 0.1
"""A reading must fit better than itself stretched or shrunk by so much."""

SAME = 0.85
"""Boxes that overlap so much do not tell two readings apart."""

NEAR = 0.05
"""Frames that differ by less are one, as nobody can draw boxes to tell them apart."""

MOVED = 0.01
"""Share of a picture by which a side has to move to count."""

SURE = 4.0
"""z of a comparison of two readings; exp(-8) is 3e-4."""

UNITS: tuple[BoxUnits, ...] = ("pixel", "1000", "1")

FORMATS: tuple[BoxFormat, ...] = ("xyxy", "xywh", "cxcywh")

Floats = NDArray[np.float64]


def conventions(claims: Sequence[Claim], look: Look | None = look_at) -> list[Verdict]:
    """What the boxes of one source mean if not what they are read as; usually nothing.

    `look` opens pictures; without it only the bounds speak. At most 300 pictures are opened.
    """
    found: list[Verdict] = []
    usable = [claim for claim in claims if np.isfinite(claim.numbers).all()]
    for form in dict.fromkeys(claim.form for claim in usable):
        found += _of_one_form([claim for claim in usable if claim.form == form], look)
    return found


def _of_one_form(claims: Sequence[Claim], look: Look | None) -> list[Verdict]:
    """Pictures with an EXIF turn are asked first and alone: others know nothing of it."""
    turned = [claim for claim in claims if claim.orientation != 1]
    if _enough(turned):
        case = Case(Table(turned), look)
        before = Reading(case.given.format, Frame("stored"))
        if case.table.form.units == "pixel":
            named = case.judge([before], search=False)
            if named is not None:
                rest = [claim for claim in claims if claim.orientation == 1]
                return [named, *_of_one_form(rest, look)]
    if not _enough(claims):
        return []
    case = Case(Table(claims), look)
    named = case.judge(list(_others(case.table.form)), search=case.table.form.units == "pixel")
    return [] if named is None else [named]


def _enough(claims: Sequence[Claim]) -> bool:
    return len({(claim.place, claim.sample_id) for claim in claims}) >= FEWEST


def _others(form: BoxForm) -> Iterator[Reading]:
    """Every other reading that has a name, the likelier mistakes first."""
    formats = (form.format, *(format for format in FORMATS if format != form.format))
    units = (form.units, *(unit for unit in UNITS if unit != form.units))
    for unit in units:
        for format in formats:
            other = BoxForm(format, unit)
            if other != form:
                yield reading_of(other)


class Case:
    """One source, its present reading, and what speaks for and against others."""

    def __init__(self, table: Table, look: Look | None) -> None:
        self.table = table
        self.given = reading_of(table.form)
        witness = Witness(table, look) if look is not None else None
        self._witness = witness if witness is not None and witness.able else None
        self._scores: dict[Reading, Floats] = {}

    def judge(self, others: Sequence[Reading], *, search: bool) -> Verdict | None:
        """The reading that is meant, among `others` and, if `search`, frames of copies."""
        if self._bad(self.given) <= self._slips and self._stands(self.given):
            return None
        possible = [other for other in others if self._bad(other) <= self._slips]
        self._ask([self.given, *possible])
        for other in sorted(possible, key=lambda other: -self._mean(other)):
            if self._stands(other, len(others)) and self._accused(other):
                if not search or not self._crosses(other):
                    return self._verdict(other, len(others))
                break
        if search and self._witness is not None:
            named = self._in_a_copy(possible)
            if named is not None:
                return named
        for other in possible:
            if self._blindly(other) and self._accused(other):
                return self._verdict(other, len(others))
        return self._mixed(others)

    def _in_a_copy(self, possible: Sequence[Reading]) -> Verdict | None:
        """The frame that the pictures fit best, or the reading with a name that it comes to."""
        assert self._witness is not None, "a search without pictures"
        found = [find_frame(self.table, self._witness, format) for format in self._formats()]
        best = max(found, key=lambda one: self._mean(one.reading), default=None)
        if best is None or self._surprise(best.reading) < needed(best.tries):
            return None
        for other in (self.given, *possible):
            if other.format == best.reading.format and self._near(other, best.reading):
                accused = other != self.given and self._accused(other)
                return self._verdict(other, best.tries) if accused else None
        return self._verdict(best.reading, best.tries) if self._accused(best.reading) else None

    def _near(self, known: Reading, found: Reading) -> bool:
        """Whether a frame is that of a known reading, as far as loosely drawn boxes let one say.

        In thousandths nothing is above 1000: where boxes are, it is a copy of about that size.
        """
        if self._crosses(known):
            return False
        width, height = self.table.width, self.table.height
        pairs = zip(known.frame.sides(width, height), found.frame.sides(width, height), strict=True)
        return all(abs(float(np.median(np.log(one / other)))) < NEAR for one, other in pairs)

    def _formats(self) -> list[BoxFormat]:
        """The formats that are possible in some frame, the present one alone if it is."""

        def upside_down(format: BoxFormat) -> int:
            wrong = reversed_or_empty(corners_of(format, self.table.numbers))
            return self.table.samples_with(wrong)

        if upside_down(self.given.format) <= self._slips:
            return [self.given.format]
        return [format for format in FORMATS if upside_down(format) <= self._slips]

    # Bounds

    @property
    def _slips(self) -> float:
        """How many samples may be impossible by mistake."""
        return SLIPS * self.table.samples

    def _impossible(self, reading: Reading) -> Bools:
        return impossible(reading.shares(self.table), self.table)

    def _bad(self, reading: Reading) -> int:
        return self.table.samples_with(self._impossible(reading))

    def _by_bounds(self, other: Reading) -> bool:
        """Whether boxes are impossible now that are possible in the other reading."""
        now, then = self._bad(self.given), self._bad(other)
        return now >= max(10.0, self._slips) and 4 * then <= now

    def _crosses(self, reading: Reading) -> bool:
        """Whether more than a stray box is above 1000 in thousandths."""
        frame = reading.frame
        if frame.base != "fixed" or frame.across != 1000:
            return False
        above: Bools = np.any(corners_of(reading.format, self.table.numbers) > 1001, axis=1)
        return self.table.samples_with(above) > 0.005 * self.table.samples

    def _blindly(self, other: Reading) -> bool:
        """Whether bounds are enough without any support by pictures.

        Many boxes have to be impossible, and in thousandths some have to come near the far end of
        the picture's shorter side, where those in a copy of the picture's own shape do not.
        """
        if not self._by_bounds(other) or self._bad(self.given) < BLINDLY * self.table.samples:
            return False
        if other.frame.base != "fixed" or other.frame.across == 1:
            return True
        shares = other.shares(self.table)
        wide = self.table.width >= self.table.height
        return bool(max(np.where(wide, shares[:, 3], shares[:, 2])) > 0.9)

    # Pictures

    def _pairs(self, reading: Reading) -> Floats:
        """Scores [n, 2] of the witness's boxes: left and upper sides, right and lower sides."""
        self._ask([reading])
        return self._scores[reading]

    def _ask(self, readings: Sequence[Reading]) -> None:
        """Get the scores of several readings at once, which is quicker."""
        new = [reading for reading in readings if reading not in self._scores]
        if self._witness is not None and new:
            rows = self._witness.rows
            boxes = np.stack([reading.shares(self.table)[rows] for reading in new], axis=1)
            scores = self._witness.scores(boxes)
            self._scores.update((reading, scores[:, n]) for n, reading in enumerate(new))

    def _of(self, reading: Reading) -> Floats:
        both: Floats = self._pairs(reading).sum(axis=1)
        return both

    def _surprise(self, reading: Reading) -> float:
        return 0.0 if self._witness is None else self._witness.surprise(self._of(reading))

    def _mean(self, reading: Reading) -> float:
        """The mean score; 0 without pictures, so that the order stays."""
        if self._witness is None:
            return 0.0
        scores = self._of(reading)
        able = np.isfinite(scores)
        return float(np.clip(scores[able], -MOST, MOST).mean()) if able.any() else -MOST

    def _versus(self, one: Reading, other: Reading) -> float:
        """How surely one reading fits the pictures better than the other: z."""
        if self._witness is None:
            return 0.0
        return self._witness.surprise(self._of(one) - self._of(other))

    def _better(self, one: Reading, other: Reading) -> bool:
        return self._versus(one, other) >= SURE

    def _denied(self, other: Reading) -> bool:
        return self._better(self.given, other)

    def _stands(self, reading: Reading, tries: int = 1) -> bool:
        """Whether boxes of a reading know their pictures, better than when stretched or shrunk."""
        if self._witness is None or self._surprise(reading) < needed(tries):
            return False
        shares = reading.shares(self.table)[self._witness.rows]
        less, more = 1 - STRETCH, 1 + STRETCH
        factors = np.array([(less, 1), (1, less), (more, 1), (1, more)])
        stretched = self._witness.scores(shares[:, None] * np.tile(factors, 2))
        differences = self._of(reading)[:, None] - stretched.sum(axis=2)
        return all(
            self._witness.surprise(differences[:, place]) >= SURE / 2
            for place in range(len(factors))
            if np.isfinite(differences[:, place]).sum() >= FEWEST
        )

    def _accused(self, other: Reading) -> bool:
        """Whether the other reading is better, by bounds or pictures, and really another one."""
        same = overlap(self.given.shares(self.table), other.shares(self.table))
        if float(np.median(same)) >= SAME:
            return False
        if self._by_bounds(other):
            return not self._denied(other)
        return self._better(other, self.given) and self._all_round(other)

    def _all_round(self, other: Reading) -> bool:
        """Whether all sides that move gain: a frame that only makes up for boxes that were drawn
        too large or too small helps two sides and harms the other two."""
        assert self._witness is not None, "a comparison without pictures"
        gains = self._pairs(other) - self._pairs(self.given)
        rows = self._witness.rows
        steps = np.abs(other.shares(self.table) - self.given.shares(self.table))[rows]
        moved = steps.reshape(-1, 2, 2).max(axis=2) > MOVED
        return all(
            self._witness.surprise(gain, rows) >= SURE / 2
            for gain, rows in zip(gains.T, moved.T, strict=True)
            if np.isfinite(gain[rows]).sum() >= FEWEST
        )

    # Words

    def _verdict(self, other: Reading, tries: int) -> Verdict:
        return verdict(self._weighed(other, tries))

    def _weighed(self, other: Reading, tries: int) -> Weighed:
        now, then = self._impossible(self.given), self._impossible(other)
        weighed = Weighed(self.table, self.given, other, now, then, tries)
        if self._witness is None:
            return weighed
        return weighed.with_pictures(self._witness, self._of(self.given), self._of(other))

    def _mixed(self, others: Sequence[Reading]) -> Verdict | None:
        """A source of which a part is meant in one way and the rest in another."""
        least = max(FEWEST, 2 * SLIPS * self.table.samples)
        now = self._impossible(self.given)
        if self._witness is None or self.table.samples_with(now) < least:
            return None
        for other in others:
            then = self._impossible(other)
            both = self.table.samples_with(now & then)
            if self.table.samples_with(then) < least or both > SLIPS * self.table.samples:
                continue
            rows = self._witness.rows
            told = self._witness.surprise(self._of(other), now[rows])
            kept = self._witness.surprise(self._of(self.given), then[rows])
            if told >= needed(len(others)) and kept >= SURE:
                return mixed_verdict(self._weighed(other, len(others)))
        return None
