"""Check installed packages for version conflicts, missing and duplicate packages, and extras."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from finesight.doctor.diagnosis import (
    Diagnosis,
    count_severity,
    join_command,
    load_catalog,
    make_diagnosis,
)
from finesight.tracker_components import TRACKERS

PACKAGE_NAME = "finesight"

InstalledPackages = Mapping[str, Sequence[Distribution]]
"""Distributions by canonical name. The first one of a name is the one that is imported."""

PIP_COMMAND = (sys.executable, "-m", "pip")


def install_command(*requirements: str) -> str:
    """Return the shell command that installs requirements for this Python interpreter."""
    return join_command(*PIP_COMMAND, "install", *requirements)


def list_packages(path: Sequence[str] | None = None) -> InstalledPackages:
    """List the packages in folders, by default `sys.path`, without importing them."""
    packages: dict[str, list[Distribution]] = {}
    seen = set()  # A folder may be in `sys.path` twice.
    for package in distributions(path=list(sys.path if path is None else path)):
        name = package.metadata["Name"]
        location = str(package.locate_file(""))
        if name and (name, package.version, location) not in seen:
            seen.add((name, package.version, location))
            packages.setdefault(canonicalize_name(name), []).append(package)
    return packages


def check_packages(packages: InstalledPackages) -> list[Diagnosis]:
    """Check the packages that finesight requires, directly or indirectly, for conflicts.

    A remedy installs a version that satisfies all requirements. Requirements of extras count if
    the required package is installed, and their conflicts are warnings.
    """
    if PACKAGE_NAME not in packages:
        return [make_diagnosis("not-installed", install=install_command("-e", "."))]
    required = _group_requirements(packages, with_extras=False)
    used = _group_requirements(packages, with_extras=True)
    diagnoses = []
    for name, requirements in sorted(used.items()):
        diagnosis = _check_package(name, requirements, packages.get(name, ()), name in required)
        if diagnosis is not None:
            diagnoses.append(diagnosis)
    if not count_severity({"packages": diagnoses}, "error"):
        diagnoses.insert(0, make_diagnosis("versions", count=len(used)))
    return diagnoses


def _check_package(
    name: str,
    requirements: Sequence[tuple[str, Requirement]],
    installed: Sequence[Distribution],
    is_required: bool,
) -> Diagnosis | None:
    """Report a duplicate, missing or conflicting package; None without a problem.

    Args:
        requirements: Requirements of the package, with their sources.
        installed: Distributions of the package.
    """
    version = None
    num_copies = 0  # in the folder of the imported one
    if installed:
        version = installed[0].version
        folders = [str(package.locate_file("")) for package in installed]
        num_copies = folders.count(folders[0])
    bounds: set[str] = set()
    unmet = []
    for source, requirement in requirements:
        bounds.update(map(str, requirement.specifier))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{source} requires {name}{requirement.specifier}")
    install = install_command(f"{name}{','.join(sorted(bounds))}")
    if num_copies > 1:
        code = "duplicate-package"
        uninstall = join_command(*PIP_COMMAND, "uninstall", "-y", name)
        install = " && ".join([uninstall] * num_copies + [install])
    elif not unmet:
        return None
    elif version is None:
        code = "package-missing"
    else:
        code = "version-conflict"
    values = {"name": name, "version": version, "required": "; ".join(unmet)}
    return make_diagnosis(code, is_required, **values, install=install)


def _group_requirements(
    packages: InstalledPackages, with_extras: bool
) -> dict[str, list[tuple[str, Requirement]]]:
    """Return direct and indirect requirements of finesight, with their sources, by package name."""
    grouped: dict[str, list[tuple[str, Requirement]]] = {}
    sources = [PACKAGE_NAME]
    for source in sources:  # The loop extends the list.
        package = next(iter(packages.get(source, ())), None)
        if package is None:
            continue
        extras: list[str] = []
        if with_extras and source == PACKAGE_NAME:
            extras = _list_extras(package)
        for requirement in _parse_requirements(package):
            name = canonicalize_name(requirement.name)
            is_used = _is_applicable(requirement, extras if name in packages else ())
            if is_used and name != PACKAGE_NAME:
                grouped.setdefault(name, []).append((source, requirement))
                if name not in sources:
                    sources.append(name)
    return grouped


def _list_extras(package: Distribution) -> list[str]:
    """List the extras of a package for users."""
    names = package.metadata.get_all("Provides-Extra") or ()
    return [name for name in names if name != "dev"]


def _parse_requirements(package: Distribution) -> Iterator[Requirement]:
    """Parse the requirements of a package. Invalid ones are omitted."""
    for text in package.requires or ():
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def _is_applicable(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies to this machine, given the requested extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def check_extras(packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Check that the extras of finesight are complete, and list the plug-ins of other packages."""
    for plugin, *_ in packages.values():
        for entry in plugin.entry_points:
            if entry.group.startswith(f"{PACKAGE_NAME}."):
                yield make_diagnosis("plugin", entry=entry, package=plugin)
    package = next(iter(packages.get(PACKAGE_NAME, ())), None)
    if package is None:
        return
    for name in _list_extras(package):
        missing = []
        for requirement in _parse_requirements(package):
            is_missing = canonicalize_name(requirement.name) not in packages
            is_of_extra = _is_applicable(requirement, [name])
            if is_missing and is_of_extra and not _is_applicable(requirement, ()):
                missing.append(requirement.name)
        if missing:
            values = {"missing": ", ".join(missing), "what": describe_extra(name)}
            install = install_command(f"{PACKAGE_NAME}[{name}]")
            yield make_diagnosis("extra-missing", **values, install=install)
        else:
            yield make_diagnosis("extra", what=describe_extra(name))


def describe_extra(name: str) -> str:
    """Return the description of an extra of finesight: of its trackers, or of the catalog."""
    trackers = [one.title for one in TRACKERS.list_built_in() if one.extra == name]
    if trackers:
        return f"[{name}] experiment tracking with {' and '.join(trackers)}"
    description: str = load_catalog()[f"extra.{name}"]["what"]
    return description
