"""Installed packages: versions that clash, are missing, or are there twice."""

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

from finesight.doctor.findings import Finding, fault, fine, hint, typed

SELF = "finesight"

SITES = ("site-packages", "dist-packages")
"""Folders that are an installer's own: elsewhere, what begins with ~ may be somebody's."""

NOT_FOR_USERS = ("dev",)
"""Extras that whoever works on finesight installs."""

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
    are what interrupted installations left behind; `pip` says whether there is what installs,
    `managed` that the system keeps this Python to itself (PEP 668)."""

    found: Mapping[str, tuple[Installed, ...]]
    leftovers: tuple[Path, ...]
    pip: bool
    managed: bool = False

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
    folders = [folder for folder in dict.fromkeys(map(Path, searched)) if folder.name in SITES]
    leftovers = [left for folder in folders for left in sorted(folder.glob("~*"))]
    pip = importlib.util.find_spec("pip") is not None
    named = {name: tuple(every) for name, every in found.items()}
    return Packages(named, tuple(leftovers), pip, _managed())


def _managed() -> bool:
    marked = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marked.is_file()


def judge(packages: Packages) -> list[Finding]:
    """What is wrong with them, and what it takes to mend it."""
    found = [*_own(packages), *_unmet(packages), *_twice(packages), *_left(packages)]
    if not any(one.severity == "fault" for one in found):
        count = len({one.name for one in _closure(packages)})
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
    if packages.managed:
        yield hint(
            "python-managed",
            f"{sys.executable} is the system's own Python",
            why="pip refuses to install into it: an environment of your own takes what is needed",
            remedy="python3 -m venv ~/finesight && . ~/finesight/bin/activate",
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
    """A requirement, who has it, and whether it is of an extra alone."""

    by: str
    requirement: Requirement
    optional: bool

    @property
    def name(self) -> str:
        """The canonical name of what is required."""
        return canonicalize_name(self.requirement.name)


def _closure(packages: Packages) -> list[_Wanted]:
    """What finesight requires, what that requires, and so on, each once. Of its extras, what is
    installed is followed, too: it is used wherever it is there."""
    own = packages.found.get(SELF, ())[:1]
    # Who requires it, what, the extras that were asked of them, and whether for an extra alone.
    pending: list[tuple[str, str, tuple[str, ...], bool]] = []
    for one in own:
        pending += [(SELF, text, (), False) for text in one.requires]
        extras = tuple(name for name in one.extras if name not in NOT_FOR_USERS)
        pending += [(SELF, text, extras, True) for text in one.requires]
    done: dict[tuple[str, str], _Wanted] = {}
    while pending:
        by, text, extras, optional = pending.pop(0)
        requirement = _read(text)
        if (by, text) in done or requirement is None or not _applies(requirement, extras):
            continue
        wanted = _Wanted(by, requirement, optional)
        there = packages.found.get(wanted.name, ())
        if wanted.name == SELF or (optional and by == SELF and not there):
            continue
        done[by, text] = wanted
        asked = tuple(requirement.extras)
        pending += [
            (wanted.name, more, asked, optional) for one in there[:1] for more in one.requires
        ]
    return list(done.values())


def _read(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether it holds on this machine, with any of these extras or without."""
    if requirement.marker is None:
        return True
    environment = {key: str(value) for key, value in default_environment().items()}
    return any(requirement.marker.evaluate(environment | {"extra": n}) for n in ("", *extras))


def _by_name(packages: Packages) -> dict[str, list[_Wanted]]:
    by_name: dict[str, list[_Wanted]] = {}
    for wanted in _closure(packages):
        by_name.setdefault(wanted.name, []).append(wanted)
    return by_name


def _within(name: str, every: Sequence[_Wanted]) -> str:
    """The package within all bounds at once: mending one clash must not make another one."""
    bounds = sorted({str(spec) for one in every for spec in one.requirement.specifier})
    return f"{name}{','.join(bounds)}"


def _unmet(packages: Packages) -> Iterator[Finding]:
    """Requirements that nothing installed fulfils, a finding for each package; of one that is there
    twice, nobody knows which it is."""
    for name, every in sorted(_by_name(packages).items()):
        version = packages.version(name)
        unmet = [one for one in every if version is None or not _fits(version, one.requirement)]
        if unmet and len(_beside(packages, name)) < 2:
            remedy = packages.install(_within(name, every))
            yield _unmet_finding(name, version, unmet, remedy)


def _fits(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # nobody's business but its maker's
        return True


def _unmet_finding(
    name: str, version: str | None, unmet: Sequence[_Wanted], remedy: str
) -> Finding:
    why = "; ".join(f"{one.by} requires {name}{one.requirement.specifier}" for one in unmet)
    make = hint if all(one.optional for one in unmet) else fault
    if version is None:
        return make("package-missing", f"{name} is not installed", why=why, remedy=remedy)
    return make("version-clash", f"{name} {version} is installed", why=why, remedy=remedy)


def _beside(packages: Packages, name: str) -> list[Installed]:
    """Those of its distributions that lie in the folder of the first."""
    every = packages.found.get(name, ())
    return [one for one in every if one.folder == every[0].folder]


def _twice(packages: Packages) -> Iterator[Finding]:
    wanted = _by_name(packages)
    for name in sorted(packages.found):
        beside = _beside(packages, name)
        if len(beside) < 2:
            continue
        versions = " and ".join(sorted(one.version for one in beside))
        away = typed(*PIP, "uninstall", "--yes", name)
        again = packages.install(_within(name, wanted.get(name, ())))
        make = fault if name in wanted else hint
        yield make(
            "installed-twice",
            f"{name} is installed twice in {beside[0].folder}: {versions}",
            why="an installation was interrupted: files of both may lie mixed",
            remedy=" && ".join([*[away] * len(beside), again]),
        )


def _left(packages: Packages) -> Iterator[Finding]:
    if packages.leftovers:
        names = ", ".join(path.name for path in packages.leftovers[:5])
        yield hint(
            "leftovers",
            f"interrupted installations left {names} in {packages.leftovers[0].parent}",
            why="pip complains of them whenever it runs, and they take room",
            remedy=typed("rm", "-r", *map(str, packages.leftovers)),
        )
