"""Results of `finesight doctor`: problem, reason, and the command that fixes it."""

from __future__ import annotations

import importlib.resources
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from finesight.errors import UserError, escape_unprintable, suggest_similar_path
from finesight.manifest import MANIFEST_FILE
from finesight.model_folder import resolve_model_path

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


def make_diagnosis(
    code: str, severity: DiagnosisSeverity | None = None, /, **values: object
) -> Diagnosis:
    """Create a diagnosis from its texts in the catalog, in which `values` fill the placeholders.

    `code` may contain a variant after a period. The default of `severity` is in the catalog.
    """
    entry = load_catalog()[code]
    texts = (entry.get(name, "").format(**values) for name in ("what", "why", "remedy"))
    severity = severity or entry.get("severity", "error")
    return Diagnosis(code.partition(".")[0], severity, *map(escape_unprintable, texts))


def user_error_to_diagnosis(code: str, error: UserError, remedy: str) -> Diagnosis:
    """Convert a UserError to a diagnosis. Its own remedy becomes part of the reason."""
    why = "; ".join(filter(None, [error.expected and f"expected: {error.expected}", error.remedy]))
    texts = map(escape_unprintable, (describe_error(error), why, remedy))
    return Diagnosis(code, "error", *texts)


def describe_error(error: UserError) -> str:
    """Return the place and the problem of a UserError."""
    return f"{error.where}: {error.what}" if error.where else error.what


def join_command(*words: object) -> str:
    """Join the quoted words of a shell command."""
    return shlex.join(map(str, words))


def has_errors(diagnoses: Iterable[Diagnosis]) -> bool:
    """Return whether a diagnosis has the severity error."""
    return any(diagnosis.severity == "error" for diagnosis in diagnoses)


def count_severity(sections: DiagnosisSections, severity: DiagnosisSeverity) -> int:
    """Count the diagnoses of a severity in all sections."""
    return sum(one.severity == severity for found in sections.values() for one in found)


def format_diagnoses(sections: DiagnosisSections) -> Iterator[str]:
    """Yield diagnoses as console lines, with `$` before each shell command."""
    for title, diagnoses in sections.items():
        yield title
        for one in diagnoses:
            label = "ERROR" if one.severity == "error" else one.severity
            yield f"  {label:<7}  {one.what}"
            yield from [f"           why: {one.why}"] if one.why else []
            yield from (f"           $ {line}" for line in one.remedy.splitlines())
    counts = ((name, count_severity(sections, name)) for name in ("error", "warning"))
    yield ", ".join(f"{count or 'no'} {name}{'' if count == 1 else 's'}" for name, count in counts)


def diagnoses_to_dict(sections: DiagnosisSections) -> dict[str, Any]:
    """Convert diagnoses to a JSON object (`finesight doctor --json`)."""
    lines = [{"section": title} | asdict(one) for title, found in sections.items() for one in found]
    return {"num_errors": count_severity(sections, "error"), "diagnoses": lines}


def diagnose_machine(environment: Mapping[str, str]) -> DiagnosisSections:
    """Check this machine: hardware, packages, torch, GPUs and environment variables."""
    # The modules of the checks import this one.
    from finesight.doctor import machine_check, package_check

    packages, torch_info = package_check.list_packages(), machine_check.probe_torch()
    gpu_system = machine_check.inspect_gpu_system(environment)
    sections: dict[str, Iterable[Diagnosis]] = {
        "machine": machine_check.check_machine(environment, Path.cwd()),
        "packages": package_check.check_packages(packages),
        "torch and GPUs": machine_check.check_gpus(gpu_system, torch_info, packages, environment),
        "environment": machine_check.check_environment(environment),
        "extras": package_check.check_extras(packages),
    }
    return {title: tuple(found) for title, found in sections.items()}


def diagnose(subject: str) -> DiagnosisSections:
    """Check the run, model folder or adapter folder with a path.

    Raises:
        UserError: The path is none of these.
    """
    from finesight.doctor import model_check, package_check, run_check
    from finesight.report.run_reader import read_run

    path = resolve_model_path(subject)
    if (path / MANIFEST_FILE).is_file() and not (path / "config.json").is_file():
        run = read_run(path)
        return {
            "run end": run_check.check_run_end(run),
            "training": run_check.check_training(run),
            "predictions": run_check.check_predictions(run),
        }
    if (path / model_check.ADAPTER_CONFIG_FILE).is_file():
        return {"adapter": [model_check.check_adapter(path)]}
    if path.is_dir():
        return {"model": model_check.check_model(path, package_check.list_packages())}
    raise UserError(
        f"no folder {subject!r}",
        where="finesight doctor",
        expected="a run, or the folder of an adapter or model; no argument for this machine",
        remedy=suggest_similar_path(
            path,
            "correct the path; download a model of a hub first (finesight download); to check a"
            " recipe: finesight plan RECIPE",
        ),
    )
