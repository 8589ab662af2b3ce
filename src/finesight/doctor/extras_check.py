"""Check the optional dependencies (extras) of the package."""

from __future__ import annotations

import re
from collections.abc import Mapping

from packaging.requirements import Requirement

from finesight.doctor.diagnosis import Diagnosis, make_ok, make_warning
from finesight.doctor.package_check import PACKAGE_NAME, InstalledPackages

EXTRA_DESCRIPTIONS: Mapping[str, str] = {
    "hub": "Parquet files, the dataset format of hubs",
    "modelscope": "models and data sets on ModelScope",
    "objects": "data in object storage (s3://, gs://)",
    "latex": "rendering of formulas in reports and metrics",
    "hf": "model families without a native implementation, through transformers",
    "quant": "QLoRA: frozen weights in 4 bits",
    "serve": "OpenAI-compatible API",
    "track": "experiment tracking with SwanLab and TensorBoard",
    "wandb": "experiment tracking with Weights & Biases",
    "mlflow": "experiment tracking with MLflow",
    "trackio": "experiment tracking with Trackio",
    "qwen-vl": "tokenizer of the first Qwen-VL",
    "web": "chat UI in the browser",
}
"""Description of each extra for users, by name."""


def find_missing_packages(packages: InstalledPackages) -> dict[str, list[str]]:
    """Return the packages that each extra requires and that are not installed.

    The list of a complete extra is empty. Extras that the metadata of the installed finesight do
    not declare are omitted.
    """
    own_packages = packages.by_name.get(PACKAGE_NAME, ())[:1]
    known_extras = {name for package in own_packages for name in package.extras}
    missing_by_extra: dict[str, list[str]] = {
        name: [] for name in EXTRA_DESCRIPTIONS if name in known_extras
    }
    for requirement_text in (
        requirement_text for package in own_packages for requirement_text in package.requires
    ):
        requirement = Requirement(requirement_text)
        for name in re.findall(r"extra == ['\"]([^'\"]+)", str(requirement.marker or "")):
            if name in missing_by_extra and packages.get_version(requirement.name) is None:
                missing_by_extra[name].append(requirement.name)
    return missing_by_extra


def install_extra_command(packages: InstalledPackages, *names: str) -> str:
    """Return the shell command that installs extras."""
    return packages.install_command(f"{PACKAGE_NAME}[{','.join(names)}]")


def check_extras(packages: InstalledPackages) -> list[Diagnosis]:
    """Check that extras are complete and that the installed metadata declare all of them."""
    missing_by_extra = find_missing_packages(packages)
    diagnoses = []
    for name, missing_names in missing_by_extra.items():
        if not missing_names:
            diagnoses.append(make_ok("extra", f"[{name}] {EXTRA_DESCRIPTIONS[name]}"))
            continue
        diagnoses.append(
            make_warning(
                "extra-missing",
                f"[{name}] is not installed: {EXTRA_DESCRIPTIONS[name]}",
                why=f"missing: {', '.join(missing_names)}; required by this extra only",
                remedy=install_extra_command(packages, name),
            )
        )
    unknown_extras = [name for name in EXTRA_DESCRIPTIONS if name not in missing_by_extra]
    if unknown_extras and PACKAGE_NAME in packages.by_name:
        diagnoses.append(
            make_warning(
                "metadata-outdated",
                f"the installed metadata of finesight do not list {', '.join(unknown_extras)}",
                why="the metadata are older than the code: versions are compared with"
                " outdated requirements",
                remedy=packages.install_command("--no-deps", "-e", "."),
            )
        )
    return diagnoses
