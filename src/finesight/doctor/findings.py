"""What `doctor` has to say: what was found, why it matters, and the command that mends it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finesight.errors import UserError, printable

Severity = Literal["fault", "hint", "fine"]
"""fault: something does not work, or the run is not what it should be. hint: it works, and could
do so better. fine: looked at, and nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `code` names it for machines, `remedy` is to be typed into a
    shell; made by `fault`, `hint` and `fine`, so that none asks for a change without saying how."""

    code: str
    severity: Severity
    what: str
    why: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """For machines."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Section:
    """Findings about one subject."""

    title: str
    findings: tuple[Finding, ...]


def fault(code: str, what: str, *, why: str, remedy: str) -> Finding:
    """Something that has to be mended."""
    return Finding(code, "fault", printable(what), printable(why), printable(remedy))


def hint(code: str, what: str, *, why: str, remedy: str) -> Finding:
    """Something that could be better."""
    return Finding(code, "hint", printable(what), printable(why), printable(remedy))


def fine(code: str, what: str) -> Finding:
    """Something that is as it should be."""
    return Finding(code, "fine", printable(what))


def told(code: str, error: UserError, remedy: str) -> Finding:
    """What reading something ended with, as a fault. `remedy` is the command; what the error
    itself advises stands before it."""
    what = f"{error.where}: {error.what}" if error.where else error.what
    why = f"expected: {error.expected}" if error.expected else ""
    return fault(code, what, why="; ".join(filter(None, [why, error.remedy])), remedy=remedy)


def typed(*words: str) -> str:
    """A command as it is typed into a shell."""
    return shlex.join(words)


def faults(sections: Iterable[Section]) -> int:
    """How many findings have to be mended."""
    return sum(one.severity == "fault" for section in sections for one in section.findings)


_MARKS: dict[Severity, str] = {"fault": "FAULT", "hint": "hint ", "fine": "fine "}


def as_lines(sections: Sequence[Section]) -> list[str]:
    """For people: a block a section; what has to be typed begins with `$`."""
    lines = []
    for section in sections:
        lines.append(section.title)
        for one in section.findings:
            lines.append(f"  {_MARKS[one.severity]}  {one.what}")
            lines += [f"         why: {one.why}"] if one.why else []
            lines += [f"         $ {line}" for line in one.remedy.splitlines()]
    every = [one for section in sections for one in section.findings]
    counts = {kind: sum(one.severity == kind for one in every) for kind in ("fault", "hint")}
    return [*lines, ", ".join(_counted(kind, count) for kind, count in counts.items())]


def _counted(kind: str, count: int) -> str:
    return f"{count or 'no'} {kind}{'' if count == 1 else 's'}"


def as_record(sections: Sequence[Section]) -> dict[str, Any]:
    """For machines."""
    return {
        "faults": faults(sections),
        "findings": [
            {"section": section.title} | one.as_json()
            for section in sections
            for one in section.findings
        ],
    }
