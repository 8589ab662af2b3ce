"""Check installed packages for version conflicts, missing and duplicate packages."""

from __future__ import annotations

import importlib.util
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

from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning

PACKAGE_NAME = "finesight"

SITE_FOLDERS = ("site-packages", "dist-packages")
"""Names of folders that only a package installer writes to.

In other folders, files that start with ~ may belong to the user.
"""

DEV_EXTRAS = ("dev",)
"""Extras for the development of finesight, which are not checked."""

PIP_COMMAND = (sys.executable, "-m", "pip")
"""Command that runs pip of the current Python interpreter."""


@dataclass(frozen=True, slots=True)
class InstalledPackage:
    """Installed distribution, from its metadata.

    Attributes:
        name: Name of the distribution.
        version: Version of the distribution.
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
        return format_command(*PIP_COMMAND, "install", *requirements)


def list_packages(path: Sequence[str] | None = None) -> InstalledPackages:
    """List the installed packages without importing them.

    Args:
        path: Folders to search, by default `sys.path`.
    """
    search_path = list(sys.path if path is None else path)
    packages_by_name: dict[str, list[InstalledPackage]] = {}
    seen: set[tuple[str, str, Path]] = set()
    for distribution in distributions(path=search_path):
        name = distribution.metadata["Name"]
        folder = Path(str(distribution.locate_file("")))
        if not name or (name, distribution.version, folder) in seen:
            continue
        seen.add((name, distribution.version, folder))
        extras = tuple(distribution.metadata.get_all("Provides-Extra") or ())
        installed = InstalledPackage(
            name, distribution.version, folder, tuple(distribution.requires or ()), extras
        )
        packages_by_name.setdefault(canonicalize_name(name), []).append(installed)
    folders = [
        folder for folder in dict.fromkeys(map(Path, search_path)) if folder.name in SITE_FOLDERS
    ]
    leftovers = [leftover for folder in folders for leftover in sorted(folder.glob("~*"))]
    has_pip = importlib.util.find_spec("pip") is not None
    frozen_by_name = {name: tuple(packages) for name, packages in packages_by_name.items()}
    return InstalledPackages(frozen_by_name, tuple(leftovers), has_pip, _is_externally_managed())


def _is_externally_managed() -> bool:
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.is_file()


def check_packages(packages: InstalledPackages) -> list[Diagnosis]:
    """Check the installed packages against the requirements of finesight."""
    diagnoses = [
        *_check_python(packages),
        *_check_unmet(packages),
        *_check_duplicates(packages),
        *_check_leftovers(packages),
    ]
    if not any(item.severity == "error" for item in diagnoses):
        count = len({item.name for item in _resolve_dependencies(packages)})
        diagnoses.insert(0, make_ok("versions", f"{count} required packages, no conflicts"))
    return diagnoses


def _check_python(packages: InstalledPackages) -> Iterator[Diagnosis]:
    if PACKAGE_NAME not in packages.by_name:
        yield make_warning(
            "not-installed",
            "finesight runs from source and is not installed",
            why="its requirements are unknown, so versions cannot be checked",
            remedy=packages.install_command("-e", "."),
        )
    if packages.is_managed:
        yield make_warning(
            "python-managed",
            f"{sys.executable} is managed by the operating system",
            why="pip refuses to install packages there; create a virtual environment",
            remedy="python3 -m venv ~/finesight && . ~/finesight/bin/activate",
        )
    if not packages.has_pip:
        yield make_warning(
            "no-pip",
            "pip is not installed for this Python interpreter",
            why="the commands below require pip",
            remedy=format_command(sys.executable, "-m", "ensurepip"),
        )


@dataclass(frozen=True, slots=True)
class _Dependency:
    """Requirement of an installed package.

    Attributes:
        required_by: Package that has the requirement.
        requirement: Required package and its version bounds.
        is_optional: True if only an extra of finesight leads to this requirement.
    """

    required_by: str
    requirement: Requirement
    is_optional: bool

    @property
    def name(self) -> str:
        """Canonical name of the required package."""
        return canonicalize_name(self.requirement.name)


def _resolve_dependencies(packages: InstalledPackages) -> list[_Dependency]:
    """Return all direct and transitive requirements of finesight.

    Requirements of extras are included if the required package is installed, since finesight uses
    it then.
    """
    own_packages = packages.by_name.get(PACKAGE_NAME, ())[:1]
    # Each entry: requiring package, requirement, requested extras, and whether it is optional.
    queue: list[tuple[str, str, tuple[str, ...], bool]] = []
    for package in own_packages:
        queue += [(PACKAGE_NAME, text, (), False) for text in package.requires]
        extras = tuple(name for name in package.extras if name not in DEV_EXTRAS)
        queue += [(PACKAGE_NAME, text, extras, True) for text in package.requires]
    resolved: dict[tuple[str, str], _Dependency] = {}
    while queue:
        required_by, text, extras, is_optional = queue.pop(0)
        requirement = _parse_requirement(text)
        if (
            (required_by, text) in resolved
            or requirement is None
            or not _is_applicable(requirement, extras)
        ):
            continue
        dependency = _Dependency(required_by, requirement, is_optional)
        installed = packages.by_name.get(dependency.name, ())
        if dependency.name == PACKAGE_NAME or (
            is_optional and required_by == PACKAGE_NAME and not installed
        ):
            continue
        resolved[required_by, text] = dependency
        requested_extras = tuple(requirement.extras)
        queue += [
            (dependency.name, nested_text, requested_extras, is_optional)
            for package in installed[:1]
            for nested_text in package.requires
        ]
    return list(resolved.values())


def _parse_requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _is_applicable(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies to this machine, given the requested extras."""
    if requirement.marker is None:
        return True
    marker_environment = {key: str(value) for key, value in default_environment().items()}
    return any(
        requirement.marker.evaluate(marker_environment | {"extra": extra})
        for extra in ("", *extras)
    )


