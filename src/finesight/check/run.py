"""A check from its sources to its findings: one pass over the samples, pictures ahead of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finesight.check.conventions.judge import conventions
from finesight.check.conventions.readings import Claim
from finesight.check.findings import FAULTS, Checked, Finding, Place, Source, where_of
from finesight.check.leaks import Leaks
from finesight.check.mending import Mending
from finesight.check.pairs import Ledger
from finesight.check.pictures import Album
from finesight.check.problems import problem_finding
from finesight.check.processes import processes
from finesight.check.samples import paths_of, sample_findings
from finesight.check.subjects import Model, Packed, Subject
from finesight.data.jsonl import Located
from finesight.data.opening import Drafted, Drafts, draft
from finesight.data.packed import draft_packed
from finesight.data.sample import Sample
from finesight.errors import UserError

ROWS = 32
"""Rows whose pictures are looked at together."""

CLAIMS = 40_000
"""Boxes of a source, about, that its convention is told by; the samples are spread over it."""


def _nobody(news: object) -> None:
    """Who does not want to be told."""


class Check:
    """A check of sources that belong together; held-out ones are read first.

    Pictures out of tables are saved below `saved`, a folder that exists. Of each fault the first
    `keep` findings come back in full, all others are counted.
    """

    def __init__(
        self,
        subjects: Sequence[Subject | Packed],
        saved: Path,
        model: Model | None = None,
        keep: int = 1000,
    ) -> None:
        """Open all sources. Raises UserError as `draft` does."""
        self._model = model or Model()
        self._keep = keep
        self._tell: Callable[[Finding], None] = _nobody
        self._advance: Callable[[int], None] = _nobody
        ordered = sorted(subjects, key=lambda subject: not subject.held_out)
        self._subjects = [(s, _opened(s, saved / f"source-{n}")) for n, s in enumerate(ordered)]
        self.mending = Mending()
        self._counts: Counter[str] = Counter()
        self._affected: Counter[str] = Counter()
        self._last: dict[str, Place] = {}
        self._kept: list[Finding] = []

    @property
    def drafts(self) -> list[Drafts]:
        """The sources as they are read, in the order in which they are."""
        return [drafts for _, drafts in self._subjects]

    @property
    def rows(self) -> int:
        """The rows of all sources."""
        return sum(map(len, self.drafts))

    def run(
        self,
        tell: Callable[[Finding], None] = _nobody,
        advance: Callable[[int], None] = _nobody,
        *,
        alone: bool = False,
    ) -> tuple[Checked, Album]:
        """Read everything. The gravest faults come first in the result, then the most frequent.

        `tell` gets every finding as it comes up, `advance` each number of rows that is done. Of
        many rows the pictures are looked at in other processes, unless this one works `alone`.
        """
        self._tell, self._advance = tell, advance
        with processes(0 if alone else self.rows) as pool:
            album = Album(pool)
            leaks = Leaks(album)
            sides = {held_out: Ledger(album) for held_out in (True, False)}
            sources = []
            for subject, drafts in self._subjects:
                sources.append(self._read(subject, drafts, album, leaks, sides[subject.held_out]))
            for held_out, ledger in sides.items():
                names = [str(s.path) for s, _ in self._subjects if s.held_out is held_out]
                for about, finding in ledger.close(", ".join(names)):
                    self._add(finding, about)
            for place, finding in leaks.close():
                self._add(finding, place)
        order = list(FAULTS)
        found = sorted(self._kept, key=lambda finding: order.index(finding.code))
        counts = {code: self._counts[code] for code in order if code in self._counts}
        checked = Checked(
            sources=tuple(sources),
            counts=counts,
            findings=tuple(found),
            pictures=len(album),
            contents=len(album.contents),
            affected={code: self._affected[code] for code in counts},
        )
        return checked, album

    def _read(
        self, subject: Subject | Packed, drafts: Drafts, album: Album, leaks: Leaks, ledger: Ledger
    ) -> Source:
        claims = Claims()
        samples = unread = 0
        for group in album.look(_groups(drafts), _paths):
            for row, drafted in group:
                name = str(subject.path)
                where = where_of(name, drafted.place)
                if drafted.problem is not None:
                    unread += 1
                    place = Place(name, where, "", row, -1)
                    self._add(problem_finding(drafted.problem, place), place)
                for number, sample in enumerate(drafted.samples):
                    place = Place(name, where, sample.id, row, number)
                    self._sample(sample, place, album, ledger)
                    if subject.held_out:
                        leaks.hold_out(sample, place)
                    else:
                        for finding in leaks.train(sample, place):
                            self._add(finding, place)
                samples += len(drafted.samples)
                claims.take(drafted, where, album)
            self._advance(len(group))
        for verdict in conventions(claims.taken):
            takes_options = "boxes" in drafts.source.form.takes
            self._add(verdict.finding(str(subject.path), takes_options=takes_options))
        return Source(
            path=str(subject.path),
            held_out=subject.held_out,
            format=drafts.source.form.name,
            known_by=drafts.source.known_by,
            rows=len(drafts),
            samples=samples,
            unread=unread,
        )

    def _sample(self, sample: Sample, place: Place, album: Album, ledger: Ledger) -> None:
        sound = True
        for finding in sample_findings(sample, place, album, self._model.specials):
            sound = sound and finding.severity != "error"
            self._add(finding, place)
        if sound:
            for finding in (*ledger.enter(sample, place), *self._length(sample, place)):
                self._add(finding, place)

    def _length(self, sample: Sample, place: Place) -> Iterator[Finding]:
        """A sample over the limit, or one that cannot be rendered."""
        renderer, most = self._model.renderer, self._model.max_length
        if renderer is None or most is None:
            return
        try:
            tokens = renderer.outline(Located(sample, Path())).tokens
        except UserError as problem:
            yield problem_finding(problem, place)
            return
        if tokens > most:
            yield place.finding(
                "too-long",
                f"{tokens} tokens, over {most}",
                "allow more tokens, set a smaller picture, or leave the sample out",
            )

    def _add(self, finding: Finding, place: Place | None = None) -> None:
        self._counts[finding.code] += 1
        if self._counts[finding.code] <= self._keep:
            self._kept.append(finding)
        self._tell(finding)
        if place is None:
            self.mending.note_source(finding)
            return
        self.mending.note(place, finding)
        # All findings of one fault in one sample come one after another.
        if self._last.get(finding.code) != place:
            self._affected[finding.code] += 1
            self._last[finding.code] = place


def check_sources(
    subjects: Sequence[Subject | Packed], model: Model | None = None, keep: int = 1000
) -> Checked:
    """What a check of sources that belong together finds, as `Check` says it.

    It can be called from a script or a notebook, which other processes could not start from: all
    is done in this one. Pictures out of tables are saved in a folder that is gone afterwards.
    Raises UserError as `draft` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        return Check(subjects, Path(folder), model, keep).run(alone=True)[0]


