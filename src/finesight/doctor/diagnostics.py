"""Run all checks of `finesight doctor` on a machine, run, recipe or model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finesight.doctor import (
    environment_check,
    extras_check,
    gpu_check,
    hub_check,
    machine_check,
    model_check,
    package_check,
    prediction_check,
    recipe_check,
    run_end_check,
    smoke_test,
    training_check,
)
from finesight.doctor.diagnosis import Diagnosis, DiagnosisSection
from finesight.errors import UserError
from finesight.manifest import MANIFEST_FILE
from finesight.model_folder import resolve_model_path
from finesight.report.run_reader import read_run


def diagnose_machine(
    environment: Mapping[str, str],
    *,
    hub: hub_check.HubService | None = None,
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
    gpu_diagnoses = gpu_check.check_gpus(
        gpu_check.inspect_gpu_system(environment),
        torch_info,
        packages,
        environment,
    )
    sections = [
        _build_section(
            "machine",
            machine_check.check_machine(machine_check.inspect_machine(environment, Path.cwd())),
        ),
        _build_section("packages", package_check.check_packages(packages)),
        _build_section("torch and GPUs", gpu_diagnoses),
        _build_section("environment", environment_check.check_environment(environment, packages)),
    ]
    if hub is not None:
        sections.append(
            _build_section(f"hub {hub}", hub_check.check_hub(hub_check.probe_hub(hub, environment)))
        )
    if run_smoke_test and not torch_info.error:
        sections.append(
            _build_section(
                "smoke test", smoke_test.check_smoke_tests(smoke_test.run_smoke_tests(torch_info))
            )
        )
    return [*sections, _build_section("extras", extras_check.check_extras(packages))]


def diagnose(subject: str) -> list[DiagnosisSection]:
    """Check a run, a recipe, a model folder or an adapter folder.

    Args:
        subject: Path of the run, recipe or folder.

    Raises:
        UserError: The path is none of these.
    """
    path = resolve_model_path(subject)
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return diagnose_recipe(path)
    if (path / MANIFEST_FILE).is_file() and not (path / "config.json").is_file():
        return diagnose_run(path)
    if path.is_dir():
        if (path / model_check.ADAPTER_CONFIG_FILE).is_file():
            return [_build_section("adapter", model_check.check_adapter(path))]
        return [
            _build_section("model", model_check.check_model(path, package_check.list_packages()))
        ]
    raise UserError(
        f"no folder or recipe {subject!r}",
        where="finesight doctor",
        expected="a run, a recipe, or the folder of an adapter or model; no argument for this"
        " machine",
        remedy="correct the path; download a model of a hub first (finesight download)",
    )


def diagnose_run(folder: Path) -> list[DiagnosisSection]:
    """Check a run from its recorded files, without loading the model."""
    run_record = read_run(folder)
    return [
        _build_section("run end", run_end_check.check_run_end(run_record)),
        _build_section("training", training_check.check_training(run_record)),
        _build_section("predictions", prediction_check.check_predictions(run_record)),
    ]


def diagnose_recipe(path: Path) -> list[DiagnosisSection]:
    """Check that this machine meets the requirements of a recipe."""
    recipe = recipe_check.load_or_diagnose(path)
    if isinstance(recipe, Diagnosis):
        return [_build_section("recipe", [recipe])]
    output_location = machine_check.inspect_location("output", recipe.output_dir)
    context = recipe_check.RecipeContext(
        package_check.list_packages(), gpu_check.probe_torch(), output_location
    )
    return [_build_section("recipe", recipe_check.check_recipe(path, recipe, context))]


def _build_section(title: str, diagnoses: list[Diagnosis]) -> DiagnosisSection:
    return DiagnosisSection(title, tuple(diagnoses))
