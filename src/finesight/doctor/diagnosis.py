"""Results of `finesight doctor`: problem, reason, and the command that fixes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from finesight.errors import UserError, escape_unprintable

DiagnosisSeverity = Literal["error", "warning", "ok"]
"""Severity of a diagnosis.

- `error`: something does not work or gives wrong results.
- `warning`: something works but can be improved.
- `ok`: no problem.
"""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of one check of `finesight doctor`.

    Create it with `make_error`, `make_warning` or `make_ok`, which require a reason and a remedy
    for each problem.

    Attributes:
        code: Identifier of the check.
        severity: Severity of the result.
        what: Description of the result.
        why: Reason or consequence of the problem. Empty if there is no problem.
        remedy: Shell command that fixes the problem. Empty if there is no problem.
    """

    code: str
    severity: DiagnosisSeverity
    what: str
    why: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        """Convert the diagnosis to a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DiagnosisSection:
    """Diagnoses of one subject, such as the packages or the GPUs, with a title."""

    title: str
    diagnoses: tuple[Diagnosis, ...]


def make_error(code: str, what: str, *, why: str, remedy: str) -> Diagnosis:
    """Create a diagnosis of a problem that must be fixed."""
    return Diagnosis(
        code, "error", escape_unprintable(what), escape_unprintable(why), escape_unprintable(remedy)
    )


def make_warning(code: str, what: str, *, why: str, remedy: str) -> Diagnosis:
    """Create a diagnosis of something that works but can be improved."""
    return Diagnosis(
        code,
        "warning",
        escape_unprintable(what),
        escape_unprintable(why),
        escape_unprintable(remedy),
    )


def make_ok(code: str, what: str) -> Diagnosis:
    """Create a diagnosis that reports no problem."""
    return Diagnosis(code, "ok", escape_unprintable(what))


def user_error_to_diagnosis(code: str, error: UserError, remedy: str) -> Diagnosis:
    """Convert a UserError to a diagnosis of severity error.

    Args:
        code: Code of the diagnosis.
        error: Error of the failed operation. Its own remedy becomes part of the reason.
        remedy: Shell command that fixes the problem.
    """
    what = f"{error.where}: {error.what}" if error.where else error.what
    why = f"expected: {error.expected}" if error.expected else ""
    return make_error(code, what, why="; ".join(filter(None, [why, error.remedy])), remedy=remedy)


def format_command(*words: str) -> str:
    """Quote and join the words of a shell command."""
    return shlex.join(words)


def count_errors(sections: Iterable[DiagnosisSection]) -> int:
    """Count the diagnoses of severity error in all sections."""
    return sum(
        diagnosis.severity == "error" for section in sections for diagnosis in section.diagnoses
    )


_SEVERITY_LABELS: dict[DiagnosisSeverity, str] = {
    "error": "ERROR",
    "warning": "warning",
    "ok": "ok",
}


def format_diagnoses(sections: Sequence[DiagnosisSection]) -> list[str]:
    """Format diagnoses as console lines, with `$` before each shell command."""
    lines = []
    for section in sections:
        lines.append(section.title)
        for diagnosis in section.diagnoses:
            lines.append(f"  {_SEVERITY_LABELS[diagnosis.severity]:<7}  {diagnosis.what}")
            lines += [f"           why: {diagnosis.why}"] if diagnosis.why else []
            lines += [f"           $ {line}" for line in diagnosis.remedy.splitlines()]
    all_diagnoses = [diagnosis for section in sections for diagnosis in section.diagnoses]
    counts = {
        severity: sum(diagnosis.severity == severity for diagnosis in all_diagnoses)
        for severity in ("error", "warning")
    }
    return [*lines, ", ".join(_format_count(severity, count) for severity, count in counts.items())]


def _format_count(kind: str, count: int) -> str:
    return f"{count or 'no'} {kind}{'' if count == 1 else 's'}"


def diagnoses_to_dict(sections: Sequence[DiagnosisSection]) -> dict[str, Any]:
    """Convert diagnoses to a JSON object (`finesight doctor --json`)."""
    return {
        "num_errors": count_errors(sections),
        "diagnoses": [
            {"section": section.title} | diagnosis.as_json()
            for section in sections
            for diagnosis in section.diagnoses
        ],
    }