class Claims:
    """The boxes of a source as it holds them, thinned out evenly beyond `most` of them."""

    def __init__(self, most: int = CLAIMS) -> None:
        self._most = most
        self.taken: list[Claim] = []
        self._step = 1
        self._rows = 0

    def take(self, drafted: Drafted, where: str, album: Album) -> None:
        """Keep the boxes of a row, of pictures that can be used, if it is the row's turn."""
        self._rows += 1
        if not drafted.boxes or self._rows % self._step:
            return
        name = drafted.samples[0].id if drafted.samples else ""
        for box in drafted.boxes:
            content = album[str(box.picture)]
            if content.fault is None:
                self.taken.append(
                    Claim(
                        where, name, box.picture, content.size, content.turn, box.numbers, box.form
                    )
                )
        if len(self.taken) > self._most:
            self._step *= 2
            kept = set(list(dict.fromkeys(claim.place for claim in self.taken))[1::2])
            self.taken = [claim for claim in self.taken if claim.place in kept]


def _opened(subject: Subject | Packed, saved: Path) -> Drafts:
    saved.mkdir()
    if isinstance(subject, Packed):
        return draft_packed(subject.path, subject.request, saved)
    return draft(subject.path, subject.request, saved)


def _groups(drafts: Drafts) -> Iterator[list[tuple[int, Drafted]]]:
    group: list[tuple[int, Drafted]] = []
    for row, drafted in enumerate(drafts):
        group.append((row, drafted))
        if len(group) == ROWS:
            yield group
            group = []
    if group:
        yield group


def _paths(group: list[tuple[int, Drafted]]) -> Iterator[str]:
    for _, drafted in group:
        for sample in drafted.samples:
            yield from paths_of(sample)
        yield from (str(box.picture) for box in drafted.boxes)
