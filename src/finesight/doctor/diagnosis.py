"""Diagnoses: problem, reason, and the command that fixes it."""

from __future__ import annotations

import importlib.resources
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from typing import Any, Literal

import yaml

from finesight.errors import Step, UserError, escape_unprintable, format_count

DiagnosisSeverity = Literal["error", "warning", "ok"]
"""`error`: something fails or gives wrong results. `warning`: something can be improved."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of a check: what was found, why it is a problem, and the shell command that fixes it.

    `why` and `remedy` are empty if there is no problem.
    """

    code: str
    severity: DiagnosisSeverity
    what: str
    why: str = ""
    remedy: str = ""


DiagnosisSections = Mapping[str, Sequence[Diagnosis]]
"""Diagnoses by title of the section, such as the packages or the GPUs."""


@cache
def load_catalog() -> Mapping[str, Mapping[str, Any]]:
    """Load the texts of all diagnoses by code from `diagnoses.yaml`."""
    file = importlib.resources.files("finesight.doctor") / "diagnoses.yaml"
    content: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def make_diagnosis(code: str, is_error: bool | None = None, /, **values: Any) -> Diagnosis:
    """Create a diagnosis from its texts in the catalog, in which `values` fill the placeholders.

    The list `overrides` of the values follows the overrides of the step in the catalog.

    `code` may contain a variant after a period. `is_error` replaces the severity of the catalog by
    an error or a warning.
    """
    entry = load_catalog()[code]
    if "step" in entry:
        operation, templates = entry["step"]
        arguments: dict[str, object] = {}
        for argument, template in templates.items():
            arguments[argument] = str(template).format(**values)
        if "overrides" in arguments:
            arguments["overrides"] = [*templates["overrides"], *values["overrides"]]
        values["command"] = Step(operation, arguments)
        entry = {"remedy": "{command}", **entry}
    name, _, _ = code.partition(".")
    texts = [entry.get(part, "").format(**values) for part in ("what", "why", "remedy")]
    severity = _select_severity(entry, is_error)
    return Diagnosis(name, severity, *map(escape_unprintable, texts))


def _select_severity(entry: Mapping[str, Any], is_error: bool | None) -> DiagnosisSeverity:
    """Return the given severity, else that of an entry of the catalog."""
    if is_error is not None:
        return "error" if is_error else "warning"
    default = "error" if "why" in entry else "ok"
    severity: DiagnosisSeverity = entry.get("severity", default)
    return severity


def user_error_to_diagnosis(code: str, error: UserError, remedy: str) -> Diagnosis:
    """Convert a UserError to a diagnosis. Its own remedy becomes part of the reason."""
    expected = error.expected and f"expected: {error.expected}"
    why = "; ".join(filter(None, [expected, str(error.remedy)]))
    texts = map(escape_unprintable, (describe_error(error), why, remedy))
    return Diagnosis(code, "error", *texts)


def describe_error(error: UserError) -> str:
    """Return the place and the problem of a UserError."""
    if not error.where:
        return error.what
    return f"{error.where}: {error.what}"


def join_command(*words: object) -> str:
    """Join the quoted words of a shell command."""
    return shlex.join(map(str, words))


def count_severity(sections: DiagnosisSections, severity: DiagnosisSeverity) -> int:
    """Count the diagnoses of a severity in all sections."""
    diagnoses = chain.from_iterable(sections.values())
    return sum(one.severity == severity for one in diagnoses)


def format_diagnoses(sections: DiagnosisSections) -> Iterator[str]:
    """Yield diagnoses as console lines, with `$` before each shell command."""
    for title, diagnoses in sections.items():
        yield title
        for one in diagnoses:
            label: str = one.severity
            if one.severity == "error":
                label = "ERROR"
            yield f"  {label:<7}  {one.what}"
            if one.why:
                yield f"           why: {one.why}"
            for line in one.remedy.splitlines():
                yield f"           $ {line}"
    errors = _format_number(count_severity(sections, "error"), "error")
    warnings = _format_number(count_severity(sections, "warning"), "warning")
    yield f"{errors}, {warnings}"


def _format_number(count: int, noun: str) -> str:
    if count == 0:
        return f"no {noun}s"
    return format_count(count, noun)


def diagnoses_to_dict(sections: DiagnosisSections) -> dict[str, Any]:
    """Convert diagnoses to a JSON object."""
    lines = []
    for title, found in sections.items():
        lines += [{"section": title} | asdict(one) for one in found]
    return {"num_errors": count_severity(sections, "error"), "diagnoses": lines}
