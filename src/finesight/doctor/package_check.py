"""Check installed packages for version conflicts, missing and duplicate packages, and extras."""

from __future__ import annotations

import importlib.util
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from finesight.doctor.diagnosis import Diagnosis, has_errors, make_diagnosis

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
    """Installed distribution, from its metadata.

    Attributes:
        folder: Folder that contains its modules.
        requires: Requirements (PEP 508).
        extras: Names of its extras.
    """

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

    def install_command(self, *requirements: str) -> str:
        """Return the shell command that installs requirements for this Python interpreter."""
        return shlex.join([*PIP_COMMAND, "install", *requirements])

    def install_extra_command(self, name: str) -> str:
        """Return the shell command that installs an extra of finesight."""
        return self.install_command(f"{PACKAGE_NAME}[{name}]")

    def find_missing_packages(self) -> dict[str, list[str]]:
        """Return the packages that each extra requires and that are not installed.

        The list of a complete extra is empty. Extras that the metadata of the installed finesight
        do not declare are omitted.
        """
        missing: dict[str, list[str]] = {}
        for package in self.by_name.get(PACKAGE_NAME, ())[:1]:
            missing = {name: [] for name in EXTRA_DESCRIPTIONS if name in package.extras}
            for requirement in map(_parse_requirement, package.requires):
                if requirement is None or _is_applicable(requirement, ()):
                    continue
                for name, names in missing.items():
                    is_installed = self.get_version(requirement.name) is not None
                    if _is_applicable(requirement, [name]) and not is_installed:
                        names.append(requirement.name)
        return missing


def list_packages(path: Sequence[str] | None = None) -> InstalledPackages:
    """List the installed packages without importing them.

    Args:
        path: Folders to search, by default `sys.path`.
    """
    search_path = list(sys.path if path is None else path)
    packages_by_name: dict[str, list[InstalledPackage]] = {}
    for distribution in distributions(path=search_path):
        name = distribution.metadata["Name"]
        installed = InstalledPackage(
            name or "",
            distribution.version,
            Path(str(distribution.locate_file(""))),
            tuple(distribution.requires or ()),
            tuple(distribution.metadata.get_all("Provides-Extra") or ()),
        )
        same_name = packages_by_name.setdefault(canonicalize_name(name or ""), [])
        if name and installed not in same_name:
            same_name.append(installed)
    folders = [folder for folder in map(Path, search_path) if folder.name in SITE_FOLDERS]
    leftovers = (file for folder in dict.fromkeys(folders) for file in sorted(folder.glob("~*")))
    managed_marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return InstalledPackages(
        {name: tuple(packages) for name, packages in packages_by_name.items() if packages},
        tuple(leftovers),
        importlib.util.find_spec("pip") is not None,
        sys.prefix == sys.base_prefix and managed_marker.is_file(),
    )


def check_packages(packages: InstalledPackages) -> list[Diagnosis]:
    """Check the installed packages against the requirements of finesight."""
    dependencies = _group_dependencies(packages)
    diagnoses = [
        *_check_python(packages),
        *_check_unmet(packages, dependencies),
        *_check_duplicates(packages, dependencies),
    ]
    if packages.leftovers:
        names = ", ".join(path.name for path in packages.leftovers[:5])
        remove = shlex.join(["rm", "-r", *map(str, packages.leftovers)])
        folder = packages.leftovers[0].parent
        diagnoses.append(make_diagnosis("leftovers", names=names, folder=folder, remove=remove))
    if not has_errors(diagnoses):
        diagnoses.insert(0, make_diagnosis("versions", count=len(dependencies)))
    return diagnoses


def _check_python(packages: InstalledPackages) -> Iterator[Diagnosis]:
    if PACKAGE_NAME not in packages.by_name:
        yield make_diagnosis("not-installed", install=packages.install_command("-e", "."))
    if packages.is_managed:
        yield make_diagnosis("python-managed", python=sys.executable)
    if not packages.has_pip:
        install = shlex.join([sys.executable, "-m", "ensurepip"])
        yield make_diagnosis("no-pip", install=install)


@dataclass(frozen=True, slots=True)
class _Dependency:
    """Requirement of an installed package.

    `is_optional` is true if only an extra of finesight leads to it.
    """

    required_by: str
    requirement: Requirement
    is_optional: bool


