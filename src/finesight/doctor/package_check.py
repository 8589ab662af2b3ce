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
        name, location = package.metadata["Name"], str(package.locate_file(""))
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
    required, used = (_group_requirements(packages, with_extras=one) for one in (False, True))
    diagnoses = []
    for name, requirements in sorted(used.items()):
        bounds = {str(spec) for _, one in requirements for spec in one.specifier}
        install = install_command(f"{name}{','.join(sorted(bounds))}")
        installed = packages.get(name, ())
        folders = [str(package.locate_file("")) for package in installed]
        version = installed[0].version if installed else None
        unmet = [
            f"{source} requires {name}{one.specifier}"
            for source, one in requirements
            if version is None or not one.specifier.contains(version, prereleases=True)
        ]
        if (count := folders.count(folders[0]) if folders else 0) > 1:
            code = "duplicate-package"
            uninstall = join_command(*PIP_COMMAND, "uninstall", "-y", name)
            install = " && ".join([*[uninstall] * count, install])
        elif unmet:
            code = "package-missing" if version is None else "version-conflict"
        else:
            continue
        values = {"name": name, "version": version, "required": "; ".join(unmet)}
        diagnoses.append(make_diagnosis(code, name in required, **values, install=install))
    if not count_severity({"packages": diagnoses}, "error"):
        diagnoses.insert(0, make_diagnosis("versions", count=len(used)))
    return diagnoses


def _group_requirements(
    packages: InstalledPackages, with_extras: bool
) -> dict[str, list[tuple[str, Requirement]]]:
    """Return direct and indirect requirements of finesight, with their sources, by package name."""
    grouped: dict[str, list[tuple[str, Requirement]]] = {}
    sources = [PACKAGE_NAME]
    for source in sources:  # The loop extends the list.
        package = next(iter(packages.get(source, ())), None)
        declared = package.metadata.get_all("Provides-Extra") or () if package else ()
        use_extras = with_extras and source == PACKAGE_NAME
        extras = [name for name in declared if use_extras and name != "dev"]
        for requirement in _parse_requirements(package):
            name = canonicalize_name(requirement.name)
            is_used = _is_applicable(requirement, extras if name in packages else ())
            if is_used and name != PACKAGE_NAME:
                grouped.setdefault(name, []).append((source, requirement))
                sources += [] if name in sources else [name]
    return grouped


def _parse_requirements(package: Distribution | None) -> Iterator[Requirement]:
    """Parse the requirements of a package. Invalid ones are omitted."""
    for text in (package.requires if package else None) or ():
        with contextlib.suppress(InvalidRequirement):
            yield Requirement(text)


def _is_applicable(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies to this machine, given the requested extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def check_extras(packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Check that the extras of finesight are complete, and list the plug-ins of other packages."""
    for plugin, *_ in packages.values():
        own = [one for one in plugin.entry_points if one.group.startswith(f"{PACKAGE_NAME}.")]
        yield from (make_diagnosis("plugin", entry=one, package=plugin) for one in own)
    package = next(iter(packages.get(PACKAGE_NAME, ())), None)
    for name in (package.metadata.get_all("Provides-Extra") or ()) if package else ():
        missing = [
            requirement.name
            for requirement in _parse_requirements(package)
            if _is_applicable(requirement, [name]) and not _is_applicable(requirement, ())
            if canonicalize_name(requirement.name) not in packages
        ]
        if name != "dev" and missing:
            values = {"missing": ", ".join(missing), **load_catalog()[f"extra.{name}"]}
            install = install_command(f"{PACKAGE_NAME}[{name}]")
            yield make_diagnosis("extra-missing", **values, install=install)
        elif name != "dev":
            yield make_diagnosis(f"extra.{name}")
