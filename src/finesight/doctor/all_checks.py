"""Diagnosis of a machine, run or model: all checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from finesight.doctor import machine_check, model_check, package_check, run_check
from finesight.doctor.diagnosis import Diagnosis, DiagnosisSections
from finesight.errors import Step, UserError, suggest_similar_path
from finesight.model_folder import resolve_model_path
from finesight.report.run_reader import read_run
from finesight.settings.manifest import MANIFEST_FILE


def diagnose_machine(environment: Mapping[str, str]) -> DiagnosisSections:
    """Check this machine: hardware, packages, torch, GPUs and environment variables."""
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
    path = resolve_model_path(subject)
    is_adapter = (path / model_check.ADAPTER_CONFIG_FILE).is_file()
    is_model = (path / "config.json").is_file()
    if (path / MANIFEST_FILE).is_file() and not is_adapter and not is_model:
        run = read_run(path)
        return {
            "run end": run_check.check_run_end(run),
            "training": run_check.check_training(run),
            "questions": run_check.check_questions(run),
            "predictions": run_check.check_predictions(run),
        }
    if is_adapter:
        return {"adapter": [model_check.check_adapter(path)]}
    if path.is_dir():
        return {"model": model_check.check_model(path, package_check.list_packages())}
    plan = Step("plan", {"recipe": subject}, "to check a recipe")
    purpose = "correct the path, or download a model of a hub first"
    download = Step("download", {"source": subject}, purpose, plan)
    raise UserError(
        f"no folder {subject!r}",
        where="doctor",
        expected="a run, or the folder of an adapter or model; no argument for this machine",
        remedy=suggest_similar_path(path, download),
    )