def _group_by_name(packages: InstalledPackages) -> dict[str, list[_Dependency]]:
    by_name: dict[str, list[_Dependency]] = {}
    for dependency in _resolve_dependencies(packages):
        by_name.setdefault(dependency.name, []).append(dependency)
    return by_name


def _combine_bounds(name: str, dependencies: Sequence[_Dependency]) -> str:
    """Combine the version bounds of a package from all requirements.

    Installing a version within these bounds causes no other conflict.
    """
    bounds = sorted(
        {str(spec) for dependency in dependencies for spec in dependency.requirement.specifier}
    )
    return f"{name}{','.join(bounds)}"


def _check_unmet(packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Report missing packages and version conflicts, one diagnosis per package.

    Duplicate packages are reported separately, since their effective version is unknown.
    """
    for name, dependencies in sorted(_group_by_name(packages).items()):
        version = packages.get_version(name)
        unmet = [
            dependency
            for dependency in dependencies
            if version is None or not _is_satisfied(version, dependency.requirement)
        ]
        if unmet and len(_list_duplicates(packages, name)) < 2:
            remedy = packages.install_command(_combine_bounds(name, dependencies))
            yield _diagnose_unmet(name, version, unmet, remedy)


def _is_satisfied(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # handled by the maintainer of the package
        return True


def _diagnose_unmet(
    name: str, version: str | None, unmet: Sequence[_Dependency], remedy: str
) -> Diagnosis:
    why = "; ".join(
        f"{dependency.required_by} requires {name}{dependency.requirement.specifier}"
        for dependency in unmet
    )
    make_diagnosis = (
        make_warning if all(dependency.is_optional for dependency in unmet) else make_error
    )
    if version is None:
        return make_diagnosis("package-missing", f"{name} is not installed", why=why, remedy=remedy)
    return make_diagnosis(
        "version-conflict", f"{name} {version} is installed", why=why, remedy=remedy
    )


def _list_duplicates(packages: InstalledPackages, name: str) -> list[InstalledPackage]:
    """Return the distributions of a package in the same folder as the imported one."""
    packages_of_name = packages.by_name.get(name, ())
    return [package for package in packages_of_name if package.folder == packages_of_name[0].folder]


def _check_duplicates(packages: InstalledPackages) -> Iterator[Diagnosis]:
    dependencies_by_name = _group_by_name(packages)
    for name in sorted(packages.by_name):
        duplicates = _list_duplicates(packages, name)
        if len(duplicates) < 2:
            continue
        versions = " and ".join(sorted(package.version for package in duplicates))
        uninstall = format_command(*PIP_COMMAND, "uninstall", "--yes", name)
        reinstall = packages.install_command(
            _combine_bounds(name, dependencies_by_name.get(name, ()))
        )
        make_diagnosis = make_error if name in dependencies_by_name else make_warning
        yield make_diagnosis(
            "duplicate-package",
            f"{name} is installed twice in {duplicates[0].folder}: {versions}",
            why="an installation was interrupted: files of both versions may be mixed",
            remedy=" && ".join([*[uninstall] * len(duplicates), reinstall]),
        )


def _check_leftovers(packages: InstalledPackages) -> Iterator[Diagnosis]:
    if packages.leftovers:
        names = ", ".join(path.name for path in packages.leftovers[:5])
        yield make_warning(
            "leftovers",
            f"interrupted installations left {names} in {packages.leftovers[0].parent}",
            why="pip prints warnings about them, and they use disk space",
            remedy=format_command("rm", "-r", *map(str, packages.leftovers)),
        )
