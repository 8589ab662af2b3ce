"""What `data check` has to say: faults by name, how grave each is, and what was found where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from finesight.data.boxes import Box

Severity = Literal["error", "warning", "note"]
"""error: it cannot be used as it is, or spoils the measurement. warning: most likely a mistake.
note: worth a look."""

Fix = Literal["dropped", "clipped", "put in order", "marks taken out"]
"""What `--fix` does: leave the sample out, clip the box, put the box's corners in order, take the
marks of pictures out of the words."""

EXIT_CODES: dict[Severity, int] = {"error": 2, "warning": 3, "note": 0}
"""What `data check` ends with, by the gravest finding, the gravest first; 0 without any."""

FAULTS: dict[str, tuple[Severity, str]] = {
    "boxes-xywh": ("error", "boxes are a corner and a size, and read otherwise"),
    "boxes-cxcywh": ("error", "boxes are a centre and a size, and read otherwise"),
    "boxes-xyxy": ("error", "boxes are two corners, and read otherwise"),
    "boxes-pixels": ("error", "boxes are in pixels, and read otherwise"),
    "boxes-thousandths": ("error", "boxes are in thousandths of the picture, and read otherwise"),
    "boxes-shares": ("error", "boxes are in shares of the picture, and read otherwise"),
    "boxes-resized": ("error", "boxes are in pixels of a resized copy"),
    "boxes-before-turn": ("error", "boxes are in the frame before the EXIF turn"),
    "boxes-mixed": ("error", "boxes of two conventions in one source"),
    "row-unreadable": ("error", "the row cannot be read"),
    "picture-missing": ("error", "the picture is missing"),
    "picture-cut-off": ("error", "the picture's file ends too early"),
    "picture-damaged": ("error", "not a picture, or a damaged one"),
    "picture-too-large": ("error", "the picture is over the limit of pixels, or too thin"),
    "frames-differ": ("error", "frames of a video differ in size"),
    "marks-differ": ("error", "picture marks and pictures do not match in number"),
    "placeholder-typed": ("error", "a picture's or box's placeholder is typed in the text"),
    "special-token": ("error", "a special token is typed in the text"),
    "roles-out-of-order": ("error", "the turns' roles are out of order"),
    "picture-in-answer": ("error", "a picture in a turn that is not the user's"),
    "empty-answer": ("error", "the answer is empty"),
    "empty-question": ("error", "a turn before the answer is empty"),
    "box-outside": ("error", "a box lies outside of its picture"),
    "box-reversed": ("error", "a box with its corners reversed"),
    "box-empty": ("error", "a box without an area"),
    "box-of-no-picture": ("error", "a box names a picture that the sample does not have"),
    "too-long": ("error", "over-long for the model"),
    "same-picture": ("error", "a held-out picture is trained on"),
    "same-picture-resaved": ("error", "a held-out picture is trained on, saved anew"),
    "box-typed": ("warning", "a box written into the text"),
    "contradiction": ("warning", "one question about one picture, different answers"),
    "box-at-edge": ("note", "a box stands out of its picture by rounding"),
    "box-tiny": ("note", "a box below 2 pixels"),
    "box-of-everything": ("note", "a box around the whole picture"),
    "duplicate": ("note", "the same sample again"),
    "one-answer": ("note", "most answers are the same"),
}
"""Every fault: its severity and, for people, what it is."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture that a finding concerns: its path, its number in the sample (from 0, image parts
    only), and the boxes concerned, `[x1, y1, x2, y2]` in original pixels after the EXIF turn. A
    box may be what is wrong: reversed, outside of the picture, not finite."""

    path: Path
    number: int = 0
    boxes: tuple[Box, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault at one place.

    `code` is a key of FAULTS. `where` is file:line, or the file and the row's place, or the file
    alone for what a whole source shows; `source` is the file alone. `sample` is the sample's id,
    empty for a whole source. `evidence` are further lines for who wants to know why. `fix` is what
    `--fix` does about it, None where it leaves it alone.
    """

    code: str
    where: str
    what: str
    remedy: str
    source: str = ""
    sample: str = ""
    shown: tuple[Shown, ...] = ()
    evidence: tuple[str, ...] = ()
    fix: Fix | None = None

    @property
    def severity(self) -> Severity:
        return FAULTS[self.code][0]

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON data; numbers that JSON lacks (NaN, infinity) become text."""
        record = {"severity": self.severity, **asdict(self)}
        record["shown"] = [
            {
                "path": str(shown.path),
                "number": shown.number,
                "boxes": [[_number(value) for value in box] for box in shown.boxes],
                "labels": list(shown.labels),
            }
            for shown in self.shown
        ]
        return record


@dataclass(frozen=True, slots=True)
class Place:
    """A sample in a source: what its findings say of where they are. `row` counts the source's
    rows, `number` the samples of a row, both from 0."""

    source: str
    where: str
    sample: str
    row: int
    number: int

    def finding(
        self,
        code: str,
        what: str,
        remedy: str,
        shown: tuple[Shown, ...] = (),
        fix: Fix | None = None,
        evidence: tuple[str, ...] = (),
    ) -> Finding:
        """A finding about the sample."""
        return Finding(
            code, self.where, what, remedy, self.source, self.sample, shown, evidence, fix
        )


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was checked: how it was read, and how much it held. Of its `rows`, `unread` are
    faulty in a way that left no sample of them."""

    path: str
    held_out: bool
    format: str
    known_by: str
    rows: int
    samples: int
    unread: int = 0


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found: of each fault the number of findings and the first ones in full."""

    sources: tuple[Source, ...]
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    pictures: int
    contents: int
    affected: dict[str, int] = field(default_factory=dict)
    """Of each fault the number of samples that have it; 0 for one of a whole source."""

    @property
    def severity(self) -> Severity | None:
        """The gravest of all findings, None without any."""
        return worst([FAULTS[code][0] for code in self.counts])

    @property
    def samples(self) -> int:
        return sum(source.samples for source in self.sources)


def where_of(source: str, place: str) -> str:
    """A row's place in a source: file:line, or the file and what the source calls the row."""
    kind, _, number = place.partition(" ")
    return f"{source}:{number}" if kind == "line" else f"{source}, {place}"


def exit_code(severity: Severity | None) -> int:
    """What `data check` ends with when this is the gravest finding."""
    return 0 if severity is None else EXIT_CODES[severity]


def worst(severities: Sequence[Severity]) -> Severity | None:
    """The gravest of some severities, None of none."""
    return min(severities, key=list(EXIT_CODES).index, default=None)


def _number(value: float) -> float | str:
    return value if abs(value) < float("inf") else str(value)
