"""Check installed packages for version conflicts, missing and duplicate packages, and extras."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from finesight.doctor.diagnosis import Diagnosis, has_errors, join_command, make_diagnosis

PACKAGE_NAME = "finesight"

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
    "video": "video files",
    "web": "chat UI in the browser",
}
"""Description of each extra for users, by name."""

DEV_EXTRAS = ("dev",)
"""Extras for the development of finesight, which are not checked."""

SITE_FOLDERS = ("site-packages", "dist-packages")
"""Names of folders that only a package installer writes to.

In other folders, files that start with ~ may belong to the user.
"""

PIP_COMMAND = (sys.executable, "-m", "pip")
"""Command that runs pip of the current Python interpreter."""


@dataclass(frozen=True, slots=True)
class InstalledPackage:
    """Installed distribution: folder of its modules, requirements (PEP 508) and extras."""

    name: str
    version: str
    folder: Path
    requires: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InstalledPackages:
    """Installed packages of the current Python interpreter.

    Attributes:
        by_name: Distributions by canonical name. The first one of a name is the one that is
            imported.
        leftovers: Files of interrupted installations.
        has_pip: True if pip is installed.
        is_managed: True if the operating system manages this Python interpreter (PEP 668).
    """

    by_name: Mapping[str, tuple[InstalledPackage, ...]]
    leftovers: tuple[Path, ...]
    has_pip: bool
    is_managed: bool = False

    def get_version(self, name: str) -> str | None:
        """Return the version of an imported package, or None if it is not installed."""
        installed = self.by_name.get(canonicalize_name(name))
        return installed[0].version if installed else None

    def find_missing_packages(self) -> dict[str, list[str]]:
        """Return the packages that each extra requires and that are not installed.

        The list of a complete extra is empty. Extras that the metadata of the installed finesight
        do not declare are omitted.
        """
        missing: dict[str, list[str]] = {}
        for package in self.by_name.get(PACKAGE_NAME, ())[:1]:
            missing = {name: [] for name in EXTRA_DESCRIPTIONS if name in package.extras}
            for requirement in _parse_requirements(package.requires):
                is_installed = self.get_version(requirement.name) is not None
                if is_installed or _is_applicable(requirement, ()):
                    continue
                for name, names in missing.items():
                    if _is_applicable(requirement, [name]):
                        names.append(requirement.name)
        return missing


def install_command(*requirements: str) -> str:
    """Return the shell command that installs requirements for this Python interpreter."""
    return join_command(*PIP_COMMAND, "install", *requirements)


def install_extra_command(name: str) -> str:
    """Return the shell command that installs an extra of finesight."""
    return install_command(f"{PACKAGE_NAME}[{name}]")


def list_packages(path: Sequence[str] | None = None) -> InstalledPackages:
    """List the packages in folders, by default `sys.path`, without importing them."""
    search_path = list(sys.path if path is None else path)
    packages_by_name: dict[str, dict[InstalledPackage, None]] = {}
    for distribution in distributions(path=search_path):
        if name := distribution.metadata["Name"]:
            installed = InstalledPackage(
                name,
                distribution.version,
                Path(str(distribution.locate_file(""))),
                tuple(distribution.requires or ()),
                tuple(distribution.metadata.get_all("Provides-Extra") or ()),
            )
            packages_by_name.setdefault(canonicalize_name(name), {})[installed] = None
    folders = [folder for folder in map(Path, search_path) if folder.name in SITE_FOLDERS]
    leftovers = (file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("~*")))
    managed_marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return InstalledPackages(
        {name: tuple(packages) for name, packages in packages_by_name.items()},
        tuple(leftovers),
        importlib.util.find_spec("pip") is not None,
        sys.prefix == sys.base_prefix and managed_marker.is_file(),
    )


def check_packages(packages: InstalledPackages) -> list[Diagnosis]:
    """Check the installed packages against the requirements of finesight."""
    dependencies = _group_dependencies(packages)
    diagnoses = []
    if PACKAGE_NAME not in packages.by_name:
        diagnoses.append(make_diagnosis("not-installed", install=install_command("-e", ".")))
    if packages.is_managed:
        diagnoses.append(make_diagnosis("python-managed", python=sys.executable))
    if not packages.has_pip:
        install = join_command(sys.executable, "-m", "ensurepip")
        diagnoses.append(make_diagnosis("no-pip", install=install))
    diagnoses += _check_versions(packages, dependencies)
    if packages.leftovers:
        names = ", ".join(path.name for path in packages.leftovers[:5])
        remove = join_command("rm", "-r", *packages.leftovers)
        folder = packages.leftovers[0].parent
        diagnoses.append(make_diagnosis("leftovers", names=names, folder=folder, remove=remove))
    if not has_errors(diagnoses):
        diagnoses.insert(0, make_diagnosis("versions", count=len(dependencies)))
    return diagnoses


@dataclass(frozen=True, slots=True)
class _Dependency:
    """Requirement of an installed package; optional if only an extra of finesight leads to it."""

    required_by: str
    requirement: Requirement
    is_optional: bool


def _group_dependencies(packages: InstalledPackages) -> dict[str, list[_Dependency]]:
    """Return all direct and transitive requirements of finesight by canonical package name.

    Requirements of extras are included if the required package is installed, since finesight uses
    it then.
    """
    # Each entry: requiring package, requirement, requested extras, and whether it is optional.
    queue: list[tuple[str, Requirement, Iterable[str], bool]] = []
    for package in packages.by_name.get(PACKAGE_NAME, ())[:1]:
        extras = [name for name in package.extras if name not in DEV_EXTRAS]
        requirements = list(_parse_requirements(package.requires))
        queue += [(PACKAGE_NAME, one, (), False) for one in requirements]
        queue += [(PACKAGE_NAME, one, extras, True) for one in requirements]
    grouped: dict[str, list[_Dependency]] = {}
    seen: set[tuple[str, Requirement]] = set()
    while queue:
        required_by, requirement, extras_requested, is_optional = queue.pop(0)
        name = canonicalize_name(requirement.name)
        installed = packages.by_name.get(name, ())
        is_unused = is_optional and required_by == PACKAGE_NAME and not installed
        if (
            (required_by, requirement) in seen
            or name == PACKAGE_NAME
            or is_unused
            or not _is_applicable(requirement, extras_requested)
        ):
            continue
        seen.add((required_by, requirement))
        grouped.setdefault(name, []).append(_Dependency(required_by, requirement, is_optional))
        for package in installed[:1]:
            nested = _parse_requirements(package.requires)
            queue += [(name, one, requirement.extras, is_optional) for one in nested]
    return grouped


def _parse_requirements(texts: Iterable[str]) -> Iterator[Requirement]:
    """Parse requirements. Invalid ones are omitted."""
    for text in texts:
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def _is_applicable(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies to this machine, given the requested extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def _check_versions(
    packages: InstalledPackages, dependencies_by_name: Mapping[str, Sequence[_Dependency]]
) -> Iterator[Diagnosis]:
    """Report missing packages, version conflicts and packages that are installed twice.

    A remedy installs a version that satisfies all requirements. The effective version of a
    duplicate package is unknown, so that its requirements are not checked.
    """
    for name in sorted({*dependencies_by_name, *packages.by_name}):
        dependencies = dependencies_by_name.get(name, ())
        bounds = {str(spec) for one in dependencies for spec in one.requirement.specifier}
        install = install_command(f"{name}{','.join(sorted(bounds))}")
        same_name = packages.by_name.get(name, ())
        duplicates = [package for package in same_name if package.folder == same_name[0].folder]
        if len(duplicates) > 1:
            uninstall = join_command(*PIP_COMMAND, "uninstall", "--yes", name)
            yield make_diagnosis(
                "duplicate-package",
                "error" if dependencies else "warning",
                name=name,
                folder=duplicates[0].folder,
                versions=" and ".join(sorted(package.version for package in duplicates)),
                commands=" && ".join([*[uninstall] * len(duplicates), install]),
            )
            continue
        version = packages.get_version(name)
        if unmet := [one for one in dependencies if not _is_satisfied(version, one.requirement)]:
            required = [
                f"{one.required_by} requires {name}{one.requirement.specifier}" for one in unmet
            ]
            yield make_diagnosis(
                "package-missing" if version is None else "version-conflict",
                "warning" if all(one.is_optional for one in unmet) else "error",
                name=name,
                version=version,
                required="; ".join(required),
                install=install,
            )


def _is_satisfied(version: str | None, requirement: Requirement) -> bool:
    try:
        return version is not None and requirement.specifier.contains(Version(version), True)
    except InvalidVersion:  # handled by the maintainer of the package
        return True


def check_extras(packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Check that extras are complete and that the installed metadata declare all of them."""
    missing_by_extra = packages.find_missing_packages()
    for name, missing in missing_by_extra.items():
        yield make_diagnosis(
            "extra-missing" if missing else "extra",
            name=name,
            description=EXTRA_DESCRIPTIONS[name],
            missing=", ".join(missing),
            install=install_extra_command(name),
        )
    unknown = [name for name in EXTRA_DESCRIPTIONS if name not in missing_by_extra]
    if unknown and PACKAGE_NAME in packages.by_name:
        install = install_command("--no-deps", "-e", ".")
        yield make_diagnosis("metadata-outdated", names=", ".join(unknown), install=install)
