"""Run all checks of `finesight doctor` on a machine, run, recipe or model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from finesight.doctor import (
    gpu_check,
    machine_check,
    model_check,
    network_check,
    package_check,
    prediction_check,
    run_check,
)
from finesight.doctor.diagnosis import (
    Diagnosis,
    DiagnosisSection,
    join_command,
    user_error_to_diagnosis,
)
from finesight.errors import UserError
from finesight.manifest import MANIFEST_FILE
from finesight.model_folder import resolve_model_path
from finesight.recipe import load_recipe
from finesight.report.run_reader import read_run

RUN_CHECKS = {
    "run end": run_check.check_run_end,
    "training": run_check.check_training,
    "predictions": prediction_check.check_predictions,
}
"""Checks of a run by section title."""


def diagnose_machine(
    environment: Mapping[str, str],
    *,
    hub: network_check.HubService | None = None,
    run_smoke_test: bool = True,
) -> list[DiagnosisSection]:
    """Check this machine: hardware, packages, environment variables and a short training run.

    Args:
        environment: Environment variables.
        hub: Hub to connect to. None sends no requests.
        run_smoke_test: Whether to train the small test model on each device.
    """
    packages = package_check.list_packages()
    torch_info = gpu_check.probe_torch()
    gpu_system = gpu_check.inspect_gpu_system(environment)
    machine = machine_check.inspect_machine(environment, Path.cwd())
    sections: dict[str, Iterable[Diagnosis]] = {
        "machine": machine_check.check_machine(machine),
        "packages": package_check.check_packages(packages),
        "torch and GPUs": gpu_check.check_gpus(gpu_system, torch_info, packages, environment),
        "environment": network_check.check_environment(environment),
    }
    if hub is not None:
        sections[f"hub {hub}"] = network_check.check_hub(hub, environment)
    if run_smoke_test and not torch_info.error:
        sections["smoke test"] = gpu_check.check_smoke_tests(torch_info)
    sections["extras"] = package_check.check_extras(packages)
    return [DiagnosisSection(title, tuple(found)) for title, found in sections.items()]


def diagnose(subject: str) -> list[DiagnosisSection]:
    """Check the run, recipe, model folder or adapter folder with a path.

    Raises:
        UserError: The path is none of these.
    """
    path = resolve_model_path(subject)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return [DiagnosisSection("recipe", tuple(_diagnose_recipe(path)))]
    if (path / MANIFEST_FILE).is_file() and not (path / "config.json").is_file():
        run = read_run(path)
        return [DiagnosisSection(title, tuple(check(run))) for title, check in RUN_CHECKS.items()]
    if (path / model_check.ADAPTER_CONFIG_FILE).is_file():
        return [DiagnosisSection("adapter", (model_check.check_adapter(path),))]
    if path.is_dir():
        diagnoses = model_check.check_model(path, package_check.list_packages())
        return [DiagnosisSection("model", tuple(diagnoses))]
    raise UserError(
        f"no folder or recipe {subject!r}",
        where="finesight doctor",
        expected="a run, a recipe, or the folder of an adapter or model; no argument for this"
        " machine",
        remedy="correct the path; download a model of a hub first (finesight download)",
    )


def _diagnose_recipe(path: Path) -> list[Diagnosis]:
    """Check that this machine meets the requirements of a recipe."""
    try:
        recipe = load_recipe(path)
    except UserError as error:
        remedy = join_command("finesight", "show", path)
        return [user_error_to_diagnosis("recipe", error, remedy)]
    packages, torch_info = package_check.list_packages(), gpu_check.probe_torch()
    location = machine_check.inspect_location("output", recipe.output_dir)
    return model_check.check_recipe(path, recipe, packages, torch_info, location)
