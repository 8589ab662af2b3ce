"""Installed packages: versions that clash, are missing, or are there twice."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from finesight.doctor.findings import Finding, fault, fine, hint, typed

SELF = "finesight"

PIP = (sys.executable, "-m", "pip")
"""Of the Python that runs this, whatever `pip` alone would mean."""


@dataclass(frozen=True, slots=True)
class Installed:
    """One distribution as its metadata say it."""

    name: str
    version: str
    folder: Path
    requires: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Packages:
    """What Python finds: `found` by canonical name, the one that is imported first. `leftovers`
    are what interrupted installations left behind; `pip` says whether there is what installs."""

    found: Mapping[str, tuple[Installed, ...]]
    leftovers: tuple[Path, ...]
    pip: bool

    def version(self, name: str) -> str | None:
        """That of the distribution that is imported, if there is one."""
        installed = self.found.get(canonicalize_name(name))
        return installed[0].version if installed else None

    def install(self, *requirements: str) -> str:
        """The command that installs them for this Python."""
        return typed(*PIP, "install", *requirements)


def gather(path: Sequence[str] | None = None) -> Packages:
    """The distributions on `path`, Python's own by default. Nothing is imported."""
    searched = list(sys.path if path is None else path)
    found: dict[str, list[Installed]] = {}
    seen: set[tuple[str, str, Path]] = set()
    for one in distributions(path=searched):
        name = one.metadata["Name"]
        folder = Path(str(one.locate_file("")))
        if not name or (name, one.version, folder) in seen:
            continue
        seen.add((name, one.version, folder))
        extras = tuple(one.metadata.get_all("Provides-Extra") or ())
        installed = Installed(name, one.version, folder, tuple(one.requires or ()), extras)
        found.setdefault(canonicalize_name(name), []).append(installed)
    folders = dict.fromkeys(Path(folder) for folder in searched if folder)
    leftovers = [left for folder in folders for left in folder.glob("~*") if folder.is_dir()]
    pip = importlib.util.find_spec("pip") is not None
    return Packages({n: tuple(all_) for n, all_ in found.items()}, tuple(leftovers), pip)


def judge(packages: Packages) -> list[Finding]:
    """What is wrong with them, and what it takes to mend it."""
    found = [*_own(packages), *_unmet(packages), *_twice(packages), *_left(packages)]
    if not any(one.severity == "fault" for one in found):
        count = len({canonicalize_name(one.requirement.name) for one in _closure(packages)})
        found.insert(0, fine("versions", f"{count} packages that finesight needs, none clashes"))
    return found


def _own(packages: Packages) -> Iterator[Finding]:
    if SELF not in packages.found:
        yield hint(
            "not-installed",
            "finesight runs from its sources and is not installed",
            why="what it requires is not known, so that no version can be compared",
            remedy=packages.install("-e", "."),
        )
    if not packages.pip:
        yield hint(
            "no-pip",
            "this Python has no pip",
            why="nothing can be installed by the commands below without it",
            remedy=typed(sys.executable, "-m", "ensurepip"),
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A requirement, and who has it."""

    by: str
    requirement: Requirement


def _closure(packages: Packages) -> Iterator[_Wanted]:
    """What finesight requires, what that requires, and so on, each pair once. Of its extras, what
    is installed is followed, too: it is used wherever it is there."""
    own = packages.found.get(SELF, ())[:1]
    pending: list[tuple[str, str, bool]] = [
        (SELF, text, True) for one in own for text in one.requires
    ]
    done: set[tuple[str, str]] = set()
    while pending:
        by, text, optional = pending.pop()
        if (by, text) in done:
            continue
        done.add((by, text))
        requirement = _read(text)
        if requirement is None or not _applies(requirement, optional):
            continue
        name = canonicalize_name(requirement.name)
        there = packages.found.get(name, ())
        if _is_optional(requirement) and not there:
            continue
        yield _Wanted(by, requirement)
        extras = requirement.extras
        for more in there[0].requires if there and name != SELF else ():
            inner = _read(more)
            if inner is not None and _applies(inner, False, extras):
                pending.append((name, more, bool(extras)))


def _read(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _is_optional(requirement: Requirement) -> bool:
    return requirement.marker is not None and "extra" in str(requirement.marker)


def _applies(requirement: Requirement, optional: bool, extras: Iterable[str] = ()) -> bool:
    """Whether it holds on this machine; of `optional` ones, whatever their extra is called."""
    if requirement.marker is None:
        return True
    names = [*extras, ""]
    if optional:
        names += re.findall(r"extra == ['\"]([^'\"]+)", str(requirement.marker))
    environment = {key: str(value) for key, value in default_environment().items()}
    return any(requirement.marker.evaluate(environment | {"extra": name}) for name in names)


def _unmet(packages: Packages) -> Iterator[Finding]:
    """Requirements that nothing installed fulfils, a finding for each that is not."""
    unmet: dict[str, list[_Wanted]] = {}
    for wanted in _closure(packages):
        name = canonicalize_name(wanted.requirement.name)
        version = packages.version(name)
        if version is None or not _fits(version, wanted.requirement):
            unmet.setdefault(name, []).append(wanted)
    for name, every in sorted(unmet.items()):
        yield _unmet_finding(packages, name, every)


def _fits(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _unmet_finding(packages: Packages, name: str, every: Sequence[_Wanted]) -> Finding:
    version = packages.version(name)
    asked = [f"{one.by} requires {name}{one.requirement.specifier}" for one in every]
    # All that is required of it at once: mending one clash must not make another one.
    others = [w for w in _closure(packages) if canonicalize_name(w.requirement.name) == name]
    bounds = sorted({str(spec) for one in others for spec in one.requirement.specifier})
    remedy = packages.install(f"{name}{','.join(bounds)}")
    if version is None:
        return fault(
            "package-missing",
            f"{name} is not installed",
            why="; ".join(asked),
            remedy=remedy,
        )
    return fault(
        "version-clash",
        f"{name} {version} is installed",
        why="; ".join(asked),
        remedy=remedy,
    )


def _twice(packages: Packages) -> Iterator[Finding]:
    for name, every in sorted(packages.found.items()):
        first = every[0]
        beside = [one for one in every if one.folder == first.folder]
        if len(beside) > 1:
            versions = " and ".join(one.version for one in beside)
            away = typed(*PIP, "uninstall", "--yes", name)
            again = f"{name}=={max(beside, key=_newest).version}"
            yield fault(
                "installed-twice",
                f"{name} is installed twice in {first.folder}: {versions}",
                why="an installation was interrupted: files of both may lie mixed",
                remedy=" && ".join([*[away] * len(beside), packages.install(again)]),
            )


def _newest(one: Installed) -> Version:
    try:
        return Version(one.version)
    except InvalidVersion:
        return Version("0")


def _left(packages: Packages) -> Iterator[Finding]:
    if packages.leftovers:
        names = ", ".join(path.name for path in packages.leftovers[:5])
        yield hint(
            "leftovers",
            f"interrupted installations left {names} in {packages.leftovers[0].parent}",
            why="pip complains of them whenever it runs, and they take room",
            remedy=typed("rm", "-r", *map(str, packages.leftovers)),
        )