def _group_dependencies(packages: InstalledPackages) -> dict[str, list[_Dependency]]:
    """Return all direct and transitive requirements of finesight by canonical package name.

    Requirements of extras are included if the required package is installed, since finesight uses
    it then.
    """
    # Each entry: requiring package, requirement, requested extras, and whether it is optional.
    queue: list[tuple[str, str, tuple[str, ...], bool]] = []
    for package in packages.by_name.get(PACKAGE_NAME, ())[:1]:
        extras = tuple(name for name in package.extras if name not in DEV_EXTRAS)
        queue += [(PACKAGE_NAME, text, (), False) for text in package.requires]
        queue += [(PACKAGE_NAME, text, extras, True) for text in package.requires]
    grouped: dict[str, list[_Dependency]] = {}
    seen: set[tuple[str, str]] = set()
    while queue:
        required_by, text, extras, is_optional = queue.pop(0)
        requirement = _parse_requirement(text)
        if requirement is None or not _is_applicable(requirement, extras):
            continue
        name = canonicalize_name(requirement.name)
        installed = packages.by_name.get(name, ())
        is_unused = is_optional and required_by == PACKAGE_NAME and not installed
        if (required_by, text) in seen or name == PACKAGE_NAME or is_unused:
            continue
        seen.add((required_by, text))
        grouped.setdefault(name, []).append(_Dependency(required_by, requirement, is_optional))
        for package in installed[:1]:
            nested_extras = tuple(requirement.extras)
            queue += [(name, nested, nested_extras, is_optional) for nested in package.requires]
    return grouped


def _parse_requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _is_applicable(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies to this machine, given the requested extras."""
    marker, environment = requirement.marker, dict[str, str]()
    environment |= {key: str(value) for key, value in default_environment().items()}
    return marker is None or any(
        marker.evaluate(environment | {"extra": extra}) for extra in ("", *extras)
    )


def _combine_bounds(name: str, dependencies: Sequence[_Dependency]) -> str:
    """Combine the version bounds of a package from all requirements.

    Installing a version within these bounds causes no other conflict.
    """
    bounds = {str(spec) for one in dependencies for spec in one.requirement.specifier}
    return f"{name}{','.join(sorted(bounds))}"


def _check_unmet(
    packages: InstalledPackages, dependencies_by_name: Mapping[str, Sequence[_Dependency]]
) -> Iterator[Diagnosis]:
    """Report missing packages and version conflicts, one diagnosis per package.

    Duplicate packages are reported separately, since their effective version is unknown.
    """
    for name, dependencies in sorted(dependencies_by_name.items()):
        version = packages.get_version(name)
        unmet = [one for one in dependencies if not _is_satisfied(version, one.requirement)]
        if not unmet or len(_list_duplicates(packages, name)) > 1:
            continue
        required = (
            f"{one.required_by} requires {name}{one.requirement.specifier}" for one in unmet
        )
        yield make_diagnosis(
            "package-missing" if version is None else "version-conflict",
            "warning" if all(one.is_optional for one in unmet) else "error",
            name=name,
            version=version,
            required="; ".join(required),
            install=packages.install_command(_combine_bounds(name, dependencies)),
        )


def _is_satisfied(version: str | None, requirement: Requirement) -> bool:
    try:
        return version is not None and requirement.specifier.contains(Version(version), True)
    except InvalidVersion:  # handled by the maintainer of the package
        return True


def _list_duplicates(packages: InstalledPackages, name: str) -> list[InstalledPackage]:
    """Return the distributions of a package in the same folder as the imported one."""
    same_name = packages.by_name.get(name, ())
    return [package for package in same_name if package.folder == same_name[0].folder]


def _check_duplicates(
    packages: InstalledPackages, dependencies_by_name: Mapping[str, Sequence[_Dependency]]
) -> Iterator[Diagnosis]:
    for name in sorted(packages.by_name):
        duplicates = _list_duplicates(packages, name)
        if len(duplicates) < 2:
            continue
        uninstall = shlex.join([*PIP_COMMAND, "uninstall", "--yes", name])
        bounds = _combine_bounds(name, dependencies_by_name.get(name, ()))
        yield make_diagnosis(
            "duplicate-package",
            "error" if name in dependencies_by_name else "warning",
            name=name,
            folder=duplicates[0].folder,
            versions=" and ".join(sorted(package.version for package in duplicates)),
            commands=" && ".join(
                [*[uninstall] * len(duplicates), packages.install_command(bounds)]
            ),
        )


def check_extras(packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Check that extras are complete and that the installed metadata declare all of them."""
    missing_by_extra = packages.find_missing_packages()
    for name, missing in missing_by_extra.items():
        yield make_diagnosis(
            "extra-missing" if missing else "extra",
            name=name,
            description=EXTRA_DESCRIPTIONS[name],
            missing=", ".join(missing),
            install=packages.install_extra_command(name),
        )
    unknown = [name for name in EXTRA_DESCRIPTIONS if name not in missing_by_extra]
    if unknown and PACKAGE_NAME in packages.by_name:
        install = packages.install_command("--no-deps", "-e", ".")
        yield make_diagnosis("metadata-outdated", names=", ".join(unknown), install=install)
